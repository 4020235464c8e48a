"""Sharing prefixes changes no answer: against transformers' own generate, one conversation at a time."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AttentionInterface

from chats import TEMPLATES, make_chat
from tinyllava.conversation import Conversation, Message, ask
from tinyllava.inference.batches import fill_batches, group_by_image, prepare
from tinyllava.inference.chat import Chat, decode
from tinyllava.inference.shared_prefix import answer_groups, can_share, grow_tree

IMAGE = 7


def answer_shared(
    chat: Chat, conversations: list[Conversation], max_new_tokens: int, batch_tokens: int
) -> list[str]:
    groups = group_by_image(conversations, range(len(conversations)), max_group=5)
    answers = [""] * len(conversations)
    batches = fill_batches(prepare(chat.processor, conversations, groups, num_workers=0), batch_tokens)
    for batch in batches:
        ids = answer_groups(chat.model, [prepared.group for prepared in batch], max_new_tokens)
        for prepared, group_ids in zip(batch, ids, strict=True):
            for i, text in zip(prepared.indices, decode(chat.processor, group_ids), strict=True):
                answers[i] = text
    return answers


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> list[Conversation]:
    """3 images, 1 to 7 questions each, one twice, some text-only, one with turns, one with two."""
    folder, generator = tmp_path_factory.mktemp("images"), random.Random(0)
    words = ["What", "is", "in", "the", "image?", "dog", "A", "red", "circle", "and", "12", "squares"]
    asked: list[Conversation] = []
    paths: list[Path] = []
    for n, num_questions in enumerate((7, 1, 3)):
        paths.append(folder / f"{n}.png")
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(
            paths[-1]
        )
        for k in range(num_questions):
            text = "Is there a " + " ".join(generator.choices(words, k=1 + 2 * k))
            asked.append(ask(text, paths[-1]))
    asked += [asked[0], ask("Is there a dog?"), ask("Is there a"), ask("What?", paths[1], paths[0])]
    turns = (
        *asked[2].messages,
        Message(role="assistant", text="no"),
        Message(role="user", text="What is it?"),
    )
    asked.append(Conversation(messages=turns))
    generator.shuffle(asked)
    return asked


@pytest.mark.parametrize("kind", TEMPLATES)
def test_answers_are_those_of_one_at_a_time(tmp_path, conversations, kind):
    chat = make_chat(tmp_path, kind, "siglip" if kind in ("phi", "llama") else "clip")
    eos = chat.model.generation_config.eos_token_id
    # Random weights hardly ever end an answer: let every sixth token end it, so that rows end one by one.
    chat.model.generation_config.eos_token_id = [eos, *range(0, len(chat.processor.tokenizer), 6)]
    expected = [chat.answer([conversation], 16)[0] for conversation in conversations]
    lengths = {len(chat.processor.tokenizer(text).input_ids) for text in expected}
    assert len(set(expected)) >= len(expected) / 2, "the answers have to tell questions apart"
    assert len(lengths) >= 5, "the answers have to end at different steps"
    for batch_tokens in (1, 300, 10_000):
        assert answer_shared(chat, conversations, 16, batch_tokens) == expected
    chat.model.set_attn_implementation("eager")
    assert answer_shared(chat, conversations, 16, 10_000) == expected


def test_an_attention_that_takes_no_masks_is_replaced_for_as_long_as_it_takes(tmp_path, conversations):
    chat = make_chat(tmp_path, "llama")
    expected = answer_shared(chat, conversations, 4, 10_000)
    seen = []
    AttentionInterface.register("maskless", lambda *arguments, **options: seen.append(1))
    chat.model.language_model.set_attn_implementation("maskless")
    assert chat.model.language_model.config._attn_implementation == "maskless"
    assert answer_shared(chat, conversations, 4, 10_000) == expected
    assert seen == []
    assert chat.model.language_model.config._attn_implementation == "maskless"
    assert chat.model.model.vision_tower.config._attn_implementation == "sdpa"


def test_tree_holds_each_shared_token_once():
    image = [IMAGE] * 4
    prompts = [[1, *image, 5, 6], [1, *image, 5, 8, 9], [1, *image, 5, 8], [1, *image, 5, 6]]
    tree = grow_tree(prompts, IMAGE)
    assert tree.trunk.tolist() == [1, *image, 5]
    assert tree.tokens.tolist() == [6, 8, 9]
    assert tree.positions.tolist() == [6, 6, 7]
    assert tree.ends.tolist() == [0, 2, 1, 0]
    assert tree.sees.tolist() == [[True, False, False], [False, True, False], [False, True, True]]
    assert tree.image_slots.tolist() == [-1, 0, 1, 2, 3, -1, -1, -1, -1]


def test_tree_spells_every_prompt_and_every_image():
    generator = random.Random(1)
    for _ in range(50):
        image = [IMAGE] * generator.randrange(4)
        prompts = [
            [
                *generator.choices(range(3), k=generator.randrange(1, 5)),
                *image,
                *generator.choices(range(3), k=4),
            ]
            for _ in range(generator.randrange(1, 8))
        ]
        tree = grow_tree(prompts, IMAGE)
        slots = tree.image_slots[len(tree.trunk) :]
        for prompt, end in zip(prompts, tree.ends, strict=True):
            path = np.flatnonzero(tree.sees[end])
            assert [*tree.trunk, *tree.tokens[path]] == prompt
            assert [*range(len(tree.trunk)), *tree.positions[path]] == list(range(len(prompt)))
            seen = [*tree.image_slots[: len(tree.trunk)], *slots[path]]
            assert [s for s in seen if s >= 0] == list(range(len(image)))


def test_sliding_windows_are_not_shared(tmp_path):
    chat = make_chat(tmp_path, "llama")
    assert can_share(chat.model)
    chat.model.config.text_config.sliding_window = 16
    assert not can_share(chat.model)


def test_logits_agree_with_a_plain_forward(tmp_path, conversations):
    """The masks, to rounding: the first answer's logits of every prompt of a group."""
    chat = make_chat(tmp_path, "stablelm")
    seen: list[torch.Tensor] = []
    chat.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    asked = [c for c in conversations if c.images == conversations[0].images][:4]
    answer_shared(chat, asked, 1, 10_000)
    shared = seen.pop(0)
    seen.clear()
    for conversation in asked:
        chat.answer([conversation], 1)
    alone = torch.cat([logits[:, -1] for logits in seen])
    unique = torch.unique(alone.round(decimals=3), dim=0)
    assert len(shared) == len(unique)
    distances = torch.cdist(alone, shared).min(dim=1).values
    assert distances.max() < 1e-3
