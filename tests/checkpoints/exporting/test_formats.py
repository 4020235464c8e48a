"""Which formats a model fits: the table says what the export does, in the command, the card and the docs."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from documents import ROOT, commands
from layouts import make_checkpoint
from tinyllava.checkpoints import exporting
from tinyllava.checkpoints.exporting import export_checkpoint, measure_format
from tinyllava.checkpoints.exporting.formats import LAYOUTS, list_formats, part_rows
from tinyllava.cli import main
from tinyllava.errors import CheckpointError

GUIDE = (ROOT / "docs" / "guides" / "ship.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("language", "vision", "connector", "impossible"),
    [
        ("llama", "siglip", "mlp", ()),
        ("phi", "clip", "mlp", ("llava", "vllm")),
        ("chatml", "siglip", "pool", ("llava", "vllm", "gguf")),
    ],
)
def test_the_table_says_what_the_export_refuses(
    parts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    language: str,
    vision: str,
    connector: str,
    impossible: tuple[str, ...],
) -> None:
    checkpoint = make_checkpoint(
        parts, tmp_path / "own", language, vision, connector=connector,
        **({"connector_options": {"side": 1}} if connector == "pool" else {}),
    )  # fmt: skip
    rows = list_formats(checkpoint)
    assert {row.layout for row in rows} == set(LAYOUTS)
    assert {row.layout for row in rows if row.reasons} == set(impossible)
    monkeypatch.setattr(exporting, "open_merged", lambda *given: pytest.fail("weights were loaded"))
    for row in rows:
        if row.reasons:
            with pytest.raises(CheckpointError) as refused:
                export_checkpoint(checkpoint, tmp_path / "out", layout=row.layout)
            assert all(reason in str(refused.value) for reason in row.reasons)


def test_sizes_are_those_of_the_files_and_the_agreement_is_measured(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "chatml", "siglip")
    rows = {row.name: row for row in list_formats(checkpoint)}
    for kind in ("f32", "q4_0"):
        out = tmp_path / kind
        export_checkpoint(checkpoint, out, layout="gguf", quantized=kind)
        tensors = [t for name in ("model", "mmproj") for t in GGUFReader(out / f"{name}.gguf").tensors]
        unread = 4 * 2 * 32 + 4 * 512  # SigLIP's last norm is left out
        assert abs(sum(int(t.n_bytes) for t in tensors) - rows[f"gguf {kind}"].num_bytes) <= unread
    weights = (checkpoint / "model.safetensors").stat().st_size
    assert 0 <= weights - rows["tinyllava"].num_bytes < 20_000  # the file's head
    measured = measure_format(checkpoint, rows["tinyllava"])
    assert measured.num_bytes > weights
    assert measured.agreement == "logits within 0"
    assert measured.size.endswith(" MB")
    assert not measured.size.startswith("about")


def test_the_command_prints_the_table_before_any_work(
    parts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "phi", "clip")
    with monkeypatch.context() as loading:
        loading.setattr(torch.nn.Module, "load_state_dict", None)
        loading.chdir(tmp_path)
        checkpoint = checkpoint.rename("my-model").absolute()
        (line,) = (line for line in commands(GUIDE) if "--formats" in line)
        assert main(shlex.split(line)[1:]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["format", "possible", "size", "agreement"]
    named = {line.split("  ")[0]: line for line in lines[2:]}
    assert "yes, if it passes the comparison in llama.cpp (#25814, #25817)" in named["gguf q8_0"]
    assert named["tinyllava"].rstrip().endswith("not measured")
    assert "not llava: LLaVA has no bias in the output head (Phi-2), so the logits would differ" in lines
    for arguments in (["out", "--formats"], ["--measure"]):
        with pytest.raises(SystemExit):
            main(["export", str(checkpoint), *arguments])


def test_a_tokenizer_that_llama_cpp_lacks_is_a_reason(parts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "chatml", "siglip")
    file = checkpoint / "tokenizer.json"
    pipeline = json.loads(file.read_text())
    pipeline["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(pipeline))
    (row,) = (row for row in list_formats(checkpoint) if row.layout == "gguf")
    assert "the GGUF export does not support this rule" in row.reasons[0]


def test_the_card_has_the_table_with_the_agreement_of_what_was_written(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip", connector="linear")
    export_checkpoint(checkpoint, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| tinyllava | yes | logits within 0 |" in card
    assert "| llava | no: connector 'linear': LLaVA supports only the two-layer MLP |  |" in card
    assert "| onnx | yes | not measured |" in card


def test_the_docs_have_the_table_of_all_parts() -> None:
    head, *rows = part_rows()
    table = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    assert "\n".join(table) in GUIDE
