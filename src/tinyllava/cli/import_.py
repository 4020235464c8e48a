"""``tinyllava import``: convert a checkpoint from another layout."""

from pathlib import Path

from tinyllava.cli.parser import CommandParser
from tinyllava.errors import CheckpointError

_HELP = """
Convert a checkpoint of TinyLLaVABench (whole model, stage-1 connector, LoRA),
TinyLLaVA Factory (one file, three folders, LoRA), LLaVA-1.5, transformers' own
LLaVA, or llama.cpp (GGUF with its mmproj file beside it). The layout is
detected from config.json and the tensor names. If a tensor cannot be placed,
the import stops and lists it. DIR is self-contained.

  tinyllava import bczhou/TinyLLaVA-3.1B imported        from the Hub
  tinyllava import ./factory imported --vision-encoder ./siglip
  tinyllava import ./lora imported --language-model ./base
  tinyllava import ./pair/model.gguf imported
  tinyllava import model.gguf imported --mmproj ../encoders/mmproj.gguf
"""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    parser = CommandParser("import", _HELP)
    parser.add_argument("source", metavar="SOURCE", help="folder, connector file, or name on the Hub")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write the imported checkpoint")
    parser.add_argument(
        "--vision-encoder",
        metavar="DIR",
        type=Path,
        help="vision encoder of the source (default: download it)",
    )
    parser.add_argument(
        "--language-model",
        metavar="DIR",
        type=Path,
        help="base language model (or base model) of the source, or a folder with its tokenizer",
    )
    parser.add_argument(
        "--mmproj",
        metavar="FILE",
        type=Path,
        help="GGUF file with the vision encoder (default: the one beside the source with mmproj in its name)",
    )
    parser.add_argument(
        "--template", default="", metavar="NAME", help="prompt template to use instead of the source's"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the weights (default: auto, lossless)",
    )
    options = parser.parse_args(arguments)
    if options.source.startswith(("/", ".", "~")) and not Path(options.source).exists():
        raise CheckpointError(f"{options.source}: no such folder or file. Give the path of a checkpoint.")

    import torch  # after the options, so that help and mistakes come at once

    from tinyllava.checkpoints.importing import Given, import_checkpoint

    given = Given(
        vision_encoder=options.vision_encoder,
        language_model=options.language_model,
        template=options.template,
        mmproj=options.mmproj,
    )
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    report = import_checkpoint(options.source, options.folder, given=given, dtype=dtype)
    print(f"{report.kind}: {report.num_tensors} tensors, {report.num_image_tokens} tokens per image")
    print(f"template: {report.template} (change it with --template NAME)")
    lists = {"dropped": report.dropped, "recomputed": report.recomputed, "filled in": report.filled}
    for name, values in lists.items():
        if values:
            others = " and others" if values[1:] else ""
            print(f"{name}: {len(values)} tensors, {values[0]}{others} (see import.json)")
    if report.num_new_rows:
        print(f"new: {report.num_new_rows} zero rows in embedding and head, for <image>")
    print(*report.notes, f"written: {options.folder}", sep="\n")
    return 0
