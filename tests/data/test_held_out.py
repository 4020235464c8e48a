"""Records are held out by their images: none is on both sides; order, names and folders change nothing."""

from pathlib import Path

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.data.held_out import hold_out
from tinyllava.errors import DataError


def records(images: list[list[int]], folder: str = "a") -> tuple[list[Conversation], dict[ImageRef, str]]:
    """A conversation for each list of images (by number), and the digest of each image."""
    made, hashes = [], {}
    for number, shown in enumerate(images):
        refs = tuple(ImageRef(path=Path(folder) / f"{number}-{image}.png") for image in shown)
        hashes |= {ref: f"digest of {image}" for ref, image in zip(refs, shown, strict=True)}
        text = "Why?" if number % 2 else f"What is {number}?"
        question, answer = (
            Message(role="user", text=text, images=refs),
            Message(role="assistant", text="That."),
        )
        made.append(Conversation(messages=(question, answer), id=str(number)))
    return made, hashes


shown = st.lists(st.lists(st.integers(0, 12), max_size=3, unique=True), min_size=2, max_size=40)


@given(images=shown, share=st.floats(0.01, 0.5), order=st.randoms())
def test_groups_stay_whole_and_the_choice_follows_from_the_contents(images, share, order):
    conversations, hashes = records(images)
    graph = networkx.Graph()
    for number, conversation in enumerate(conversations):
        keys = [hashes[ref] for ref in conversation.images] or [conversation.messages[0].text]
        graph.add_edges_from((number, key) for key in keys)
    groups = [{n for n in group if isinstance(n, int)} for group in networkx.connected_components(graph)]
    if len(groups) < 2:
        with pytest.raises(DataError, match=r"none can be held out\. Give a record file: --held-out FILE"):
            hold_out(conversations, hashes, share)
        return
    chosen = hold_out(conversations, hashes, share)
    assert chosen == sorted(chosen)
    assert all(group <= set(chosen) or not group & set(chosen) for group in groups)
    fits = [group for group in groups if len(group) <= max(1, round(share * len(images)))]
    assert 0 < len(chosen) <= (max(1, round(share * len(images))) if fits else min(map(len, groups)))

    shuffled = list(range(len(images)))
    order.shuffle(shuffled)
    moved, moved_hashes = records(images, "elsewhere")
    again = hold_out([moved[i] for i in shuffled], moved_hashes, share)
    assert {shuffled[i] for i in again} == set(chosen)


def test_ten_percent_of_records_that_share_nothing_is_exact_and_mostly_stays_when_records_are_added():
    conversations, hashes = records([[number] for number in range(200)])
    few = set(hold_out(conversations[:100], hashes, 0.1))
    more = set(hold_out(conversations, hashes, 0.1))
    assert (len(few), len(more)) == (10, 20)
    assert len({i for i in more if i < 100} & few) >= 7  # chosen by digest, not drawn anew
