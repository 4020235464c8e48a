"""The two normalisers of VQA answers: the official one of VQAv2, and that of EvalAI and M4C.

Paper: appendix A, VQAv2 and TextVQA. Both tools share constants and rules; they differ in what comes before
and in the comma pattern. The oddities are part of the published numbers and are kept: the period rule looks
only at the following character and removes at most 32; an apostrophe is no punctuation mark; contractions
with a capital I never match, because text is lower-cased first.
"""

import re

_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_MOST_PERIODS = 32

_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's
there'd there're there's they'd they'll they're they've wasn't we've weren't what'll what're what's what've
when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
you'd you'll you're you've
"""
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll
"""
_ODD = {
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "twas": "'twas",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def build_contractions() -> dict[str, str]:
    """Return the table of contractions: what a careless writer types -> how it is spelt."""
    table = {target.replace("'", ""): target for target in _ONE_APOSTROPHE.split()}
    for target in _TWO_APOSTROPHES.split():
        first, second = target.index("'"), target.rindex("'")
        table[target[:first] + target[first + 1 :]] = target
        table[target[:second] + target[second + 1 :]] = target
    return table | _ODD


CONTRACTIONS = build_contractions()
_PERIOD = re.compile(r"\.(?!\d)")
_VQA_COMMA = re.compile(r"\d,\d")
_EVALAI_COMMA = re.compile(r"(?<=\d),+(?=\d)")


def clean(text: str) -> str:
    """Turn newlines and tabs into spaces and strip: what precedes every comparison of the official tool."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_vqa(text: str) -> str:
    """Normalise as the official VQA tool does once it has found that the ten answers are not all the same."""
    return _normalise_words(_remove_punctuation(clean(text), _VQA_COMMA))


def normalise_evalai(text: str) -> str:
    """Normalise as EvalAI's server and the M4C evaluator do, always: for VQAv2 uploads and for TextVQA."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _normalise_words(_remove_punctuation(clean(text), _EVALAI_COMMA))


def _remove_punctuation(text: str, comma: re.Pattern[str]) -> str:
    result = text
    has_comma_number = comma.search(text) is not None
    for mark in _PUNCTUATION:
        glued = mark + " " in text or " " + mark in text or has_comma_number
        result = result.replace(mark, "" if glued else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def _normalise_words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
