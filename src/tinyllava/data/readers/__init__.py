"""Readers of training data: a file of any known form to (place, conversation), every defect collected."""
