"""Table 1 and what belongs to it, before any weights are loaded: needs no torch."""
