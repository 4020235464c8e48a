"""Parse an answer: an option, yes or no, a number, or words.

Paper: appendix A: ScienceQA-IMG, MMBench, POPE and MME.
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

_LEADING_LETTER = re.compile(r"^\W*([A-Za-z])(?:\W*$|\s*[.):]\s*\S)")
_NAMED_LETTER = re.compile(r"(?i:answer|option|choice)(?:\s+is|:)?\s*\W{0,3}([A-Z])\b(?!\s+[a-z])")
_SCIENCEQA_LETTERS = "ABCDE"
_SCIENCEQA_SENTENCE = re.compile(r"The answer is ([A-Z]).")

NONE_OF_THEM = "Z"
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
_NO_ANSWER = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def parse_scienceqa(answer: str) -> str:
    """Return the letter that an answer to ScienceQA means, "" if none can be read.

    The sentence is looked for with any character after the letter, and has to occur once; both as in
    LLaVA's script.
    """
    if len(answer) == 1 and answer in _SCIENCEQA_LETTERS:
        return answer
    if len(answer) >= 3 and answer[0] in _SCIENCEQA_LETTERS and answer[1:3] == ". ":
        return answer[0]
    found = _SCIENCEQA_SENTENCE.findall(answer)
    return found[0] if len(found) == 1 else ""


def extract_option(answer: str, options: Mapping[str, str]) -> str:
    """Return the letter that an answer means, "Z" for a refusal, "" where only a judge could tell.

    VLMEvalKit's rules, in its order: the letter alone, then the text of an option. Kept as they are: a
    letter counts only among the last four words, and "answer is" followed by any word on a, b, c or d names
    that option.
    """
    return _extract_letter(answer, options) or _extract_text(answer, options)


def _extract_letter(answer: str, options: Mapping[str, str]) -> str:
    if _NO_ANSWER in answer:
        return ""
    if any(refusal in answer for refusal in _REFUSALS):
        return NONE_OF_THEM
    words = answer.translate(_SEPARATORS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and NONE_OF_THEM in words:
        return NONE_OF_THEM
    match = _ANSWER_IS.search(answer)
    letter = match.group(1).upper() if match else ""
    return letter if letter in options else ""


def _extract_text(answer: str, options: Mapping[str, str]) -> str:
    answer = answer.lower()
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return ""
    found = [letter for letter, text in options.items() if text.lower() in answer]
    return found[0] if len(found) == 1 else ""


def find_choice(answer: str, choices: Mapping[str, str]) -> str:
    """Return the letter of the option that an answer means; empty for none or several.

    A letter alone or in front (``B``, ``(b)``, ``B. a dog``), then ``the answer is B``, then the text of an
    option: the whole answer, or the only one that the answer has.
    """
    for pattern in (_LEADING_LETTER, _NAMED_LETTER):
        match = pattern.search(answer.strip())
        if match and match[1].upper() in choices:
            return match[1].upper()
    same = [letter for letter, text in choices.items() if normalise(text) == normalise(answer)]
    if len(same) == 1:
        return same[0]
    words = words_of(answer)
    found = {letter: words_of(text) for letter, text in choices.items() if has_run(words, words_of(text))}
    longest = [
        letter
        for letter, part in found.items()
        if not any(other != letter and has_run(whole, part) for other, whole in found.items())
    ]
    return longest[0] if len(longest) == 1 else ""


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


_NUMBER = re.compile(
    r"(?<![\w.,])[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:[.,]\d+)?)(?:[eE][-+]?\d+)?(?![.,]?\d)"
)
_NAMES_IN_ORDER = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_NAMES = _NAMES_IN_ORDER.split()


def find_numbers(text: str) -> list[float]:
    """Return the numbers in a text, or number words up to twenty if it has no digits.

    ``1,234`` is a thousand, ``3,5`` three and a half; a unit may follow a number, no letter may precede it.
    """
    found = []
    for match in _NUMBER.finditer(text):
        digits = match[0].replace("\u2212", "-")
        is_thousands = re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", digits) is not None
        found.append(float(digits.replace(",", "" if is_thousands else ".")))
    if found or re.search(r"\d", text):
        return found
    return [float(_NAMES.index(word)) for word in words_of(text) if word in _NAMES]


def parse_tolerance(tolerance: str) -> tuple[float, bool]:
    """Return a tolerance as a number and whether it is a share. Raises ValueError for anything else."""
    is_share = tolerance.strip().endswith("%")
    value = float(tolerance.strip().removesuffix("%"))
    if not 0 <= value < math.inf:
        raise ValueError(tolerance)
    return (value / 100 if is_share else value), is_share


YES, NO, OTHER = "yes", "no", "other"
_NEGATIONS = frozenset({"No", "no", "not"})
_YES, _NO = {"yes"}, {"no", "not", "none", "isn't", "aren't", "doesn't", "don't", "isnt", "cannot", "can't"}


def parse_pope(answer: str) -> str:
    """Return "no" if the first sentence has the word No, no or not, else "yes", be it unclear or empty."""
    words = answer.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return YES if _NEGATIONS.isdisjoint(words) else NO


def says_yes_or_no(answer: str) -> bool:
    """Whether the word yes, no or not occurs in an answer, whatever its case."""
    return re.search(r"(?i)\b(yes|no|not)\b", answer) is not None


def parse_exact(answer: str) -> str:
    """Return the whole answer in lower case, which lmms-eval compares with "yes" and "no"."""
    return answer.lower().strip()


def parse_mme(answer: str) -> str:
    """Return "yes" or "no" if the first four characters hold it (yes first), else "other"."""
    start = answer.lower()
    if start in (YES, NO):
        return start
    return next((word for word in (YES, NO) if word in start[:4]), OTHER)


def find_yes_or_no(answer: str) -> str:
    """Return the first word if it is yes or no, else the only one of the two in the first sentence."""
    sentence = re.split(r"[.!?\n]", answer.strip(), maxsplit=1)[0]
    words = re.findall(r"[a-z']+", sentence.casefold().replace("\u2019", "'"))
    said = ["yes" if word in _YES else "no" for word in words if word in _YES | _NO]
    if not said or (words[0] not in _YES | _NO and len(set(said)) > 1):
        return ""
    return said[0]
