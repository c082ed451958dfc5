"""Training of ShareLoRA adapters: what they cost, data, shared factors, the loop, the card."""
