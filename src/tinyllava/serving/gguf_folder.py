"""What the server reads of a GGUF export: its settings, and how images are prepared for it.

Paper: none.
"""

import io
from pathlib import Path
from typing import Any

import gguf
from PIL import Image

from tinyllava.conversation import Conversation, ImageRef
from tinyllava.data.images import open_image
from tinyllava.errors import CheckpointError
from tinyllava.files import data_url
from tinyllava.model.processing import IMAGE_RULES, pad_to_square, scale_down

MODEL, MMPROJ = "model.gguf", "mmproj.gguf"


class PreparedImages:
    """Images as the model was trained on them, at the encoder's size.

    Args:
        folder: with ``mmproj.gguf``.

    Raises:
        CheckpointError: the file is missing, or does not say how images are prepared.
    """

    def __init__(self, folder: Path) -> None:
        fields = read_fields(folder / MMPROJ)
        prepared = fields.get(IMAGE_RULES)
        if prepared is None:
            raise CheckpointError(
                f"{folder / MMPROJ}: does not say how images are prepared ({IMAGE_RULES}); write it "
                "again with `tinyllava export MODEL OUT --format gguf`."
            )
        aspect, transparency, resample = str(prepared).split()
        if aspect == "crop":
            raise CheckpointError(
                f"{folder / MMPROJ}: images are cropped to their centre, which only our own engine "
                "does. Serve the checkpoint that it was exported from."
            )
        self.is_padded, self.resample = aspect == "pad", Image.Resampling(int(resample))
        self.side = int(fields["clip.vision.image_size"])
        self.colour = tuple(int(channel * 255) for channel in fields["clip.vision.image_mean"])
        self.background = self.colour if transparency == "blend" else None

    def prepare(self, ref: ImageRef) -> Image.Image:
        """Return an image [side, side] as the encoder sees it.

        Raises:
            ImageError: it is broken.
        """
        image = scale_down(open_image(ref, self.background), self.resample)
        if self.is_padded:
            image = pad_to_square(image, self.colour)
        return image.resize((self.side, self.side), self.resample)

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """Return the turns as llama.cpp reads them, images before the text of their message."""
        return [
            {
                "role": message.role,
                "content": [
                    *({"type": "image_url", "image_url": {"url": self._url(ref)}} for ref in message.images),
                    {"type": "text", "text": message.text},
                ],
            }
            for message in conversation.messages
        ]

    def _url(self, ref: ImageRef) -> str:
        buffer = io.BytesIO()
        self.prepare(ref).save(buffer, "PNG", compress_level=1)
        return data_url(buffer.getvalue(), "image/png")


def read_fields(file: Path) -> dict[str, Any]:
    """Return the settings of a GGUF file, the long lists of its tokenizer left out.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not file.is_file():
        raise CheckpointError(
            f"{file}: missing. --engine llama.cpp serves a folder that `tinyllava export MODEL OUT "
            "--format gguf` has written; without --engine a checkpoint is served as it is."
        )
    try:
        fields = gguf.GGUFReader(file).fields
    except Exception as error:  # the reader documents none, and fails somewhere in numpy
        raise CheckpointError(f"{file}: not a GGUF file, or damaged ({error}). Export it again.") from error
    return {name: field.contents() for name, field in fields.items() if not name.startswith("tokenizer.")}


def read_context(file: Path) -> int:
    """Return the tokens of a model's context."""
    fields = read_fields(file)
    return int(fields[f"{fields['general.architecture']}.context_length"])
