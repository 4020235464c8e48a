"""The page of a stage's held-out records: the curve of their loss, and a sample's answers with images.

Paper: none.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import Template

from tinyllava.conversation import Conversation, ImageRef
from tinyllava.data.images import open_image
from tinyllava.files import data_url, whole_objects, write_text

ANSWERS = "held-out.jsonl"
PAGE = "held-out.html"
_THUMBNAIL_PX = 320
Curve = list[tuple[int, float]]
"""(step, mean loss over the held-out records' supervised tokens), in order of the steps."""


def open_question(conversation: Conversation) -> Conversation:
    """Return a conversation up to its first answer, which is to be given."""
    messages = conversation.messages
    end = next((i for i, message in enumerate(messages) if message.role == "assistant"), len(messages))
    return replace(conversation, messages=messages[:end])


def write_page(folder: Path, sample: Sequence[Conversation], curve: Curve) -> None:
    """Write the page of the sample's answers so far, with images inside."""
    given: dict[str, list[tuple[int, str]]] = {}
    for line in whole_objects(folder / ANSWERS):
        given.setdefault(line["record"], []).append((line["step"], line["answer"]))
    records = []
    for one in sample:
        asked = open_question(one).messages
        expected = one.messages[len(asked)].text if len(asked) < len(one.messages) else ""
        records.append(
            {
                "images": [_thumbnail(ref) for ref in open_question(one).images],
                "question": asked[-1].text,
                "expected": expected.strip(),
                "answers": given.get(one.place, []),
                "place": one.place,
            }
        )
    losses, last = [loss for _, loss in curve], max([step for step, _ in curve], default=0) or 1
    low, high = min(losses, default=0.0), max(losses, default=1.0)
    points = " ".join(
        f"{50 + 580 * step / last:.1f},{190 - 180 * (loss - low) / ((high - low) or 1):.1f}"
        for step, loss in curve
    )
    template = Path(__file__).with_name("held_out.html").read_text(encoding="utf-8")
    values = {"records": records, "curve": curve, "points": points, "low": low, "high": high}
    page = Template(template, autoescape=True).render(values)
    write_text(folder / PAGE, page)


def _thumbnail(ref: ImageRef) -> str:
    image = open_image(ref)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return data_url(buffer.getvalue(), "image/jpeg")
