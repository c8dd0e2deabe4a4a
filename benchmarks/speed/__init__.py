"""The contenders of `benchmarks/speed.py`, one file each, and what they are measured with.

This package is also imported in the contenders' own environments: `measure.py` and `child.py` need torch,
transformers and sentence-transformers alone.
"""
