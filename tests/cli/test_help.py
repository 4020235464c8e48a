"""What a newcomer meets first: help that fits a terminal, defaults, suggestions, and quick refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllava.cli import COMMANDS, main

PAGES = list(COMMANDS)


def text_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what argparse prints before it ends the program."""
    with pytest.raises(SystemExit):
        main(arguments)
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize("name", PAGES)
def test_a_help_page_fits_80_columns_and_has_an_example(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = text_of(capsys, name, "--help")
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert f"\n  tinyllava {name}" in text


DEFAULTS = {
    "reproduce": ("(default: 1.0)", "(default: OPENAI_API_KEY)", "(default: studies/NAME)"),
    "record": (
        "counted from 0 (default: 0)",
        "number of records to show (default: 1)",
        "with --language-model 576",
    ),
    "compare": ("(default: flips.html)", "(default: 200)"),
    "evaluate": (
        "(default: all)",
        "(default: evaluations/MODEL-HASH)",
        "(default: auto)",
        "first LIMIT questions (default: all)",
        "(default: OPENAI_API_KEY)",
    ),
    "export": ("(default: tinyllava)", "(default: 5GB)"),
    "show": ("(default: A100-80G)", "(default: 8)"),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(text_of(capsys, name, "--help").split())
    assert all(default in text for default in DEFAULTS[name])


def test_a_misspelt_option_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert text_of(capsys, "chat", "a.jpg", "--modrl", "x").endswith(
        "tinyllava chat: error: unrecognized arguments: --modrl x. Did you mean --model?\n"
    )
    assert text_of(capsys, "show", "gpus", "--xyzzy").endswith("unrecognized arguments: --xyzzy\n")


WRONG_FOLDER = """
import sys
from tinyllava.cli import main
for arguments in (
    ["chat", "a.jpg", "--model", "nope"],
    ["record", "my.json", "--model", "nope"],
    ["train", "base", "--from", "nope"],
    ["export", "nope", "out"],
    ["import", "./nope", "out"],
):
    assert main(arguments) == 2, arguments
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_a_folder_that_is_not_there_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WRONG_FOLDER], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("nope: no such folder") == 5


def test_mixtures_are_listed_and_what_they_lack_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "mixtures"]) == 0
    assert "LLaVA-1.5-558k       PT: 558,128 records\n" in capsys.readouterr().out
    images = tmp_path / "llava/llava_pretrain/images/00000"
    assert main(["data", "mixtures", "LLaVA-1.5-558k", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "  missing  " + str(tmp_path / "text_files/blip_laion_cc_sbu_558k.json") + ": its records;" in out
    assert f"  missing  {images}: images that it names\n" in out
    images.mkdir(parents=True)
    (tmp_path / "blip_laion_cc_sbu_558k.json").write_text("[]")  # it may also stand in the root
    assert main(["data", "mixtures", "LLaVA-1.5-558k", str(tmp_path)]) == 0
    assert f"all files present in {tmp_path}" in capsys.readouterr().out
    assert main(["data", "mixturs"]) == 2
    assert "Did you mean 'mixtures'?" in capsys.readouterr().err
    assert main(["data", "mixtures", "LLaVA-1.5-mix665k"]) == 2
    assert "Did you mean 'LLaVA-1.5-mix-665k'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_comes_at_once(name: str) -> None:
    """It loads nothing but the standard library and this package; PyTorch alone takes seconds."""
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom tinyllava.cli import main\n"
        "try:\n    main([sys.argv[1], '--help'])\nexcept SystemExit:\n    pass\n"
        "loaded = {module.partition('.')[0] for module in set(sys.modules) - before}\n"
        "print(*sorted(loaded - sys.stdlib_module_names - {'__mp_main__'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, name], check=True, capture_output=True, text=True)
    assert f"tinyllava {name}" in done.stdout
    assert done.stdout.splitlines()[-1] == "tinyllava"


def test_a_reader_that_stops_early_gets_no_traceback() -> None:
    """As `tinyllava show variants | head -1` does: the pipe is closed before anything is written."""
    code = "import sys, tinyllava.cli as c; sys.exit(c.main(['show', 'variants']))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.stderr, done.returncode) == ("", 141)


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_is_no_traceback_and_promises_only_what_is_true(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"tinyllava.cli.{COMMANDS[name].module}.main", stop)
    assert main([name]) == 130
    said = capsys.readouterr().err
    goes_on = name in ("starter", "train", "evaluate", "reproduce")
    assert said == f"\nStopped.{' Run the same command again to resume.' if goes_on else ''}\n"


def test_a_broken_pipe_to_a_worker_is_no_silent_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the reader of the output may go without a word; a worker that died is an error with its trace."""

    def send_to_a_dead_worker(arguments: list[str]) -> int:
        raise BrokenPipeError("worker")

    monkeypatch.setattr("tinyllava.cli.show.main", send_to_a_dead_worker)
    with pytest.raises(BrokenPipeError, match="worker"):
        main(["show"])


def test_a_full_disk_is_told_by_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device /dev/full of Linux refuses whatever is written to it."""

    def write(arguments: list[str]) -> int:
        with Path("/dev/full").open("wb", buffering=0) as file:
            return file.write(b"an answer")

    monkeypatch.setattr("tinyllava.cli.show.main", write)
    assert main(["show"]) == 2
    assert capsys.readouterr().err == "error: the disk is full. Free some space and run the command again.\n"


def test_arguments_that_are_no_text_or_no_path_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A name of Latin-1 bytes, and a path that is longer than any file system has."""
    assert main(["chat", "red\udce9.jpg"]) == 2
    assert capsys.readouterr().err == (
        "error: argument 2: b'red\\xe9.jpg' is not UTF-8. Rename the file, or use a UTF-8 locale.\n"
    )
    for arguments in (["train", "base-C-TL", "--data"], ["show"], ["runs"], ["data", "mixtures", "all"]):
        assert main([*arguments, "a" * 5000]) in (1, 2)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert captured.err.count("\n") <= 2
    assert main(["train", "base-C-TL", "--data", "a" * 5000]) == 2
    assert "aaa... (5,000 characters): too long for a path." in capsys.readouterr().err
