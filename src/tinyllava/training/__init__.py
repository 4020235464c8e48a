"""Training: a run is its stages in order, each one a transformers Trainer with three hooks."""
