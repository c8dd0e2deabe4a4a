"""Dataset to trained adapter: lengths, batches, loss, the trainer and its checkpoints."""
