"""Models: one folder each, plain PyTorch, parallelised from outside."""
