"""Several turns with a model: every question is answered knowing those before it.

Paper: section 3.2, the conversation (Y_q^1, Y_a^1, ..., Y_q^T, Y_a^T) about an image.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tinyllava.conversation import Answer, Conversation, ImageLike, Message, ask

if TYPE_CHECKING:
    from tinyllava.inference.chat import Chat


class Dialogue:
    """A conversation that grows. Made by ``Chat.start``.

    Args:
        images: what the first question is about; more can come with later questions.
        system: text in front of everything; empty leaves the template's own.
    """

    def __init__(self, chat: "Chat", *images: ImageLike, system: str = "") -> None:
        self._chat, self._images = chat, images
        self.messages: tuple[Message, ...] = (Message(role="system", text=system),) if system else ()
        """All turns so far, answers included."""
        self.num_dropped = 0
        """Oldest questions that the last answer did not know, because the context is full."""

    def ask(self, text: str, *images: ImageLike, max_new_tokens: int = 512, **options: Any) -> Answer:
        """Ask, remember the answer and return it; see ``Chat.answer`` for options and errors."""
        conversation = self._add(text, images, max_new_tokens)
        answer = self._chat.answer([conversation], max_new_tokens, **options)[0]
        self.messages += (Message(role="assistant", text=answer),)
        return answer

    def stream(
        self, text: str, *images: ImageLike, max_new_tokens: int = 512, **options: Any
    ) -> Iterator[str]:
        """Ask and yield the answer in pieces; what was yielded is remembered, also if the reader stops."""
        pieces: list[str] = []
        stream = self._chat.stream(self._add(text, images, max_new_tokens), max_new_tokens, **options)
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        finally:
            stream.close()
            self.messages += (Message(role="assistant", text="".join(pieces)),)

    def _add(self, text: str, images: tuple[ImageLike, ...], max_new_tokens: int) -> Conversation:
        """Add a question; return the conversation as far as the context holds it."""
        self.messages += ask(text, *self._images, *images).messages
        self._images = ()
        shorter, self.num_dropped = self._chat.shorten(Conversation(messages=self.messages), max_new_tokens)
        return shorter
