"""Words and labels of answers, as the metrics of a user's own questions compare them."""

import re
import unicodedata
from collections.abc import Sequence


def normalise(text: str) -> str:
    """Drop case, outer quotation marks, a final period and repeated blanks."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("\"'`“”„‘’*").rstrip(".").strip("\"'`“”„‘’* ")


def words_of(text: str) -> list[str]:
    """Return the words of a text, whatever its punctuation; Chinese and Japanese characters one by one."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+", text)


def has_run(words: Sequence[str], part: Sequence[str]) -> bool:
    """Whether words have another list of words in them, one after the other."""
    return bool(part) and any(words[i : i + len(part)] == part for i in range(len(words) - len(part) + 1))


def split_labels(texts: Sequence[str]) -> set[str]:
    """Return the labels in texts, between commas, semicolons, bars, lines and the word "and"."""
    parts = (part for text in texts for part in re.split(r"[,;|\n]|\band\b", text))
    return {label for part in parts if (label := normalise(part))}
