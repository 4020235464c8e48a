"""Run the Python example of the README as it stands there; it asks the starter's model."""

from documents import ROOT, blocks

exec(compile(blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")[0], "README.md", "exec"))
