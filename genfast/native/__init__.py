"""From tensors to addresses: what the native modules need to know about each argument."""
