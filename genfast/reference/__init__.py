"""The specification of every op, in plain PyTorch, written to be read."""
