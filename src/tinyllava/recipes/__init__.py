"""Training recipes as values: the paper's two, LoRA forms, the variants of Table A1 and the ablations.

Paper: section 4.1.2, Figure 3. A recipe is data: it says what each stage trains, on what and how fast, and
never reaches the model.
"""
