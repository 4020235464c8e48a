"""The nine benchmarks of the paper: questions in, scores with their errors out.

Paper: section 4.1.3 and appendix A.
"""
