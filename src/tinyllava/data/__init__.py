"""Records to batches: LLaVA's JSON, images, examples, padding."""
