"""The model of Figure 2: vision encoder, connector, small language model, and their processor.

Importing this package registers tinyllava folders with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import tinyllava.model.encoders  # noqa: F401  (registers our own encoders)
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor

AutoConfig.register("tinyllava", TinyLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(TinyLlavaConfig, TinyLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(TinyLlavaConfig, TinyLlavaProcessor, exist_ok=True)

__all__ = ["TinyLlavaConfig", "TinyLlavaForConditionalGeneration", "TinyLlavaProcessor"]
