"""Normalisers, parsers, metrics and their errors: pure functions of text and numbers."""
