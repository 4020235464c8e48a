"""Grouped order: every sample once, the same for a seed, one modality in a batch, little padding."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllava.data.batches import GroupedSampler

samples = st.lists(st.tuples(st.integers(1, 500), st.booleans()), min_size=1, max_size=300)


def order(samples: list[tuple[int, bool]], batch_size: int, seed: int = 0, epoch: int = 0) -> list[int]:
    lengths, with_image = [length for length, _ in samples], [image for _, image in samples]
    sampler = GroupedSampler(lengths=lengths, with_image=with_image, batch_size=batch_size, seed=seed)
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


def test_batches_hold_similar_lengths_in_mixed_order():
    many = [((n * 7919) % 997 + 1, True) for n in range(640)]
    found = order(many, 16)
    batches = [[many[index][0] for index in found[start : start + 16]] for start in range(0, 640, 16)]
    padding = sum(max(batch) * 16 - sum(batch) for batch in batches)
    assert padding < 0.05 * sum(length for length, _ in many)  # at random it is about nine tenths
    longest = [max(batch) for batch in batches]
    assert longest != sorted(longest)


@pytest.mark.parametrize("group_by", ["length", "modality_length"])
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
