"""ShareLoRA Serve: thousands of fine-tuned variants of one model from one resident copy."""

__version__ = "0.1.0"
