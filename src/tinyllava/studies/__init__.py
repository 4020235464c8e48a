"""The paper's experiments: grids of runs, expanded into stages and evaluations that are done once each.

Paper: section 4. A grid is a value. ``tinyllava reproduce`` runs its missing nodes and writes the study.
"""
