"""DeepSpeed you can read: chat fine-tuning and the techniques under it, in pure PyTorch."""

__version__ = "0.1.0"
