"""Training: a run is its stages in order, each a transformers Trainer with three hooks."""

from tinyllava.model.quiet import quiet_bitsandbytes_import

with quiet_bitsandbytes_import():
    import transformers.trainer  # noqa: F401  (imports peft)
