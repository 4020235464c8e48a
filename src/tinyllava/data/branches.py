"""The questions about one image as branches of one row: the image is read once, no question sees another.

Paper: none; section 3.2 trains a conversation turn behind turn, where later answers can be copied from
earlier ones instead of being learned from the image.
"""

from dataclasses import replace
from itertools import takewhile

from tinyllava.conversation import Conversation
from tinyllava.errors import DataError
from tinyllava.model.processing import Encoded, TinyLlavaProcessor

PADDING = -1
"""Branch of the padding behind a row: nothing that counts sees it."""


def split_questions(conversation: Conversation) -> list[Conversation]:
    """Return one conversation for each question, with the system text and the images of the first.

    Raises:
        DataError: a later question has images of its own.
    """
    system = tuple(takewhile(lambda message: message.role == "system", conversation.messages))
    turns = conversation.messages[len(system) :]
    starts = [i for i, message in enumerate(turns) if message.role == "user"]
    if any(turns[i].images for i in starts[1:]):
        raise DataError(
            f"{conversation.place}: a later question has its own images and "
            "cannot be separated. Put all images into the first question, or set separate_questions to false."
        )
    parts = []
    for start, end in zip(starts, [*starts[1:], len(turns)], strict=True):
        first = turns[starts[0]]
        question = turns[start] if start == starts[0] else replace(turns[start], images=first.images)
        parts.append(replace(conversation, messages=(*system, question, *turns[start + 1 : end])))
    return parts


def encode_branches(
    processor: TinyLlavaProcessor, conversation: Conversation, template: str | None = None
) -> Encoded:
    """Tokenise a conversation with its questions as branches behind what their texts share.

    The shared beginning ends before the first supervised token of any branch: the token that predicts a
    supervised one is always of the same branch.

    Raises:
        DataError: see ``split_questions`` and ``TinyLlavaProcessor.encode``; or the template puts an answer
            straight behind the image.
    """
    asked = [one for one in split_questions(conversation) if one.messages[-1].is_trained]
    parts = [processor.encode(part, template=template) for part in asked]  # nobody sees the others
    if len(parts) < 2:
        return parts[0]
    num_shared = _num_shared(parts)
    shared, image = parts[0].input_ids[:num_shared], processor.image_token_id
    if shared.count(image) != parts[0].input_ids.count(image):
        raise DataError(
            f"{conversation.place}: the template puts the answer directly after "
            "the image, so the questions cannot be separated. Set separate_questions to false."
        )
    input_ids, supervised, branches = list(shared), [False] * num_shared, [0] * num_shared
    for number, part in enumerate(parts, start=1):
        end = len(part.supervised) - part.supervised[::-1].index(True)  # no loss depends on what follows
        input_ids += part.input_ids[num_shared:end]
        supervised += part.supervised[num_shared:end]
        branches += [number] * (end - num_shared)
    text = "".join(part.text for part in parts)
    return Encoded(text=text, input_ids=input_ids, supervised=supervised, branches=branches)


def _num_shared(parts: list[Encoded]) -> int:
    """Count the tokens that all parts begin with, up to one before the first supervised token."""
    most = min(part.supervised.index(True) for part in parts) - 1
    columns = zip(*(part.input_ids for part in parts), strict=False)
    return min(most, sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns)))
