"""Vision encoders that transformers does not have."""
