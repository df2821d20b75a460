"""Train 1-bit convolutional networks (PCNN, MCN) in PyTorch Lightning."""

__version__ = "0.1.0.dev0"
