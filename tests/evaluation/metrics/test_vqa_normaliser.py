"""The normalisers against hand-written cases, and against a second, naive reading of the rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllava.evaluation.metrics.vqa import CONTRACTIONS, normalise_evalai, normalise_vqa

# What both normalisers make of a text.
BOTH = [
    ("", ""),
    (" ", ""),
    ("yes", "yes"),
    ("Yes", "yes"),
    ("  red  ", "red"),
    ("a", ""),
    ("the", ""),
    ("an", ""),
    ("A the An", ""),
    ("the cat", "cat"),
    ("a cat and an owl", "cat and owl"),
    ("none", "0"),
    ("None", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
    ("Ten men", "10 men"),
    ("eleven", "eleven"),
    ("twenty one", "twenty 1"),
    ("onesie", "onesie"),
    ("red\nblue", "red blue"),
    ("red\tblue", "red blue"),
    ("red   blue", "red blue"),
    ("stop.", "stop"),
    ("U.S.A.", "usa"),
    ("3.5", "3.5"),
    (".5", ".5"),
    ("5.", "5"),
    ("a.b", "ab"),
    ("v1.2.", "v1.2"),
    ("...", ""),
    ("no!", "no"),
    ("no !", "no"),
    ("t-shirt", "t shirt"),
    ("t - shirt", "t shirt"),
    ("black/white", "black white"),
    ("black / white", "black white"),
    ("(red)", "red"),
    ("[red]", "red"),
    ("{red}", "red"),
    ('"red"', "red"),
    ("a_b", "b"),
    ("x=y", "x y"),
    ("x+y", "x y"),
    ("me@home", "me home"),
    ("x<y", "x y"),
    ("x>y", "x y"),
    ("x\\y", "x y"),
    ("`x`", "x"),
    ("x;y", "x y"),
    ("10%", "10%"),
    ("$5", "$5"),
    ("a&b", "a&b"),
    ("#1", "#1"),
    ("12:30", "12:30"),
    ("5*", "5*"),
    ("don't", "don't"),
    ("dont", "don't"),
    ("isnt", "isn't"),
    ("couldntve", "couldntve"),
    ("couldn'tve", "couldn't've"),
    ("couldnt've", "couldn't've"),
    ("somebody'd", "somebodyd"),
    ("twas", "'twas"),
    ("lets", "lets"),
    ("yall'd've", "y'all'd've"),
    ("Im", "im"),
    ("Ive", "ive"),
    ("I'dve", "i'dve"),
    ("oclock", "o'clock"),
    ("maam", "ma'am"),
    ("café", "café"),
    ("日本", "日本"),
    ("ÉCLAIR", "éclair"),
    ("don’t", "don’t"),
    ("two-two", "2 2"),
    ("a - b", "b"),
    ("theres", "there's"),
    ("whos the man", "who's man"),
    ("shouldve", "should've"),
    ("-", ""),
    ("--", ""),
    ("!?", ""),
    ("red-ish -blue", "redish blue"),
    ("12/5", "12 5"),
    ("@ home", "home"),
    ("x . y", "x y"),
]

VQA_ONLY = [
    ("2,000", "2000"),
    ("2,000-3,000", "20003000"),
    ("red,blue", "red blue"),
    ("red, blue", "red blue"),
    ("red ,blue", "red blue"),
    ("what?", "what"),
    ("what?now", "what now"),
    ("cat's", "cat's"),
    ("it's", "it's"),
    ("1,2 a/b", "12 ab"),
    ("1, 2", "1 2"),
    ("let's", "let's"),
    ("she's", "she's"),
    ("hes", "he's"),
]
EVALAI_ONLY = [
    ("2,000", "2000"),
    ("2,000-3,000", "2000 3000"),
    ("red,blue", "redblue"),
    ("red, blue", "red blue"),
    ("red ,blue", "red blue"),
    ("what?", "what"),
    ("what?now", "whatnow"),
    ("cat's", "cat 's"),
    ("it's", "it 's"),
    ("1,2 a/b", "12 b"),
    ("1, 2", "1 2"),
    ("let's", "let 's"),
    ("she's", "she 's"),
    ("hes", "he's"),
    ("what's 's", "what 's 's"),
    ("?", ""),
    (",", ""),
    ("Jones's", "jones 's"),
]


@pytest.mark.parametrize(("text", "expected"), BOTH + VQA_ONLY)
def test_vqa(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected


@pytest.mark.parametrize(("text", "expected"), BOTH + EVALAI_ONLY)
def test_evalai(text: str, expected: str) -> None:
    assert normalise_evalai(text) == expected


def test_at_most_32_periods_are_removed() -> None:
    assert normalise_vqa("x" + "." * 40) == "x" + "." * 8
    assert normalise_evalai("x" + "." * 32) == "x"


def test_the_table_has_120_entries_and_its_odd_ones() -> None:
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["'ow'sat"] == CONTRACTIONS["ow's'at"] == CONTRACTIONS["'ows'at"] == "'ow's'at"
    assert CONTRACTIONS["y'allll"] == CONTRACTIONS["yall'll"] == "y'all'll"
    assert {key for key in CONTRACTIONS if key != key.lower()} == {"Im", "Ive", "Id've", "I'dve"}
    assert "hed" in CONTRACTIONS
    assert "shes" not in CONTRACTIONS
    assert "were" not in CONTRACTIONS


def naive(text: str, *, evalai: bool) -> str:
    """The rules of the reference once more, character by character and without regular expressions."""
    if evalai:
        text = text.lower()
        text = "".join(c for c in text if c not in ",?")
        text = " 's".join(text.split("'s")).strip()
    text = "".join(" " if c in "\n\t" else c for c in text).strip()
    numbers = any(
        text[i] == "," and text[i - 1].isdigit() and text[i + 1].isdigit() for i in range(1, len(text) - 1)
    )
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        glue = f"{mark} " in text or f" {mark}" in text or numbers
        out = ("" if glue else " ").join(out.split(mark))
    kept, removed = [], 0
    for i, c in enumerate(out):
        if c == "." and not out[i + 1 : i + 2].isdigit() and removed < 32:
            removed += 1
            continue
        kept.append(c)
    words = []
    for word in "".join(kept).lower().split():
        digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        word = "0" if word == "none" else str(digits.index(word)) if word in digits else word
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


PIECES = st.sampled_from(
    [
        *" \n\t.,;/[]\"{}()=+\\_-><@`?!'&%$:*0123456789",
        "the",
        "a",
        "One",
        "none",
        "dont",
        "it's",
        "'s",
        "é",
        "日",
    ]
)


@given(st.lists(PIECES, max_size=12).map("".join))
def test_both_equal_the_naive_reading(text: str) -> None:
    assert normalise_vqa(text) == naive(text, evalai=False)
    assert normalise_evalai(text) == naive(text, evalai=True)
