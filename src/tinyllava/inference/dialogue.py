"""Several turns with a model: each answer takes the earlier turns into account.

Paper: section 3.2, the conversation (Y_q^1, Y_a^1, ..., Y_q^T, Y_a^T) about an image.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tinyllava.conversation import Answer, Conversation, ImageLike, Message, ask, check_question

if TYPE_CHECKING:
    from tinyllava.inference.chat import Chat, Stream


class Dialogue:
    """A conversation of several turns. ``Chat.start`` makes one.

    Args:
        images: images of the first question; later questions may have more.
        system: system text; empty means the template's.
    """

    def __init__(self, chat: "Chat", *images: ImageLike, system: str = "") -> None:
        self._chat, self._images = chat, images
        self.messages: tuple[Message, ...] = (Message(role="system", text=system),) if system else ()
        """All turns so far, answers included."""
        self.num_dropped = 0
        """Number of oldest questions dropped for the last answer, because the context was full."""
        self.is_cut = False
        """Whether the last answer reached its limit of tokens."""

    def ask(self, text: str, *images: ImageLike, max_new_tokens: int = 512, **options: Any) -> Answer:
        """Ask a question, add it and its answer to the conversation, and return the answer.

        Options and errors are those of ``Chat.ask``. A question that cannot be asked is not added.
        """
        question, conversation, num_dropped = self._add(text, images, max_new_tokens)
        answer = self._chat.answer([conversation], max_new_tokens, **options)[0]
        self.num_dropped, self.is_cut = num_dropped, answer.is_cut
        self._remember(question, answer)
        return answer

    def stream(
        self, text: str, *images: ImageLike, max_new_tokens: int = 512, **options: Any
    ) -> Iterator[str]:
        """Ask a question and yield the answer in pieces.

        If the reader stops, the part that was read is added to the conversation. Options and errors
        are those of ``Chat.stream``. A question that cannot be asked is not added.
        """
        question, conversation, num_dropped = self._add(text, images, max_new_tokens)
        stream = self._chat.stream(conversation, max_new_tokens, **options)
        self.num_dropped, self.is_cut = num_dropped, False
        return self._read(question, stream)

    def _read(self, question: tuple[Message, ...], stream: "Stream") -> Iterator[str]:
        pieces: list[str] = []
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
            self.is_cut = stream.is_cut
        finally:
            stream.close()
            self._remember(question, "".join(pieces))

    def _add(
        self, text: str, images: tuple[ImageLike, ...], max_new_tokens: int
    ) -> tuple[tuple[Message, ...], Conversation, int]:
        """Return a question, the conversation that fits the context, and the number of dropped questions."""
        check_question(text)
        question = ask(text, *self._images, *images).messages
        whole = Conversation(messages=self.messages + question)
        return (question, *self._chat.shorten(whole, max_new_tokens))

    def _remember(self, question: tuple[Message, ...], answer: str) -> None:
        self._images = ()
        self.messages += (*question, Message(role="assistant", text=answer))
