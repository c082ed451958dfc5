"""The frozen base: its configuration, its weights and its decoder."""
