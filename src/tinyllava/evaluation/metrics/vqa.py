"""VQA accuracy: how many of ten annotators gave the same answer, once both are normalised.

Paper: appendix A, VQAv2 and TextVQA. Each has its own normaliser: that of the official tool, and that of
EvalAI and M4C. They share constants and rules, and differ in the first steps and in the comma pattern. Their
oddities are part of the published numbers, so they are kept: the period rule looks only at the following
character and removes at most 32 periods; an apostrophe is not a punctuation mark; contractions with a capital
I never match, because text is lower-cased first.
"""

import re
from collections.abc import Sequence

NUM_ANNOTATORS = 10


def accuracy_of_matches(num_matches: int, num_answers: int = NUM_ANNOTATORS) -> float:
    """Return the mean over annotators i of min(1, matches among the others / 3), in closed form.

    With ten answers: 0 -> 0, 1 -> 0.3, 2 -> 0.6, 3 -> 0.9, 4 and more -> 1.
    """
    m, n = num_matches, num_answers
    return (m * min(1.0, max(0, m - 1) / 3) + (n - m) * min(1.0, m / 3)) / n


def grade_vqa(answer: str, human_answers: Sequence[str]) -> tuple[str, float]:
    """Return the answer as compared, and its accuracy, by the official tool of VQAv2.

    Both sides are normalised only where the human answers differ; where all agree, the answer has to match
    them to the letter.
    """
    answer, humans = clean(answer), [clean(human) for human in human_answers]
    if len(set(humans)) > 1:
        answer, humans = normalise_vqa(answer), [normalise_vqa(human) for human in humans]
    return answer, accuracy_of_matches(humans.count(answer), len(humans))


def grade_textvqa(answer: str, human_answers: Sequence[str]) -> tuple[str, float]:
    """Return the answer as compared, and its accuracy, by the M4C evaluator: always normalised."""
    answer = normalise_evalai(answer)
    humans = [normalise_evalai(human) for human in human_answers]
    return answer, accuracy_of_matches(humans.count(answer), len(humans))


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
    """Return the table of contractions: misspelling -> correct spelling."""
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
    """Turn newlines and tabs into spaces and strip, as the official tool does before every comparison."""
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
