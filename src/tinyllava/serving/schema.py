"""Requests of OpenAI's chat completions, checked field by field and converted to a conversation and options.

Paper: none. Differs: images come before the text of their message, as the model was trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from tinyllava.conversation import Conversation, ImageRef, Message, Role, to_ref
from tinyllava.data.images import read_size
from tinyllava.errors import ImageError
from tinyllava.serving.fetch import Downloads
from tinyllava.serving.limits import Limits, RequestError

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": (None, True, False),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}
"""Fields of OpenAI's that are not supported, with the values under which they change nothing."""
_IGNORED = ("metadata", "user", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer: notes of the client's about itself."""


class _Fields(BaseModel):
    """Known fields are checked; of others only those pass that say nothing (null)."""

    model_config = ConfigDict(extra="allow", strict=True)


class TextPart(_Fields):
    """A piece of the text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Fields):
    """An image inside the request. Every ``detail`` gives the same tokens: the model has one resolution."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(_Fields):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Fields):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class StreamOptions(_Fields):
    """How an answer is streamed."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


Stop = Annotated[str, StringConstraints(min_length=1, max_length=1_000)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]


class ChatRequest(_Fields):
    """The body of ``POST /v1/chat/completions``."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1_000)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A request that can be answered."""

    conversation: Conversation
    max_new_tokens: int
    options: Mapping[str, float]
    """``temperature`` and ``top_p`` to sample with; without any the likeliest token is taken."""
    stops: tuple[str, ...]
    """Texts before which the answer ends."""
    seed: int | None
    is_streamed: bool
    has_usage: bool
    """Whether a streamed answer ends with the count of its tokens."""


def read_request(body: bytes, model: str, limits: Limits, downloads: Downloads) -> Question:
    """Check a request and return its contents.

    Args:
        body: JSON.
        model: the name that is served.
        downloads: open images that are given by their address.

    Raises:
        RequestError: what cannot be answered, with the name of the field.
    """
    _refuse_many_values(body, limits)
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _describe(error) from error
    _refuse_unsupported(request)
    if request.model != model:
        raise RequestError(
            404,
            f"model {request.model!r} is not served here; this server has {model!r}. Ask for that one.",
            code="model_not_found",
            param="model",
        )
    temperature = request.temperature
    if temperature is None:  # nucleus sampling is asked for; otherwise the likeliest answer
        temperature = 1.0 if (request.top_p or 1.0) < 1 else 0.0
    stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return Question(
        conversation=_read_conversation(request, limits, downloads),
        max_new_tokens=_read_max_tokens(request, limits),
        options={"temperature": temperature, "top_p": request.top_p or 1.0} if temperature > 0 else {},
        stops=stops,
        seed=request.seed,
        is_streamed=bool(request.stream),
        has_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def _refuse_many_values(body: bytes, limits: Limits) -> None:
    """Refuse a body of millions of small values, which take 50 times its bytes as objects."""
    num_marks = sum(map(body.count, (b",", b"[", b"{")))  # base64 has none of them
    most = 100_000 + limits.max_characters // 4
    if num_marks > most:
        said = f"the body has {num_marks:,} commas and brackets; at most {most:,}. Send fewer messages."
        raise RequestError(400, said, code="invalid_json")


def _read_max_tokens(request: ChatRequest, limits: Limits) -> int:
    """Return the length of the answer; without one, the longest that is allowed."""
    for name in ("max_completion_tokens", "max_tokens"):
        value = getattr(request, name)
        if value is not None and value > limits.max_tokens:
            raise RequestError(
                400,
                f"{name} = {value}: at most {limits.max_tokens} here. Ask for fewer; the operator can raise "
                "it with --max-tokens.",
                code="invalid_value",
                param=name,
            )
    asked = [n for n in (request.max_completion_tokens, request.max_tokens) if n is not None]
    if len(set(asked)) == 2:
        raise RequestError(
            400,
            f"max_tokens = {asked[1]} and max_completion_tokens = {asked[0]} differ; send one of them.",
            code="invalid_value",
            param="max_tokens",
        )
    return asked[0] if asked else limits.max_tokens


def _read_conversation(request: ChatRequest, limits: Limits, downloads: Downloads) -> Conversation:
    _check_whole(request.messages, limits)
    messages = [_read_message(message, number, downloads) for number, message in enumerate(request.messages)]
    num_pixels = 0
    for number, message in enumerate(messages):
        for image in message.images:
            num_pixels += _check_size(image, number, limits)
    if num_pixels > limits.max_request_pixels:
        raise RequestError(
            400,
            f"the images have {num_pixels:,} pixels together; at most {limits.max_request_pixels:,} in one "
            "request. Scale them down.",
            code="image_too_large",
            param="messages",
        )
    return Conversation(messages=tuple(messages))


def _check_whole(messages: list[ChatMessage], limits: Limits) -> None:
    """Reject requests by their messages alone, before an image is opened."""
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    texts = [message.content for message in messages if isinstance(message.content, str)]
    texts += [part.text for part in parts if isinstance(part, TextPart)]
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))] or len(turns) % 2 == 0:
        raise RequestError(
            400,
            f"messages have the roles {', '.join(roles[:20])}; a conversation is: system (optional), then "
            "user and assistant in turn, with a user's message at the end. Merge consecutive messages of "
            "one role.",
            code="invalid_value",
            param="messages",
        )
    num_characters = sum(map(len, texts))
    if num_characters > limits.max_characters:
        raise RequestError(
            400,
            f"messages have {num_characters:,} characters; at most {limits.max_characters:,}. Shorten them.",
            code="context_length_exceeded",
            param="messages",
        )
    num_images = sum(isinstance(part, ImagePart) for part in parts)
    if num_images > limits.max_images:
        raise RequestError(
            400,
            f"{num_images} images in one request; at most {limits.max_images} here. Leave some out.",
            code="too_many_images",
            param="messages",
        )


