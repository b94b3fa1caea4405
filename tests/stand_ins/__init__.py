"""Stand-ins for libraries that need a GPU: their documented signatures, layouts and mask meanings, in plain PyTorch."""
