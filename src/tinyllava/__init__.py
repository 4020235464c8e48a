"""tinyllava: design, train, evaluate and ship small-scale large multimodal models.

Paper: TinyLLaVA: A Framework of Small-scale Large Multimodal Models (arXiv 2402.14289).
"""

__version__ = "0.1.0"
