"""Write conversations as LLaVA's JSON, as ``messages`` or as Parquet; read back, they are the same.

Paper: none.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.data.images import read_image_bytes
from tinyllava.data.readers.form import IMAGE_MARK
from tinyllava.errors import ConfigError, DataError, OutputError, look_up
from tinyllava.files import whole_file, write_text

_ROWS_AT_ONCE = 256
_PNG = b"\x89PNG"
_FROM = {"user": "human", "assistant": "gpt", "system": "system"}


def write_records(
    conversations: Sequence[Conversation],
    path: Path,
    form: str = "",
    fields: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write conversations to a file.

    Args:
        overwrite: replace a file of this name, and images in the folder beside it.
        fields: more fields of the records, by file and place in it (not for Parquet).
        path: ``.json``, ``.jsonl`` or ``.parquet``. Image paths become relative to its folder where they are
            below it; images that are bytes are written into a folder beside it (not for Parquet, which holds
            the bytes of all images).
        form: ``llava`` or ``messages``; LLaVA's for JSON and ``messages`` for Parquet if empty.

    Raises:
        ConfigError: another kind of file or form.
        DataError: a text spells ``<image>``, which would be read as an image.
        OutputError: see ``check_free``.
    """
    check_free(path, conversations, overwrite=overwrite)
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        raise ConfigError(f"{path}: choose a name that ends with .json, .jsonl or .parquet.")
    is_parquet = path.suffix == ".parquet"
    to_record = look_up(_FORMS, form or ("messages" if is_parquet else "llava"), "form")
    if is_parquet:
        _write_parquet(conversations, path, to_record)
        return
    place = _Beside(path)
    more = fields or {}
    records = (
        {**more.get((talk.source, talk.at), {}), **to_record(talk, place.name_of)} for talk in conversations
    )
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    is_array = path.suffix == ".json"
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n" if is_array else "\n".join(lines) + "\n")


def check_free(path: Path, conversations: Sequence[Conversation] = (), *, overwrite: bool) -> None:
    """Say before anything is written that it would replace what is there.

    Args:
        conversations: their images that are bytes need a folder of their own.

    Raises:
        OutputError: the file exists, or the folder of its images has files.
    """
    images = _Beside(path).images
    in_the_way = path if path.exists() else None
    if path.suffix != ".parquet" and images.is_dir() and any(images.iterdir()):
        has_bytes = any(ref.data is not None for talk in conversations for ref in talk.images)
        in_the_way = images if has_bytes else in_the_way
    if in_the_way and not overwrite:
        raise OutputError(f"{in_the_way}: exists already. Move it, or give --overwrite to replace it.")


ImageName = Callable[[ImageRef], Any]
"""How a record names an image."""


def _to_llava(conversation: Conversation, name_of: ImageName) -> dict[str, Any]:
    names = [name_of(ref) for ref in conversation.images]
    turns = [
        {"from": _FROM[message.role], "value": _marked(message, conversation.place), **_loss(message)}
        for message in conversation.messages
    ]
    record: dict[str, Any] = {"id": conversation.id} if conversation.id else {}
    if names:
        record["image"] = names[0] if len(names) == 1 else names
    return {**record, "conversations": turns}


def _to_messages(conversation: Conversation, name_of: ImageName) -> dict[str, Any]:
    names = [name_of(ref) for ref in conversation.images]
    turns = [
        {"role": message.role, "content": _marked(message, conversation.place), **_loss(message)}
        for message in conversation.messages
    ]
    record: dict[str, Any] = {"id": conversation.id} if conversation.id else {}
    return {**record, "messages": turns, "images": names}


_FORMS: dict[str, Callable[[Conversation, ImageName], dict[str, Any]]] = {
    "llava": _to_llava,
    "messages": _to_messages,
}


def _loss(message: Message) -> dict[str, bool]:
    return {} if message.is_trained else {"loss": False}


def _marked(message: Message, place: str) -> str:
    if IMAGE_MARK in message.text:
        raise DataError(
            f"{place}: a text contains {IMAGE_MARK}, which would be read as an image mark. Rewrite it."
        )
    if message.places:
        return message.marked(IMAGE_MARK)
    return f"{IMAGE_MARK}\n" * len(message.images) + message.text


class _Beside:
    """Names images relative to the folder of a file. Images in bytes are first written next to the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent.resolve()
        self.images = path.with_name(f"{path.stem}-images")
        self.num_written = 0

    def name_of(self, ref: ImageRef) -> str:
        if ref.path is not None:
            path = Path(os.path.abspath(ref.path))  # noqa: PTH100 (a link keeps its name)
            return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)
        data = read_image_bytes(ref)
        if not self.num_written:
            self.path.unlink(missing_ok=True)  # it names images that are replaced from here on
        self.images.mkdir(parents=True, exist_ok=True)
        name = f"{self.num_written:06}{'.png' if data.startswith(_PNG) else '.jpg'}"
        self.num_written += 1
        with whole_file(self.images / name) as partial:
            partial.write_bytes(data)
        return f"{self.images.name}/{name}"


def _write_parquet(
    conversations: Sequence[Conversation],
    path: Path,
    to_record: Callable[[Conversation, ImageName], dict[str, Any]],
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def cell(ref: ImageRef) -> dict[str, Any]:
        return {"bytes": read_image_bytes(ref), "path": Path(ref.name or str(ref.path)).name}

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    is_llava = to_record is _to_llava
    names = ("from", "value") if is_llava else ("role", "content")
    fields: list[Any] = [(name, pa.string()) for name in names]
    if not all(message.is_trained for one in conversations for message in one.messages):
        fields.append(("loss", pa.bool_()))
    turns = pa.list_(pa.struct(fields))
    key = "conversations" if is_llava else "messages"
    schema = pa.schema([("id", pa.string()), (key, turns), ("images", pa.list_(image))])
    with whole_file(path) as partial, parquet.ParquetWriter(partial, schema) as writer:
        for start in range(0, len(conversations), _ROWS_AT_ONCE):
            rows = []
            for conversation in conversations[start : start + _ROWS_AT_ONCE]:
                record = to_record(conversation, cell)
                shown = record.pop("image", record.get("images", []))
                record["images"] = shown if isinstance(shown, list) else [shown]
                rows.append(record)
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
