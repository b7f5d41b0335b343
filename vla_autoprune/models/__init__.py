"""What a stage needs from a transformers model, and the shipped small VLA with its training."""
