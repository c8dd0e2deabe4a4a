"""The contenders of `benchmarks/speed.py`, one file each, and the measurements.

This package is also imported in the contenders' own environments: `measure.py` and `child.py` only need torch,
transformers and sentence-transformers.
"""
