"""Ask a model: one conversation, a stream, a file of questions, or many that share a prefix."""
