"""Every command and example of the README is executed: here, or by .ci/run in a fresh clone."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from chats import make_chat
from documents import ROOT, blocks, commands, links
from served import serve
from tinyllava.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
CI_COMMANDS = commands(f"```bash\n{(ROOT / '.ci' / 'run').read_text(encoding='utf-8')}```")

KINDS = {
    "shape": "shape of a drawing",
    "colour": "colour of a drawing",
    "fruit": "fruit in a photograph",
    "yes_no": "yes or no, about both",
}
OWN_DATA = [c for c in commands(README) if "photos" in c or "runs/mine" in c]

# Commands that take no weights and no data: run by the test below.
RUN_HERE = ("tinyllava --help", "tinyllava show", "tinyllava reproduce figure-4 --plan")


def is_run_by_ci(command: str) -> bool:
    """CI runs the very command, or the same make target in its short form."""
    return command in CI_COMMANDS or f"{command} ARGS=--short" in CI_COMMANDS


@pytest.mark.parametrize("command", commands(README))
def test_every_command_of_the_readme_is_executed(command: str, tmp_path: Path) -> None:
    if is_run_by_ci(command) or command in OWN_DATA:
        return
    assert command.startswith(RUN_HERE), f"{command!r}: add it to .ci/run, or to RUN_HERE when it is quick"
    words = shlex.split(command)
    program = Path(sys.executable).with_name(words[0])
    done = subprocess.run([program, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_commands_for_own_data_train_and_answer(tmp_path, monkeypatch, capsys) -> None:
    """As they are, but for the checkpoint: a toy in place of the starter's."""
    chat = make_chat(tmp_path / "parts", "llama")
    chat.model.config.text_config.max_position_embeddings = 2048  # as the recipe's longest record
    chat.processor.tokenizer.model_max_length = 2048
    chat.model.save_pretrained(tmp_path / "start")
    chat.processor.save_pretrained(tmp_path / "start")
    (tmp_path / "photos").mkdir()
    rows = ["image,question,answer"]
    for number in range(12):
        Image.new("RGB", (40, 30), (20 * number, 90, 200)).save(tmp_path / f"photos/{number}.jpg")
        rows.append(f"photos/{number}.jpg,Is there a mug in it?,{'yes' if number % 2 else 'no'}")
    (tmp_path / "photos.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    *commands, last = OWN_DATA
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command.replace("~/.cache/tinyllava/starter/model", "start"))
        assert main(words[1:]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs/mine/model/model.safetensors").is_file()
    words = shlex.split(last)
    assert words[:2] == ["tinyllava", "serve"]
    with serve(Path(words[2]), *words[3:]) as served:
        assert served.post(model="mine").status_code == 200


def test_ci_executes_the_python_example() -> None:
    assert len(blocks(README, "python")) == 1
    assert "tests/run_readme_example.py" in " ".join(CI_COMMANDS)


def test_ci_stops_at_the_first_failure_and_ends_with_the_tests() -> None:
    assert CI_COMMANDS[0] == "set -euo pipefail"
    assert CI_COMMANDS[-1] == "make test"


def test_the_first_screen_has_the_measured_result_and_the_two_commands() -> None:
    screen = "\n".join(README.splitlines()[:50])
    results = json.loads((ROOT / "docs" / "starter-results.json").read_text(encoding="utf-8"))
    overall = results["overall"]
    for kind, name in KINDS.items():
        row = [f"{results[kind][who]['accuracy']:.0%}" for who in ("model", "blanked", "majority")]
        assert f"| {name} | {' | '.join(row)} |" in screen
    assert f"answers {overall['model']['accuracy']:.1%}" in screen
    assert f"with the images blanked: {overall['blanked']['accuracy']:.1%}" in screen
    assert {"make starter", "make test"} <= set(commands(screen))


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_each_guide_is_linked_once_in_the_order_of_the_site(page: str) -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    order = [name for name in re.findall(r": ([\w/]+\.md)$", nav, re.MULTILINE) if name != "index.md"]
    assert {f"guides/{path.name}" for path in (ROOT / "docs/guides").glob("*.md")} <= set(order)
    found = [name.removeprefix("docs/") for name in links((ROOT / page).read_text(encoding="utf-8"))]
    assert [name for name in found if name in order] == order


def test_the_workflow_has_the_steps_of_the_full_check() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    check = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make ([\w-]+)", check, re.MULTILINE)) | {"test-newest", "test-lowest"}
    matrix = re.findall(r"target: \[(.+)\]", workflow)[0].split(", ")
    assert targets == set(re.findall(r"run: make ([\w-]+)", workflow)) | set(matrix)
    for step in ("run_readme_example.py", "-m starter tests/starter", "-m kills", "dist/*.whl"):
        assert (step in check, step in workflow) == (True, True)
