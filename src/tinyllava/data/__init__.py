"""From records to batches: readers, images, examples and padding."""
