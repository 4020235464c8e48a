"""The paper as a program: grids of runs, expanded into stages and evaluations that are done once each.

Paper: section 4. A grid is a value; ``tinyllava reproduce`` runs what is missing of it and writes its study.
"""
