"""Normalisers, parsers, metrics and their errors: pure functions over text and numbers."""