def _read_message(message: ChatMessage, number: int, downloads: Downloads) -> Message:
    role: Role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Message(role=role, text=message.content)
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    urls = [
        (part.image_url.url, f"messages.{number}.content.{i}.image_url.url")
        for i, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]
    if urls and role != "user":
        raise RequestError(
            400,
            f"message {number} of the role {message.role!r} has an image; only a user's may have one.",
            code="invalid_value",
            param=f"messages.{number}.content",
        )
    images = tuple(_read_image(url, param, downloads) for url, param in urls)
    return Message(role=role, text="\n".join(texts), images=images)


def _read_image(url: str, param: str, downloads: Downloads) -> ImageRef:
    """Return the image in a data URL, or at an address on a host of the list."""
    try:
        if url.startswith("data:"):
            return replace(to_ref(url), name=param)
        return ImageRef(data=downloads.open(url), name=param)
    except ImageError as error:
        raise RequestError(400, str(error), code="invalid_image_url", param=param) from error


def _check_size(image: ImageRef, number: int, limits: Limits) -> int:
    """Return the number of pixels that an image claims; none is decoded."""
    try:
        width, height = read_size(image)
    except ImageError as error:
        raise RequestError(400, str(error), code="invalid_image", param=image.name) from error
    if width * height > limits.max_pixels:
        raise RequestError(
            400,
            f"message {number} has an image of {width:,} x {height:,} pixels; at most {limits.max_pixels:,} "
            "in all. Scale it down.",
            code="image_too_large",
            param=image.name,
        )
    return width * height


def _refuse_unsupported(request: ChatRequest) -> None:
    """Refuse fields that would change the answer and cannot be followed."""
    for name, value in (request.model_extra or {}).items():
        if name in _IGNORED or value is None or value in _NEUTRAL.get(name, ()):
            continue
        supported = ", ".join(ChatRequest.model_fields)
        only = f"; it may only be {_NEUTRAL[name][-1]!r}" if name in _NEUTRAL else ""
        raise RequestError(
            400,
            f"{name} = {str(value)[:100]!r} is not supported{only}. Supported: {supported}.",
            code="unsupported_parameter",
            param=name[:100],
        )
    for number, message in enumerate(request.messages):
        _refuse_extra(message, f"messages.{number}")
        if isinstance(message.content, list):
            for i, part in enumerate(message.content):
                _refuse_extra(part, f"messages.{number}.content.{i}")
                if isinstance(part, ImagePart):
                    _refuse_extra(part.image_url, f"messages.{number}.content.{i}.image_url")
    if request.stream_options is not None:
        _refuse_extra(request.stream_options, "stream_options")
        if not request.stream:
            raise RequestError(
                400,
                "stream_options need stream = true; leave them out, or ask for a stream.",
                code="invalid_value",
                param="stream_options",
            )


def _refuse_extra(fields: _Fields, where: str) -> None:
    for name, value in (fields.model_extra or {}).items():
        if value not in (None, []):  # what clients echo of an earlier answer: no refusal, no annotations
            known = ", ".join(type(fields).model_fields)
            raise RequestError(
                400,
                f"{where}: field {name!r} is not supported. Supported: {known}.",
                code="unsupported_parameter",
                param=f"{where}.{name[:100]}",
            )


_TAGS = ("text", "image_url", "str")  # names of alternatives that pydantic puts into the place of an error


def _describe(error: ValidationError) -> RequestError:
    """Name the first field that is wrong; of alternatives, the one that came closest (deepest)."""
    first = max(error.errors(include_url=False, include_context=False), key=lambda one: len(one["loc"]))
    steps = [str(step) for step in first["loc"] if isinstance(step, int) or str(step).isidentifier()]
    steps = [step for i, step in enumerate(steps) if step not in _TAGS or _is_field(steps, i)]
    param = ".".join(steps)
    value = repr(first["input"])[:100]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid" or not steps:
        said = f"the body is not a valid request: {message}. Send a JSON object."
        return RequestError(400, said, code="invalid_json")
    if first["type"] == "missing":
        missing = f"{param} is missing; add it."
        return RequestError(400, missing, code="missing_required_parameter", param=param)
    return RequestError(400, f"{param} = {value}: {message}.", code="invalid_value", param=param)


def _is_field(steps: list[str], i: int) -> bool:
    """Whether a step that is called as an alternative is the field of that name in its alternative."""
    return i > 0 and steps[i - 1] == steps[i]
