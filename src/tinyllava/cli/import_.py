"""``tinyllava import``: bring in a checkpoint of another layout."""

from pathlib import Path

from tinyllava.cli.parser import CommandParser
from tinyllava.errors import CheckpointError

_HELP = """
Bring in a checkpoint of TinyLLaVABench (whole model, stage-1 connector, LoRA),
TinyLLaVA Factory (one file, three folders, LoRA), LLaVA-1.5, or transformers'
own LLaVA. The kind is recognised by config.json and the names of the tensors.
Every tensor is accounted for, or the import stops and lists them. DIR is
complete in itself.

  tinyllava import bczhou/TinyLLaVA-3.1B imported        a name on the hub
  tinyllava import ./factory imported --vision-encoder ./siglip
  tinyllava import ./lora imported --language-model ./base
"""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    parser = CommandParser("import", _HELP)
    parser.add_argument("source", metavar="SOURCE", help="folder, connector file, or name on the hub")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write the imported checkpoint")
    parser.add_argument(
        "--vision-encoder",
        metavar="DIR",
        type=Path,
        help="the encoder that the source names (default: fetched)",
    )
    parser.add_argument(
        "--language-model",
        metavar="DIR",
        type=Path,
        help="the language model (or model) that the source was trained on, or a folder with its tokenizer",
    )
    parser.add_argument(
        "--template", default="", metavar="NAME", help="prompt template in place of the source's"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the weights (default: auto, which loses nothing)",
    )
    options = parser.parse_args(arguments)
    if options.source.startswith(("/", ".", "~")) and not Path(options.source).exists():
        raise CheckpointError(f"{options.source}: no such folder or file; give a checkpoint's.")

    import torch  # after the options, so that help and mistakes come at once

    from tinyllava.checkpoints.importing import Given, import_checkpoint

    given = Given(
        vision_encoder=options.vision_encoder,
        language_model=options.language_model,
        template=options.template,
    )
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    report = import_checkpoint(options.source, options.folder, given=given, dtype=dtype)
    print(f"{report.kind}: {report.num_tensors} tensors, {report.num_image_tokens} image tokens an image")
    print(f"template: {report.template} (another one: --template NAME)")
    lists = {"dropped": report.dropped, "recomputed": report.recomputed, "filled in": report.filled}
    for name, values in lists.items():
        if values:
            others = " and others" if values[1:] else ""
            print(f"{name}: {len(values)} tensors, {values[0]}{others} (see import.json)")
    if report.num_new_rows:
        print(f"new: {report.num_new_rows} zero rows of embedding and head, for <image>")
    for note in report.notes:
        print(note)
    print(f"written: {options.folder}")
    return 0
