"""The parts of Table 1 before any weights are loaded. Needs no torch."""
