"""The Markdown files of the project, and what they name: links, commands, code."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """Return the bodies of the fenced blocks in that language."""
    return [body for name, body in _FENCE.findall(text) if name == language]


def commands(text: str) -> list[str]:
    """Return the commands of all bash blocks: comments dropped, continued lines joined."""
    joined = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    lines = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in joined.splitlines())
    return [" ".join(line.split()) for line in lines if line]


def code_spans(text: str) -> list[str]:
    """Return what stands between backticks outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))


def links(text: str) -> list[str]:
    """Return the targets of links and images outside fenced blocks."""
    return re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", text))
