"""The training bar in terminals of 80 and of 140 columns: one line, nothing cut."""

import io

import pytest
from rich.console import Console

from tinyllava.training.progress import make_progress, rates_note


def drawn(width: int, name: str, done: int, total: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    with make_progress(console) as bar:
        note = rates_note(console, 10.234, 123.4, 98765.4)
        bar.add_task(name, total=total, completed=done, note=note)
    return console.file.getvalue()


@pytest.mark.parametrize(("name", "done", "total"), [("finetune", 3, 3), ("share_pretrain", 5197, 5197)])
def test_the_narrow_bar_is_one_whole_line_of_80_columns(name: str, done: int, total: int) -> None:
    [line] = drawn(80, name, done, total).splitlines()
    assert len(line) <= 80
    assert "…" not in line
    words = line.split()
    assert words[:4] == [name, "━" * 10, f"{done}/{total}", "left"]
    assert len(words[4]) == len("0:00:00")
    assert words[5:] == ["loss", "10.234", "123.4", "samples/s"]


def test_a_wide_terminal_also_shows_elapsed_time_and_tokens() -> None:
    [line] = drawn(140, "share_pretrain", 5197, 5197).splitlines()
    assert "━" * 28 in line
    assert line.rstrip().endswith("10.234  123.4 samples/s 98,765 tokens/s")
    assert line.count(":") == 4  # elapsed and remaining
