"""Import checkpoints of other layouts, and export checkpoints for other programs."""
