"""Checkpoints in and out: other layouts are imported, ours are exported."""
