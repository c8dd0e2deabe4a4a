"""Dataset to trained adapter: lengths, batches, loss, the trainer and its checkpoints.

Nothing here knows LlamaIndex's embedding class; how a model is judged is handed in.
"""
