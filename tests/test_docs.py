"""What the documents say about the project is there: links, commands, symbols, tables."""

import importlib
import re
from pathlib import Path

import pytest

from documents import DOCUMENTS, ROOT, blocks, code_spans, commands, links
from tinyllava.cli import COMMANDS
from tinyllava.parts.connectors import CONNECTORS
from tinyllava.parts.language import LANGUAGE_MODELS
from tinyllava.parts.vision import VISION_ENCODERS

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def find_symbol(dotted: str) -> object:
    """Import the longest part that is a module and take the rest as attributes."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(dotted)


@each_document
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    broken = []
    for target in links(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


@each_document
def test_every_tinyllava_command_is_in_the_dispatch_table(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    shell = commands(text) + [line for body in blocks(text, "console") for line in body.splitlines()]
    named = {
        match[1]
        for line in [*shell, *code_spans(text)]
        if (match := re.match(r"(?:\$ )?(?:\.venv/bin/)?tinyllava ([a-z][\w-]*)", line))
    }
    assert named <= set(COMMANDS)


@each_document
def test_every_symbol_that_is_named_can_be_imported(path: Path) -> None:
    spans = code_spans(path.read_text(encoding="utf-8"))
    for dotted in {span for span in spans if re.fullmatch(r"tinyllava(\.\w+)+", span)}:
        find_symbol(dotted)


@each_document
def test_every_file_of_the_package_that_is_named_exists(path: Path) -> None:
    spans = code_spans(path.read_text(encoding="utf-8"))
    files = {span for span in spans if re.fullmatch(r"(?:src|tests|docs|benchmarks)/[\w./-]+", span)}
    assert [name for name in files if not (ROOT / name).exists()] == []


@each_document
def test_every_python_example_imports_what_exists(path: Path) -> None:
    for body in blocks(path.read_text(encoding="utf-8"), "python"):
        compile(body, str(path), "exec")
        for module, names in re.findall(r"^from (tinyllava[\w.]*) import (.+)$", body, re.MULTILINE):
            for name in names.split(","):
                find_symbol(f"{module}.{name.strip()}")


def test_every_command_has_a_line_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`tinyllava {name}" not in text] == []


@pytest.mark.parametrize("table", [VISION_ENCODERS, LANGUAGE_MODELS, CONNECTORS], ids=["V", "F", "P"])
def test_every_part_has_a_row_in_the_list_of_parts(table: dict[str, object]) -> None:
    rows = (ROOT / "docs" / "guides" / "parts.md").read_text(encoding="utf-8")
    assert [name for name in table if f"| `{name}` |" not in rows] == []


def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "checks.md").read_text(encoding="utf-8")
    named = [span for span in code_spans(text) if span.startswith("tests/")]
    tests = re.findall(r"`(tests/[\w/]+\.py::\w+)`", text)
    assert len(tests) == len(set(tests)) >= 10
    assert set(tests) <= set(named)
    missing = []
    for span in named:
        path, _, test = span.partition("::")
        source = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
        if not re.search(rf"^(async )?def {test}\(" if test else ".", source, re.MULTILINE):
            missing.append(span)
    assert missing == []
