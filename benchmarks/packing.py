"""What packing can save in fine-tuning on data of the paper's composition: padding, without a model.

    python benchmarks/packing.py

Lengths are drawn like those of LLaVA-1.5-mix-665k in `records.py`, with 1.3 tokens a word. Steps, ranks and
micro-batches are those of the training itself.
"""

import json
import random

from records import SOURCES
from tinyllava.data.batches import GroupedSampler, PaddedBatches, pack

IMAGE_TOKENS, MAX_LENGTH, TOKENS_PER_WORD, NUM_RECORDS, BATCH = 576, 2048, 1.3, 20_000, 128


def draw_lengths(rng: random.Random) -> tuple[list[int], list[bool]]:
    """Return tokens of each record, and whether it has an image."""
    sources = rng.choices(list(SOURCES), [counts[0] for counts in SOURCES.values()], k=NUM_RECORDS)
    lengths = []
    for source in sources:
        _, num_pairs, *words = SOURCES[source]
        pairs = min(60, max(1, round(rng.expovariate(1 / num_pairs))))
        total = sum(max(1, rng.gauss(mean, mean / 3)) for mean in words for _ in range(pairs))
        lengths.append(min(MAX_LENGTH, round(TOKENS_PER_WORD * total) + IMAGE_TOKENS * bool(source)))
    return lengths, [bool(source) for source in sources]


def compare(size: int, num_ranks: int, group_by: str) -> dict[str, float]:
    """Return positions of padded and packed micro-batches over tokens, and the passes of a rank in a step."""
    lengths, with_image = draw_lengths(random.Random(0))
    order = GroupedSampler(
        lengths=lengths,
        with_image=with_image if group_by == "modality_length" else None,
        batch_size=BATCH,
        seed=0,
        shuffles_steps=group_by != "none",
    )
    padded = PaddedBatches(order, size, num_ranks)
    parts = [part for step in order.draw_steps(0) for part in padded.split(step)]
    rows = [len(part) * max(lengths[i] for i in part) for part in parts]
    waits = sum(max(rows[start : start + num_ranks]) * num_ranks for start in range(0, len(rows), num_ranks))
    packed = pack(order, lengths, size * max(lengths), num_ranks=num_ranks)
    splits = [packed.split(step) for step in order.draw_steps(0)]
    tokens = sum(lengths)
    together = sum(
        packed.size_of(split[start]) * num_ranks
        for split in splits
        for start in range(0, len(split), num_ranks)
    )
    return {
        "padded": round(sum(rows) / tokens, 3),
        "padded, slowest rank": round(waits / tokens, 3),
        "packed, slowest rank": round(together / tokens, 3),
        "passes padded": BATCH // size // num_ranks,
        "passes packed": packed.num_passes,
    }


if __name__ == "__main__":
    cases = [(2, 1), (4, 8), (16, 1), (16, 8)]
    found = {
        f"{group_by}, {size} samples, {ranks} ranks": compare(size, ranks, group_by)
        for group_by in ("none", "modality_length")
        for size, ranks in cases
    }
    print(json.dumps(found, indent=2))
