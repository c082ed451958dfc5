"""What runs between the dense products: norms, rotary embedding, attention, shrink and expand."""
