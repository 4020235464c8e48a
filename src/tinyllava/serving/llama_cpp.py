"""Serve a GGUF export with llama.cpp: read the folder, and start the engine.

Paper: none. Differs: images are prepared here as in training and sent at the encoder's size, because
llama.cpp resizes first and then pads. The model card in the folder has the measured agreement.
"""

import asyncio
import io
import re
import secrets
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import torch
from PIL import Image

from tinyllava.conversation import Conversation, ImageRef
from tinyllava.data.images import open_image
from tinyllava.errors import CheckpointError, DataError, TinyLlavaError
from tinyllava.files import data_url
from tinyllava.inference.chat import Strip
from tinyllava.model.processing import IMAGE_RULES, pad_to_square, scale_down
from tinyllava.serving.queue import End
from tinyllava.serving.schema import Question

_DEFAULT_TOKENS = 32_768
_Event = str | End | BaseException


class LlamaCppEngine:
    """Answers questions with llama.cpp, several at once.

    Args:
        folder: with ``model.gguf`` and ``mmproj.gguf``.
        cache_tokens: of all slots together; a slot holds one conversation of the model's whole context, and
            keeps it until another one needs the slot. 0 means 32,768, or one context.
        max_running: most slots.

    Raises:
        CheckpointError: a file is missing or was not written by this package, or llama.cpp does not open it.
    """

    def __init__(self, folder: Path, *, cache_tokens: int = 0, max_running: int = 32) -> None:
        self.images = PreparedImages(folder)
        fields = read_fields(folder / MODEL)
        self.context_tokens = int(fields[f"{fields['general.architecture']}.context_length"])
        has_32_bits = fields.get("general.file_type") == gguf.LlamaFileType.ALL_F32
        self._special = read_special(folder / MODEL)
        tokens = cache_tokens or max(_DEFAULT_TOKENS, self.context_tokens)
        num_slots = max(1, min(max_running, tokens // self.context_tokens))
        self._server = _start(folder, num_slots, self.context_tokens, has_32_bits=has_32_bits)
        self._pool = ThreadPoolExecutor(num_slots, thread_name_prefix="llama.cpp")
        self._preparing = ThreadPoolExecutor(
            2, thread_name_prefix="prepare"
        )  # a large image takes much memory
        self._running: set[threading.Event] = set()

    def counts(self) -> dict[str, int]:
        """Return numbers for the metrics."""
        return {"running": len(self._running)}

    async def answer(self, question: Question) -> AsyncGenerator[str | End, None]:
        """Yield the pieces of an answer as they come, and its end; closing it stops the model.

        Raises:
            DataError: an image is broken, the conversation does not fit the context, or somebody wrote a
                special token, which llama.cpp would take for the template's own.
            CheckpointError: llama.cpp fails.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[_Event] = asyncio.Queue()
        stopped = threading.Event()
        try:
            request = await loop.run_in_executor(self._preparing, self._request, question, stopped)
        except asyncio.CancelledError:
            stopped.set()
            raise

        def tell(event: _Event) -> None:
            if not stopped.is_set():
                loop.call_soon_threadsafe(events.put_nowait, event)

        def run() -> None:
            self._running.add(stopped)
            try:
                if not stopped.is_set():
                    reader = _Reader(tell, stopped)
                    self._server.handle_chat_completions(request, reader.read)
                    tell(reader.end())
            except Exception as error:  # noqa: BLE001 (the reader raises it)
                tell(error)
            finally:
                self._running.discard(stopped)

        running = self._pool.submit(run)
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, End):
                    return
        finally:
            stopped.set()
            running.cancel()

    def _request(self, question: Question, stopped: threading.Event) -> dict[str, Any]:
        for message in question.conversation.messages:
            if found := self._special.search(message.text):
                raise DataError(
                    f"a message contains {found[0]!r}, which llama.cpp reads as a special token. Write it in "
                    "another way, or serve the checkpoint without --engine, which reads it as text."
                )
        sampling = {"temperature": 0.0, **question.options}
        return {
            "messages": self.images.messages(question.conversation, lambda: not stopped.is_set()),
            "max_tokens": question.max_new_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "stop": list(question.stops),
            # What llama.cpp would do besides: the likeliest 40 only, none below 5% of the likeliest.
            "samplers": ["temperature", "top_p"],
            **sampling,
            # Its last one means a seed of its own choice.
            **({} if question.seed is None else {"seed": question.seed % (2**32 - 1)}),
        }

    def close(self) -> None:
        """Stop all answers, because nothing reads them any more."""
        for stopped in tuple(self._running):
            stopped.set()
        for pool in (self._preparing, self._pool):
            pool.shutdown(wait=True, cancel_futures=True)
        self._server = None


class _Reader:
    """Reads the chunks of one answer; llama.cpp calls it in the thread of the request."""

    def __init__(self, tell: Any, stopped: threading.Event) -> None:
        self.tell, self.stopped = tell, stopped
        self._strip, self._reason = Strip(), ""
        self._usage: dict[str, int] = {}
        self._error: TinyLlavaError | None = None

    def read(self, chunk: dict[str, Any]) -> bool:
        """Pass a chunk on; true stops llama.cpp."""
        if error := chunk.get("error"):
            text = str(error.get("message", error))
            is_long = error.get("type") == "exceed_context_size_error"
            self._error = DataError(f"{text}. Shorten it.") if is_long else CheckpointError(text)
            return True
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices", ()):
            self._reason = choice.get("finish_reason") or self._reason
            if text := self._strip.feed(choice.get("delta", {}).get("content") or ""):
                self.tell(text)
        return self.stopped.is_set()

    def end(self) -> End:
        """Return how the answer ended.

        Raises:
            TinyLlavaError: it did not.
        """
        if self._error is None and not self._usage and not self.stopped.is_set():
            self._error = CheckpointError("llama.cpp gave no answer. See its log.")
        if self._error is not None:
            raise self._error
        return End(
            reason="length" if self._reason == "length" else "stop",
            num_prompt_tokens=self._usage.get("prompt_tokens", 0),
            num_answer_tokens=self._usage.get("completion_tokens", 0),
        )


def _start(folder: Path, num_slots: int, context_tokens: int, *, has_32_bits: bool) -> Any:
    """Open both files in llama.cpp.

    Args:
        has_32_bits: the weights have; then keys and values have too, as the export was compared. Otherwise
            they have 16, which changes less than the rounding of weights does, and is up to a tenth faster.

    Raises:
        CheckpointError: it refuses them.
    """
    import xllamacpp as llama

    settings = llama.CommonParams()
    settings.model.path, settings.mmproj.path = str(folder / MODEL), str(folder / MMPROJ)
    settings.n_parallel, settings.n_ctx = num_slots, num_slots * context_tokens
    # By itself it takes one for each core of the machine, whatever this process may use.
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    kinds = llama.ggml_type
    held = kinds.GGML_TYPE_F32 if has_32_bits else kinds.GGML_TYPE_F16
    settings.cache_type_k = settings.cache_type_v = held
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.use_jinja = True
    settings.warmup = settings.fit_params = settings.ui = settings.kv_unified = False
    settings.verbosity = 0
    settings.api_keys = [secrets.token_hex(32)]  # for the port on which it listens besides
    try:
        return llama.Server(settings)
    except Exception as error:  # a RuntimeError today; none is documented
        raise CheckpointError(
            f"{folder}: llama.cpp cannot open the model ({error}). Export it again."
        ) from error


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
                f"{folder / MMPROJ}: does not record how images are prepared ({IMAGE_RULES}). Export it "
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

    def messages(
        self, conversation: Conversation, is_wanted: Callable[[], bool] = lambda: True
    ) -> list[dict[str, Any]]:
        """Return the turns as llama.cpp reads them, images before the text of their message.

        Args:
            is_wanted: asked before each image is opened.

        Raises:
            CancelledError: it is no longer wanted.
        """

        def part(ref: ImageRef) -> dict[str, Any]:
            if not is_wanted():
                raise CancelledError
            return {"type": "image_url", "image_url": {"url": self._url(ref)}}

        return [
            {
                "role": message.role,
                "content": [*map(part, message.images), {"type": "text", "text": message.text}],
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
    fields = _read(file).items()
    return {name: field.contents() for name, field in fields if not name.startswith("tokenizer.")}


def _read(file: Path) -> dict[str, gguf.ReaderField]:
    if not file.is_file():
        raise CheckpointError(
            f"{file}: missing. --engine llama.cpp serves only folders written by `tinyllava export MODEL "
            "OUT --format gguf`. Remove --engine to serve a checkpoint."
        )
    try:
        return dict(gguf.GGUFReader(file).fields)
    except Exception as error:  # the reader documents none, and fails somewhere in numpy
        raise CheckpointError(f"{file}: not a GGUF file, or damaged ({error}). Export it again.") from error


def read_special(file: Path) -> re.Pattern[str]:
    """Return a pattern of the model's special tokens: what llama.cpp finds in any text that it is given."""
    fields = _read(file)
    kinds = fields["tokenizer.ggml.token_type"].contents()
    tokens = zip(fields["tokenizer.ggml.tokens"].contents(), kinds, strict=True)
    special = sorted((token for token, kind in tokens if kind == gguf.TokenType.CONTROL), key=len)
    return re.compile("|".join(map(re.escape, reversed(special))) or "(?!)")
