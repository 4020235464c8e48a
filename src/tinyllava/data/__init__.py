"""Records to batches: LLaVA's JSON, pictures, examples, padding."""
