"""Whether an answer says yes or no.

Paper: appendix A, POPE and MME.
"""

import re

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
    """Return the whole answer in lower case: what lmms-eval compares with "yes" and "no"."""
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
