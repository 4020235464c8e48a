"""The nine benchmarks of the paper: questions in, scores with confidence intervals out.

Paper: section 4.1.3 and appendix A.
"""
