"""Tokens of every record, counted once by all cores and kept beside the converted records.

Paper: none. Lengths decide which records are too long, and the order of batches of similar length.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from tinyllava.conversation import Conversation
from tinyllava.data.store import StoredConversations
from tinyllava.files import whole_file

FORMAT = 1
_AT_ONCE = 512  # records that a process measures before it hands over their lengths
_FEW = 4 * _AT_ONCE  # records below which other processes would cost more than they save

Measure = Callable[[Conversation], tuple[int, int]]
"""Tokens of a conversation, and how many of them are supervised."""
_SHARED: dict[str, Any] = {}
"""What forked processes find in their copy of the memory: nothing is pickled."""


def measure_all(
    conversations: Sequence[Conversation],
    measure: Measure,
    key: str,
    progress: Callable[[int], None] = lambda n: None,
) -> NDArray[np.int32]:
    """Return [2, N]: tokens of each conversation, and supervised tokens.

    Of several processes with converted records one measures and the others wait for it.

    Args:
        key: names all but the conversations that decides the lengths.

    Raises:
        DataError: of ``measure``.
    """
    if not isinstance(conversations, StoredConversations):
        return _measure(conversations, measure, progress)
    whole = StoredConversations(conversations.files)  # a part of the records is measured with all of them
    name = hashlib.sha256(f"{FORMAT} {whole.key} {key}".encode()).hexdigest()[:24]
    path = conversations.files[0].folder / f"lengths-{name}.npy"
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            known: NDArray[np.int32] = np.load(path, allow_pickle=False)
            progress(len(conversations))
            return known[:, conversations.taken]
        found = _measure(whole, measure, progress)
        with whole_file(path) as partial, partial.open("wb") as file:
            np.save(file, found, allow_pickle=False)
    return found[:, conversations.taken]


def processor_key(processor: Any, *others: object) -> str:
    """Return a digest of what decides how text becomes tokens, and of other settings."""
    tokenizer = processor.tokenizer
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    pipeline |= {"padding": None, "truncation": None}  # what the last call asked of it
    told = [
        pipeline,
        tokenizer.special_tokens_map,
        processor.chat_template,
        processor.num_image_tokens,
        *others,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _measure(
    conversations: Sequence[Conversation], measure: Measure, progress: Callable[[int], None]
) -> NDArray[np.int32]:
    starts = range(0, len(conversations), _AT_ONCE)
    num_processes = min(_num_cores(), len(starts))
    parts = []
    _SHARED.update(conversations=conversations, measure=measure)
    try:
        if num_processes < 2 or len(conversations) < _FEW or "fork" not in _start_methods():
            for start in starts:
                parts.append(_measure_part(start))
                progress(parts[-1].shape[1])
        else:
            with multiprocessing.get_context("fork").Pool(num_processes, _use_one_core) as pool:
                for part in pool.imap(_measure_part, starts):
                    parts.append(part)
                    progress(part.shape[1])
    finally:
        _SHARED.clear()
    return np.concatenate(parts, axis=1) if parts else np.zeros((2, 0), dtype=np.int32)


def _start_methods() -> list[str]:
    return multiprocessing.get_all_start_methods()


def _num_cores() -> int:
    """Cores of this process, shared with the others of the same machine."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _use_one_core() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _measure_part(start: int) -> NDArray[np.int32]:
    conversations = _SHARED["conversations"][start : start + _AT_ONCE]
    lengths = [_SHARED["measure"](conversation) for conversation in conversations]
    return np.array(lengths, dtype=np.int32).reshape(-1, 2).T
