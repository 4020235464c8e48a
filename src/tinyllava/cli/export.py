"""``tinyllava export``: write a checkpoint for stock transformers, vLLM, llama.cpp or the Hub."""

import argparse
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllava.cli.parser import CommandParser, check_model
from tinyllava.cli.show import format_table
from tinyllava.errors import CheckpointError
from tinyllava.parts.folders import check_new_folder

if TYPE_CHECKING:
    from tinyllava.checkpoints.exporting import Exported

_HELP = """
Write a checkpoint for others, with a model card: as transformers' LLaVA
(--format llava), for vLLM (--format vllm), as ONNX graphs for transformers.js
and other runtimes (--format onnx), as a page that answers in the browser
(--format web), for llama.cpp and Ollama (--format gguf), or in the layout of
tinyllava. Adapters of peft are merged. Before the folder appears, it is opened
as its readers will open it, and its logits are compared.

  tinyllava export runs/mine/model --formats     which formats can hold it
  tinyllava export runs/mine/model out --format llava
  tinyllava export runs/mine/model out --format gguf --quantize q8_0
  tinyllava export ADAPTER out --base runs/mine/model
  tinyllava export runs/mine/model --push OWNER/NAME --private

--push uploads the export to a repository on the Hub.
"""

_PRECISIONS = ("fp32", "fp16", "int8")
"""What --dtype is with these formats."""
_GRAPHS = ("onnx", "web")


def _make_parser() -> CommandParser:
    parser = CommandParser("export", _HELP)
    parser.add_argument("checkpoint", metavar="DIR", type=Path, help="checkpoint or peft adapter")
    parser.add_argument("folder", metavar="OUT", type=Path, nargs="?", help="folder to write")
    parser.add_argument(
        "--format",
        choices=("tinyllava", "llava", "vllm", "onnx", "web", "gguf"),
        default="tinyllava",
        dest="layout",
        help="layout to write",
    )
    parser.add_argument(
        "--quantize",
        choices=("f16", "q8_0", "q4_0"),
        help="with --format gguf: type of the language model's matrices (default: 32 bits)",
    )
    parser.add_argument(
        "--formats", action="store_true", help="list the formats: possible or why not, size, agreement"
    )
    parser.add_argument(
        "--measure", action="store_true", help="with --formats: export in each to measure size and agreement"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", default="", help="upload to this repository")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--base", metavar="DIR", type=Path, help="base checkpoint of an adapter (default: the one it names)"
    )
    parser.add_argument(
        "--results",
        metavar="FILE",
        type=Path,
        help="results.json with scores for the model card (default: the one next to the weights or adapter)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16", *_PRECISIONS),
        default="auto",
        help="type of the weights (default: auto, the checkpoint's; with --format onnx and web fp32)",
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=(4, 8, 16),
        default=16,
        help="with --format tinyllava: store the language model's linear layers in 4 or 8 bits",
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="max size of one weight file")
    return parser


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    parser = _make_parser()
    options = parser.parse_args(arguments)
    if options.measure and not options.formats:
        parser.error("--measure works only with --formats")
    if options.formats:
        if options.folder or options.push:
            parser.error("--formats writes nothing: remove OUT and --push")
        return _list_formats(options)
    if options.folder is None and not options.push:
        parser.error("give OUT, or --push OWNER/NAME")
    if not re.fullmatch(r"\d+(\.\d+)? ?[KMGT]B", options.max_shard_size.upper()):
        parser.error(f"--max-shard-size {options.max_shard_size}: give a number and KB, MB, GB or TB: 5GB")
    if options.quantize and options.layout != "gguf":
        parser.error("--quantize works only with --format gguf")
    if options.bits != 16 and options.layout != "tinyllava":
        parser.error("--bits works only with --format tinyllava: remove --bits or --format")
    if options.dtype != "auto" and options.layout == "gguf":
        parser.error("--dtype does not work with --format gguf: use --quantize f16, q8_0 or q4_0")
    if options.dtype != "auto" and (options.dtype in _PRECISIONS) != (options.layout in _GRAPHS):
        types = ", ".join(_PRECISIONS) if options.layout in _GRAPHS else "float32, bfloat16, float16"
        parser.error(f"--dtype {options.dtype}: with --format {options.layout} give {types}")
    if options.folder is not None:
        check_new_folder(options.folder)
    if not (options.checkpoint / "adapter_config.json").is_file():
        options.checkpoint = check_model(options.checkpoint)
    if options.folder is not None:
        _export(options, options.folder)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        _export(options, Path(temporary) / options.push.rpartition("/")[2])
    return 0


def _list_formats(options: argparse.Namespace) -> int:
    """Print the table of formats; before any weight is loaded, or measured."""
    from tinyllava.checkpoints.exporting import measure_format
    from tinyllava.checkpoints.exporting.formats import list_formats
    from tinyllava.checkpoints.exporting.merge import base_of

    rows = list_formats(base_of(options.checkpoint, options.base))
    if options.measure:
        rows = [measure_format(options.checkpoint, row, options.base) for row in rows]
    cells = [(row.name, row.possible, row.size, "" if row.reasons else row.agreement) for row in rows]
    print(format_table([("format", "possible", "size", "agreement"), *cells]))
    for row in rows:
        for reason in row.reasons:
            print(f"not {row.name}: {reason}")
    return 0


def _export(options: argparse.Namespace, folder: Path) -> None:
    import torch  # after the options, so that help and mistakes come at once

    from tinyllava.checkpoints.exporting import check_repository, export_checkpoint, push

    if options.push:
        check_repository(options.push)
    is_weight_type = options.layout not in _GRAPHS and options.dtype != "auto"
    dtype = getattr(torch, options.dtype) if is_weight_type else "auto"
    precision: Any = _PRECISIONS[0] if options.dtype == "auto" or is_weight_type else options.dtype
    exported = export_checkpoint(
        options.checkpoint,
        folder,
        layout=options.layout,
        base=options.base,
        name=options.push,
        results=options.results,
        dtype=dtype,
        precision=precision,
        max_shard_size=options.max_shard_size,
        quantized=options.quantize or "f32",
        bits=options.bits,
    )
    if exported.run_difference is not None:
        print(f"compared with the model of its run: largest logit difference {exported.run_difference:.2g}")
    print(_describe_comparison(exported))
    if options.folder is not None:
        print(f"written: {folder}")
    if not options.push:
        return
    try:
        print(f"pushed: {push(folder, options.push, private=options.private)}")
    except CheckpointError as error:
        again = (
            f"The export is in {folder}; upload it with `hf upload {options.push} {folder} .`."
            if options.folder
            else "Give OUT as well to keep the exported folder."
        )
        raise CheckpointError(f"{error} {again}") from error


def _describe_comparison(exported: "Exported") -> str:
    agreement = exported.agreement
    if agreement:
        return (
            f"opened in llama.cpp (xllamacpp {agreement.version}) and compared: largest log-probability "
            f"difference {agreement.text:.2g} (text) and {agreement.image:.2g} (image); with the weights "
            f"before rounding {agreement.text_rounding:.2g} and {agreement.image_rounding:.2g}"
        )
    if exported.largest_difference is None:
        return (
            "not compared, because xllamacpp is not installed. Run `pip install tinyllava[gguf]` and export "
            "again."
        )
    difference = f"largest logit difference {exported.largest_difference:.2g}"
    return f"reloaded and compared: {exported.measured or difference}"
