"""What happens to logits before a token is chosen: NaN or infinity is an error, never an answer.

Paper: none. Every path to an answer passes this check: batches, streams and shared prefixes.
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from tinyllava.errors import CheckpointError
from tinyllava.model import TinyLlavaForConditionalGeneration
from tinyllava.model.linear import named_weights


class FiniteLogits(LogitsProcessor):
    """Rejects logits that are not finite, except after a finished answer."""

    def __init__(
        self, model: TinyLlavaForConditionalGeneration, num_prompt_tokens: int, *, can_forbid: bool
    ) -> None:
        self.model, self.num_prompt_tokens, self.can_forbid = model, num_prompt_tokens, can_forbid
        self.stops = stop_ids(model)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores [B, K]; those of ``<image>`` and of rows without a token cannot win."""
        new = input_ids[:, self.num_prompt_tokens :]
        finished = torch.isin(new, self.stops.to(new.device)).any(1)
        check_logits(self.model, scores[~finished], can_forbid=self.can_forbid)
        return forbid_images(self.model, scores)


def forbid_images(model: TinyLlavaForConditionalGeneration, logits: torch.Tensor) -> torch.Tensor:
    """Return logits [..., K] under which no answer contains ``<image>``.

    Its row, and those that fill up the embedding after the language model's own, are zero: where every other
    logit is negative they would be the likeliest. Published code has no such rows.
    """
    logits, least, image = logits.clone(), torch.finfo(logits.dtype).min, model.config.image_token_id
    logits[..., image : image + 1] = least
    if model.config.num_language_rows:
        logits[..., model.config.num_language_rows :] = least
    return logits


def check_logits(
    model: TinyLlavaForConditionalGeneration, logits: torch.Tensor, *, can_forbid: bool = False
) -> None:
    """Refuse logits [..., K] out of which no answer can be chosen.

    Args:
        can_forbid: whether some may be minus infinity: an option of ``generate`` forbids these tokens.

    Raises:
        CheckpointError: some are NaN or infinite; the weight that is, or the type of the weights, is named.
    """
    if bool(logits.isfinite().all()):
        return
    usable = logits.isfinite() | (logits.isneginf() & logits.isfinite().any(-1, keepdim=True) & can_forbid)
    if bool(usable.all()):
        return
    what = f"{model.name_or_path or 'the model'}: the logits are NaN or infinite"
    if broken := _broken_weight(chain(named_weights(model), model.named_buffers())):
        raise CheckpointError(f"{what}: {broken}. {_COPY}")
    dtype = str(model.dtype).removeprefix("torch.")
    fix = "Load it in bfloat16 or float32." if model.dtype == torch.float16 else "Train the model again."
    raise CheckpointError(f"{what}, but all weights are finite: {dtype} overflows. {fix}")


def refuse_broken_weights(model: TinyLlavaForConditionalGeneration) -> None:
    """Refuse a model before work that its weights make worthless.

    Raises:
        CheckpointError: a weight with values that are NaN or infinite.
    """
    if broken := _broken_weight(named_weights(model)):
        raise CheckpointError(f"{model.name_or_path or 'the model'}: {broken}. {_COPY}")


_COPY = "Copy the checkpoint again, or train it again."


def _broken_weight(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    for name, weight in weights:
        if weight.is_floating_point() and (num := int((~weight.isfinite()).sum())):
            return f"{num:,} of {weight.numel():,} values of {name} are not finite"
    return ""


def stop_ids(model: TinyLlavaForConditionalGeneration) -> torch.Tensor:
    """Return the ids of the tokens that end an answer."""
    stops = model.generation_config.eos_token_id
    return torch.tensor(
        stops if isinstance(stops, list) else [] if stops is None else [stops], dtype=torch.long
    )


def warpers(options: Mapping[str, Any]) -> LogitsProcessorList:
    """Return what ``generate`` would do to logits before it samples with these options."""
    found = LogitsProcessorList()
    if options.get("temperature", 1.0) != 1.0:
        found.append(TemperatureLogitsWarper(options["temperature"]))
    if options.get("top_p", 1.0) < 1.0:
        found.append(TopPLogitsWarper(options["top_p"]))
    return found
