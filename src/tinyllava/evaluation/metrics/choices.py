"""Which option of a multiple-choice question an answer means.

Paper: appendix A, ScienceQA-IMG and MMBench.
"""

import re
from collections.abc import Mapping

from tinyllava.evaluation.metrics.words import has_run, normalise, words_of

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
    """Return the letter of the option that an answer means; empty where it means none or several.

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
