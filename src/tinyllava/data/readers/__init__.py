"""Readers of training data: from a file of any known form to (place, conversation), collecting defects."""
