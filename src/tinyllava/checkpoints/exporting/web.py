"""Write a self-contained folder that answers in a browser: ONNX graphs, their runtime and one page.

The runtime is transformers.js with its WebAssembly files, copied unchanged from two pinned npm packages. On
start, the page answers an example whose answer was stored at export. If a GPU gives a different answer, it is
not used.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyllava.checkpoints.exporting.compare import EXAMPLE_QUESTION, encode_example, example_image
from tinyllava.checkpoints.exporting.onnx import Agreement, OpenGraphs, Precision, write_onnx
from tinyllava.data.packages import Package, fetch_packages
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor

TRANSFORMERS_JS = Package(
    name="@huggingface/transformers",
    version="4.3.1",
    client="npm",
    sha256="0325441d6bd7bc7697fccb32ee6e5febc7f89691e42402d071adc678237b8015",
    archive_bytes=2_268_123,
    files=("package/dist/transformers.min.js", "package/LICENSE"),
    licence="Apache-2.0",
)
ONNXRUNTIME_WEB = Package(
    name="onnxruntime-web",
    version="1.31.0-dev.20260914-8d85527a0",  # the one that this transformers.js was built with
    client="npm",
    sha256="0de27582f3e3189dec4a2082513a0af1ea79ae7fd3039bbfe634a526e173cbe0",
    archive_bytes=33_185_781,
    files=("package/dist/ort-wasm-simd-threaded.asyncify.*",),
    licence="MIT",
)
RUNTIME_BYTES = 27_500_000
"""Of what is taken out of both packages."""
_PAGE = Path(__file__).with_name("page")
_EXAMPLE_TOKENS = 8


def fetch_runtime() -> dict[str, Path]:
    """Return the folders of both packages, downloaded once.

    Raises:
        PackageError: npm is missing, or could not download them.
    """
    return fetch_packages([TRANSFORMERS_JS, ONNXRUNTIME_WEB])


def write_web(
    folder: Path,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    name: str,
    precision: Precision,
) -> Agreement:
    """Write graphs, runtime and page, and compare the graphs with the model.

    Raises:
        PackageError: see ``fetch_runtime``.
        CheckpointError: see ``write_onnx``.
    """
    packages = fetch_runtime()
    (folder / "model").mkdir()
    agreement = write_onnx(folder / "model", model, processor, precision, for_browsers=True)
    (folder / "runtime").mkdir()
    for package in packages.values():
        for path in package.rglob("*"):
            if path.suffix in (".js", ".mjs", ".wasm") or path.name == "LICENSE":
                shutil.copyfile(path, folder / "runtime" / path.name)
    for path in _PAGE.iterdir():
        shutil.copyfile(path, folder / path.name)
    example_image().save(folder / "example.png")
    end = model.generation_config.eos_token_id
    settings = {
        "name": name,
        "background": ",".join(map(str, processor.background or ())),
        "context": processor.tokenizer.model_max_length,
        "ends": end if isinstance(end, list) else [end],
        "example": {"question": EXAMPLE_QUESTION, "ids": _answer_example(folder, model, processor)},
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return agreement


@torch.no_grad()
def _answer_example(
    folder: Path, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor
) -> list[int]:
    """Return the greedy answer that the written graphs give to the example."""
    graphs = OpenGraphs(folder / "model" / "onnx", model.config)
    stops = set(np.atleast_1d(model.generation_config.eos_token_id).tolist())
    step: Any = encode_example(processor)["input_ids"].numpy()
    ids: list[int] = []
    while len(ids) < _EXAMPLE_TOKENS and not stops & set(ids):
        ids.append(int(graphs.feed(step)[-1].argmax()))
        step = np.array([ids[-1:]])
    return ids
