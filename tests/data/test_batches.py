"""Order: every sample once, random steps of one modality, the same for a seed, equal work for the ranks."""

import statistics
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllava.data.batches import GroupedSampler, PackedBatches, PaddedBatches, pack

samples = st.lists(st.tuples(st.integers(1, 500), st.booleans()), min_size=1, max_size=300)


def order(
    samples: list[tuple[int, bool]], batch_size: int, seed: int = 0, epoch: int = 0, window: int = 1
) -> list[int]:
    lengths, with_image = [length for length, _ in samples], [image for _, image in samples]
    sampler = GroupedSampler(
        lengths=lengths, with_image=with_image, batch_size=batch_size, seed=seed, window=window
    )
    sampler.set_epoch(epoch)
    assert len(sampler) == len(samples)
    return list(sampler)


@given(samples=samples, batch_size=st.integers(1, 16), seed=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_every_sample_once_and_full_batches_of_one_modality(samples, batch_size, seed):
    found = order(samples, batch_size, seed)
    assert sorted(found) == list(range(len(samples)))
    num_images = sum(image for _, image in samples)
    num_pure = num_images // batch_size + (len(samples) - num_images) // batch_size
    for number in range(num_pure):
        batch = found[number * batch_size : (number + 1) * batch_size]
        assert len({samples[index][1] for index in batch}) == 1


def test_the_order_follows_from_seed_and_epoch():
    many = [(n % 37 + 1, n % 3 == 0) for n in range(200)]
    assert order(many, 8, seed=1) == order(many, 8, seed=1)
    others = [order(many, 8, seed=2), order(many, 8, seed=1, epoch=1)]
    assert all(other != order(many, 8, seed=1) for other in others)


def draw_padded(
    lengths: list[int], batch_size: int, ranks: int, micro: int, **settings
) -> list[list[list[int]]]:
    """Return each rank's micro-batches."""
    order = GroupedSampler(lengths=lengths, with_image=None, batch_size=batch_size, seed=0)
    own = [PaddedBatches(order, micro, ranks, rank, **settings) for rank in range(ranks)]
    drawn = [list(batches) for batches in own]
    assert len({len(batches) for batches in own} | {len(parts) for parts in drawn}) == 1  # nobody waits
    return drawn


@given(
    samples=samples,
    lengths=st.randoms(),
    passes=st.integers(1, 4),
    ranks=st.integers(1, 3),
    micro=st.integers(1, 3),
)
@settings(max_examples=50, deadline=None)
def test_which_samples_a_step_has_depends_on_no_length_rank_or_micro_batch(
    samples, lengths, passes, ranks, micro
):
    """So they are a random part of the whole set, as published code draws them; each comes once."""
    size = passes * ranks * micro
    plain = GroupedSampler(lengths=[1] * len(samples), with_image=None, batch_size=size, seed=0)
    drawn = draw_padded([lengths.randint(1, 500) for _ in samples], size, ranks, micro)
    for number, step in enumerate(plain.draw_steps(0)):
        mine = [parts[number * passes : (number + 1) * passes] for parts in drawn]
        assert sorted(index for parts in mine for part in parts for index in part) == sorted(step)
        counts = {len(part) for parts in mine for part in parts}
        assert max(counts) <= micro
        assert max(counts) - min(counts) <= 1


def test_a_mean_of_means_has_micro_batches_of_one_size_and_none_that_is_empty():
    lengths = list(range(1, 12))
    [alone] = draw_padded(lengths, 8, 1, 2, is_fixed=True)
    assert [len(part) for part in alone] == [2, 2, 2, 2, 2, 1]  # 8 samples, and 3
    first, second = draw_padded(lengths, 8, 2, 2, is_fixed=True)
    assert sorted(map(sorted, first + second)) == sorted(map(sorted, alone))
    first, second = draw_padded(lengths, 10, 2, 5, is_fixed=True)  # 10, and 1
    assert first[-1] == second[-1] == [first[-1][0]]


def test_ranks_get_equal_work_and_micro_batches_similar_lengths():
    ranks, micro, size = 4, 4, 64
    many = [(n * 7919) % 997 + 1 for n in range(640)]
    drawn = draw_padded(many, size, ranks, micro)
    for start in range(0, 40, 4):
        own = [[[many[index] for index in part] for part in parts[start : start + 4]] for parts in drawn]
        work = [sum(map(sum, parts)) for parts in own]
        assert max(work) - min(work) < 0.03 * sum(work)
        padding = sum(max(part) * micro - sum(part) for parts in own for part in parts)
        assert padding < 0.08 * sum(work)  # unsorted it is more than half
        assert own[0][0][0] == max(map(max, chain(*own)))  # what runs out of memory does so at once


@pytest.mark.parametrize(("window", "low", "high"), [(1, 0.8, 1.2), (50, 0.0, 0.1)])
def test_a_step_has_the_spread_of_lengths_of_the_whole_set_or_hardly_any(window, low, high):
    many = [((n * 7919) % 997 + 1, True) for n in range(6400)]
    found = order(many, 64, window=window)
    whole = statistics.pstdev(length for length, _ in many)
    spread = [statistics.pstdev(many[i][0] for i in found[s : s + 64]) / whole for s in range(0, 6400, 64)]
    assert low < statistics.mean(spread) < high


@pytest.mark.parametrize("group_by", ["length", "modality_length", "length_windows"])
def test_the_trainer_draws_in_this_order_anew_in_each_epoch(parts, records, tmp_path, monkeypatch, group_by):
    import dataclasses

    from tinyllava.data.dataset import Examples
    from tinyllava.training.run import train
    from training_toys import toy_run

    drawn: list[int] = []
    original = Examples.__getitem__
    monkeypatch.setattr(Examples, "__getitem__", lambda self, i: (drawn.append(i), original(self, i))[1])
    run = toy_run(parts, records, tmp_path / "run")
    stage = dataclasses.replace(run.stages["finetune"], group_by=group_by, num_epochs=2)
    train(dataclasses.replace(run, stages={"finetune": stage}))
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12))
    assert drawn[:12] != drawn[12:]
    if group_by == "modality_length":
        kinds = [index % 4 == 3 for index in drawn]  # every fourth record has no image
        for epoch in (kinds[:12], kinds[12:]):
            assert [len(set(epoch[start : start + 4])) for start in (0, 4)] == [1, 1]


