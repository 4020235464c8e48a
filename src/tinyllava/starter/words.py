"""Initialise the connector from words: each image token is fitted to the embedding of a word of the caption.

Paper: none; a step before pre-training (equation 1), whose connector would start at random. It reads only the
language model's embedding table, so it takes seconds. A question's word is easier to find among image tokens
that are words than among tokens that merely make the language model say the word
(docs/decisions/0018-starter-tokens-start-as-words.md).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinyllava.config import ModelConfig
from tinyllava.conversation import Conversation
from tinyllava.data.cores import map_parts
from tinyllava.data.features import FeatureCache
from tinyllava.model.assemble import assemble
from tinyllava.model.connectors.per_patch import Slots
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.parts.folders import written_whole

BATCH_SIZE = 128
NUM_STEPS = 900
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1.0
_AT_MOST = 4
"""Fits at the same time: each holds a language model."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model whose connector is to be fitted to words."""

    config: ModelConfig
    """The parts; its connector gives every image the same number of tokens."""
    captions: Sequence[Conversation]
    """Conversations of one question about one image, whose answer is the caption."""
    folder: Path
    """Where the checkpoint goes."""
    features: Path
    """Where features of the encoder are kept."""
    seed: int


def make_starts(starts: Sequence[Start]) -> None:
    """Make those that are not there yet, each on one core, so that two cores take half the time."""
    missing = {start.folder: start for start in starts if not start.folder.is_dir()}
    for _ in map_parts(_make_on_one_core, list(missing.values()), _AT_MOST):
        pass


def _make_on_one_core(start: Start) -> Path:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return make_start(start)
    finally:
        torch.set_num_threads(num_threads)


def make_start(start: Start) -> Path:
    """Assemble a model, fit its connector to the captions, save it and return its folder.

    An existing folder is complete.
    """
    if not start.folder.is_dir():
        torch.manual_seed(start.seed)
        model, processor = assemble(start.config)
        fit_words(model, processor, start.captions, start.features, start.seed)
        with written_whole(start.folder) as partial:
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
    return start.folder


def start_key(config: ModelConfig, captions: Sequence[Conversation], seed: int) -> str:
    """Return a digest of everything that determines the fit: connector, captions, seed and this file."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(repr((config, seed, [(talk.images[0].name, _caption(talk)) for talk in captions])).encode())
    return digest.hexdigest()[:8]


def fit_words(
    model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor,
    captions: Sequence[Conversation], features: Path, seed: int,
) -> None:  # fmt: skip
    """Move the connector's t-th image token to the embedding of the caption's t-th word token, by AdamW.

    The loss is the squared distance, so where the encoder cannot tell two words apart the token is between
    them. Image tokens after the last word are not fitted. Data sets are drawn equally often.
    """
    cache = FeatureCache(features, model, processor)
    cache.fill(captions)
    rows = torch.stack([_seen(model, cache.read(talk.images[0])) for talk in captions])
    words = [word_ids(processor, _caption(talk))[: processor.num_image_tokens] for talk in captions]
    targets = torch.tensor([ids + [-1] * (processor.num_image_tokens - len(ids)) for ids in words])
    embeddings = model.get_input_embeddings().weight.detach()
    sources = [talk.images[0].name.partition("/")[0] for talk in captions]
    weights = torch.tensor([1 / sources.count(source) for source in sources])
    optimizer = torch.optim.AdamW(model.connector.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    model.connector.requires_grad_(True).train()
    generator = torch.Generator().manual_seed(seed)
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
        drawn = torch.multinomial(weights, BATCH_SIZE, replacement=True, generator=generator)
        loss = _distance(model.connector(rows[drawn]), targets[drawn], embeddings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.connector.requires_grad_(False).eval()


def _seen(model: TinyLlavaForConditionalGeneration, features: Tensor) -> Tensor:
    """Return what the connector makes of features [M, X]: their mean [1, X] where it begins with that."""
    return features.mean(0, keepdim=True) if isinstance(model.connector, Slots) else features


def _distance(tokens: Tensor, targets: Tensor, embeddings: Tensor) -> Tensor:
    """Return the mean squared distance of image tokens [B, T, D] to words [B, T], in units of the table's."""
    is_word = targets >= 0
    wanted = embeddings[targets.clamp(min=0)]
    return ((tokens - wanted) / embeddings.std()).square().mean(-1)[is_word].mean()


def word_ids(processor: TinyLlavaProcessor, caption: str) -> list[int]:
    """Return the tokens of a caption without its article and commas: red, triangle of "a red triangle"."""
    words = caption.partition(" ")[2].replace(",", "")
    ids: list[int] = processor.tokenizer(f" {words}", add_special_tokens=False)["input_ids"]
    return ids


def _caption(talk: Conversation) -> str:
    return talk.messages[-1].text
