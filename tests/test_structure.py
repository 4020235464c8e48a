"""The limits that keep the package small and readable, and what may be imported where."""

import ast
import contextlib
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "tinyllava"
FILES = sorted(SRC.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# Names under which distributions are imported, where the two differ.
IMPORT_NAMES = {
    "huggingface-hub": "huggingface_hub",
    "onnx-ir": "onnx_ir",
    "pillow": "PIL",
    "prometheus-client": "prometheus_client",
    "protobuf": "google",
    "rouge-score": "rouge_score",
}


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def function_lengths() -> dict[str, int]:
    return {
        f"{path.relative_to(SRC)}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }


def imported_packages(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_longer_than_400_lines_and_the_median_is_at_most_200() -> None:
    lengths = {str(path.relative_to(SRC)): num_lines(path) for path in FILES}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    assert statistics.median(lengths.values()) <= 200


def importers(path: Path) -> list[Path]:
    """Return the files of the package that import a module of it."""
    room, _, name = ".".join(path.relative_to(SRC.parent).with_suffix("").parts).rpartition(".")
    imports = rf"(from|import) {re.escape(room)}\.{name}\b|from {re.escape(room)} import [^\n]*\b{name}\b"
    return [other for other in FILES if re.search(imports, other.read_text(encoding="utf-8"))]


def test_a_short_file_has_more_than_one_importer() -> None:
    """Otherwise it is opened with that importer every time, and belongs into it; a command is a file."""
    short = [p for p in FILES if num_lines(p) < 50 and p.stem not in ("__init__", "__main__")]
    assert short
    assert [p for p in short if p.parent.name != "cli" and len(importers(p)) < 2] == []


def test_no_function_is_longer_than_60_lines_and_nine_of_ten_have_at_most_40() -> None:
    lengths = function_lengths()
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 40


@pytest.mark.parametrize(
    "pattern", [r"if stage ==", r"if recipe\b", r"isinstance\(tokenizer", "NotImplementedError"]
)
def test_the_code_has_no_branch_on_stage_recipe_or_tokenizer_and_no_gap(pattern: str) -> None:
    found = [str(path) for path in FILES if re.search(pattern, path.read_text(encoding="utf-8"))]
    assert found == []


def test_the_package_has_thirteen_rooms_and_six_modules_at_its_top() -> None:
    rooms = {path.relative_to(SRC).parts[0] for path in FILES if path.parent != SRC}
    assert rooms == {
        "checkpoints",
        "cli",
        "data",
        "evaluation",
        "inference",
        "model",
        "parts",
        "planning",
        "recipes",
        "serving",
        "starter",
        "studies",
        "training",
    }
    modules = {path.stem for path in SRC.glob("*.py")}
    assert modules <= {"__init__", "__main__", "config", "conversation", "errors", "files"}


def test_every_module_says_in_one_sentence_what_it_is() -> None:
    docs = {str(path): ast.get_docstring(tree) or "" for path, tree in TREES.items()}
    assert [path for path, doc in docs.items() if not doc.partition("\n")[0].endswith((".", ":"))] == []


def test_modules_without_torch_stay_without_it() -> None:
    """What the command line needs for --help, show and wrong names starts in a fraction of a second."""
    light = (
        "cli config conversation errors evaluation.results parts.connectors parts.language parts.templates "
        "parts.vision recipes studies.report"
    )
    names = [f"tinyllava.{name}" for name in light.split()]
    code = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'accelerate', 'peft'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("package", "folders"),
    [
        ("fastapi", {"serving"}),
        ("starlette", {"serving"}),
        ("uvicorn", {"serving"}),
        ("matplotlib", {"studies", "starter"}),
    ],
)
def test_only_some_rooms_import(package: str, folders: set[str]) -> None:
    users = {
        path.relative_to(SRC).parts[0] for path, tree in TREES.items() if package in imported_packages(tree)
    }
    assert users <= folders


# Modules that the documentation of these packages names; others may move or change with any release.
PUBLIC = {
    "accelerate": {"", "utils"},
    "huggingface_hub": {"", "dataclasses", "errors", "utils"},
    "peft": {"", "tuners.tuners_utils"},
    "transformers": {"", "modeling_outputs", "utils"},
}


UNDERSCORED = {"_asdict", "_exit", "_fields", "_replace"}  # public names of the standard library


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in UNDERSCORED


def private_names_of_others(tree: ast.Module) -> Iterator[str]:
    """Yield what a module uses, or overrides, of other packages without that being their public interface."""
    nodes = list(ast.walk(tree))
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    defined |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    stored = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    defined |= {n.attr for n in stored if isinstance(n.value, ast.Name) and n.value.id == "self"}
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    yield from (name for name in used if is_private(name) and name not in defined)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            package, _, module = node.module.partition(".")
            if module not in PUBLIC.get(package, {module}) or any(map(is_private, node.module.split("."))):
                yield node.module
            if package != "tinyllava":
                yield from (alias.name for alias in node.names if is_private(alias.name))
        if isinstance(node, ast.ClassDef) and node.bases and "argparse" not in ast.unparse(node.bases[0]):
            own = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            own += [t.id for n in node.body for t in targets(n) if isinstance(t, ast.Name)]
            # A private name that the module itself never uses is there for a base class of another package.
            yield from (name for name in own if is_private(name) and name not in used)


def targets(node: ast.stmt) -> list[ast.expr]:
    return (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )


def test_only_compat_uses_what_is_private_to_other_packages() -> None:
    found = {str(path.relative_to(SRC)): set(private_names_of_others(tree)) for path, tree in TREES.items()}
    assert {"_is_accelerate_prepared", "_supports_sdpa", "_attn_implementation"} <= found.pop(
        "model/compat.py"
    )
    assert {name: names for name, names in found.items() if names} == {}


def test_what_is_imported_is_declared_and_what_is_declared_is_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    optional = [
        line for name, lines in extras.items() if name not in ("all", "dev", "docs") for line in lines
    ]
    distributions = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"] + optional}  # type: ignore[index]
    declared = {IMPORT_NAMES.get(name, name) for name in distributions}
    imported = {name for tree in TREES.values() for name in imported_packages(tree)}
    assert imported - declared - set(sys.stdlib_module_names) == {"tinyllava"}
    # transformers loads these itself: peft for adapters, tensorboard for its tracker, gguf for the starter's
    # weights, accelerate for its Trainer, jinja2 for templates, sentencepiece with protobuf for tokenizers.
    # torch loads onnx and onnxscript for its exporter.
    loaded_by_others = {"accelerate", "gguf", "jinja2", "onnx", "onnxscript", "peft", "protobuf"}
    loaded_by_others |= {"sentencepiece", "tensorboard"}
    assert declared - imported <= loaded_by_others


def test_constraints_name_one_version_each_and_nothing_of_the_machine() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    names = [pin.partition("==")[0].lower() for pin in pins]
    assert len(names) == len(set(names))
    assert "torch" in names
    assert [name for name in names if name.startswith(("nvidia", "cuda"))] == []


def test_the_lowest_versions_are_those_that_the_ranges_admit() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    ranges = project["dependencies"] + [
        line for name in extras if name not in ("all", "dev", "docs") for line in extras[name]
    ]
    lowest = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in ranges)  # type: ignore[union-attr]
    text = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")
    pins = {
        name.lower().replace("_", "-"): pin for name, pin in re.findall(r"(?m)^([\w-]+)==([\d.]+)$", text)
    }
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"\ntorch=={pins['torch']}\n" in pinned  # other releases are large CUDA builds
    lowest["torch"] = pins["torch"]
    assert {name: pin.rstrip(".0") for name, pin in pins.items()} == {
        name: version.rstrip(".0") for name, version in lowest.items()
    }


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    found = []
    for path in tracked_files():
        with contextlib.suppress(UnicodeDecodeError):
            text = path.read_text(encoding="utf-8")
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    return found


def test_tracked_files_hold_no_path_of_somebodys_machine() -> None:
    folders = "home|root|work|tmp|opt|Users|mnt|scratch"
    assert lines_with(re.compile(rf"(?<![\w.~$}}/:-])/(?:{folders})/\w")) == []