@given(
    samples=samples,
    batch_size=st.integers(1, 12),
    ranks=st.integers(1, 3),
    longest=st.integers(1, 4),
    epoch=st.integers(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_packed_micro_batches_have_the_steps_of_padded_ones_within_the_budget(
    samples, batch_size, ranks, longest, epoch
):
    lengths, size = [length for length, _ in samples], batch_size * ranks
    order = GroupedSampler(lengths=lengths, with_image=None, batch_size=size, seed=3)
    budget = longest * max(lengths)
    own = [pack(order, lengths, budget, num_epochs=2, num_ranks=ranks, rank=rank) for rank in range(ranks)]
    passes = own[0].num_passes
    drawn = []
    for packed in own:
        packed.set_epoch(epoch)
        drawn.append(list(packed))
    assert len({len(packed) for packed in own} | {len(parts) for parts in drawn}) == 1  # nobody waits
    assert all(
        packed.size_of(part) <= budget for packed, parts in zip(own, drawn, strict=True) for part in parts
    )
    for number, step in enumerate(order.draw_steps(epoch)):
        mine = [parts[number * passes : (number + 1) * passes] for parts in drawn]
        found = [index for parts in mine for part in parts for index in part]
        assert sorted(found) == sorted(step)  # every sample once
        assert len(step) < ranks * passes or all(part for parts in mine for part in parts)
    if passes > 1:  # one less would not do
        assert not PackedBatches(order, lengths, passes - 1, ranks, num_epochs=2).fits(budget)


def test_packing_needs_fewer_micro_batches_and_gives_ranks_the_same_work():
    lengths = [((n * 7919) % 1900) + 100 for n in range(1024)]
    order = GroupedSampler(lengths=lengths, with_image=None, batch_size=128, seed=0)
    own = [pack(order, lengths, 4 * 2000, num_ranks=4, rank=rank) for rank in range(4)]
    assert own[0].num_passes == 5  # 8 of 4 samples, padded
    for number in range(8):
        passes = [list(packed)[number * 5 : number * 5 + 5] for packed in own]
        work = [
            sum(packed.size_of(part) for part in parts) for packed, parts in zip(own, passes, strict=True)
        ]
        assert max(work) < 1.02 * min(work)
        sizes = [own[0].size_of(part) for parts in passes for part in parts]
        assert max(sizes) < 1.1 * min(sizes)
        assert own[0].size_of(passes[0][0]) == max(sizes)  # what runs out of memory does so at once
