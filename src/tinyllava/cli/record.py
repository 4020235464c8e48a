"""``tinyllava record``: show records as training sees them.

Paper: section 3.2. The green text is the set A of equation 3.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.cli.parser import CommandParser, add_data_options, check_model, own_data
from tinyllava.config import Stage

if TYPE_CHECKING:
    from tinyllava.conversation import Conversation
    from tinyllava.model import TinyLlavaProcessor

_HELP = """
Show records of a file as the model will see them, with token counts.
Supervised text is green (between >> and << without colour). If training would
reject a record, the reason is shown and the exit status is 1.

  tinyllava record my.json --model runs/mine/model --count 3
  tinyllava record my.json --language-model TinyLlama --template caption
"""


def main(arguments: list[str]) -> int:
    """Print the rendered text with supervised spans coloured, and the token counts."""
    parser = CommandParser("record", _HELP)
    parser.add_argument("file", help="record file, or folder of images")
    add_data_options(parser)
    parser.add_argument("--model", default="", help="checkpoint folder that provides tokenizer and template")
    parser.add_argument(
        "--language-model", default="", help="language model name or folder, instead of --model"
    )
    parser.add_argument(
        "--template", default="", help="template name, such as caption (default: the model's)"
    )
    parser.add_argument(
        "--image-tokens",
        type=int,
        default=0,
        help="tokens per image (default: the checkpoint's; with --language-model 576, as for CLIP with mlp)",
    )
    parser.add_argument(
        "--index", type=int, default=0, help="first record to show, counted from 0 (default: 0)"
    )
    parser.add_argument("--count", type=int, default=1, help="number of records to show")
    parser.add_argument(
        "--max-length",
        type=int,
        default=Stage.max_length_tokens,
        help="max length of a training sequence in tokens (default: 2048)",
    )
    known = parser.parse_args(arguments)
    if bool(known.model) == bool(known.language_model):
        parser.error("give one of --model CHECKPOINT and --language-model NAME")
    if known.count < 1 or known.image_tokens < 0 or known.max_length < 1:
        parser.error("--count and --max-length must be at least 1, and --image-tokens at least 0")

    from tinyllava.data.records import read_configured
    from tinyllava.errors import DataError
    from tinyllava.parts.templates import read_template

    if known.model:
        known.model = str(check_model(known.model))
    file = known.file
    skip = tuple(name for name in known.skip if name != "broken_image")  # all would be decoded to show a few
    conversations = read_configured(own_data(known, file, skip=skip)).conversations
    if not 0 <= known.index < len(conversations):
        raise DataError(f"--index {known.index}: {file} has records 0 to {len(conversations) - 1}.")
    processor = load_processor(known)
    template = read_template(known.template) if known.template else None
    are_taken = True
    for conversation in conversations[known.index : known.index + known.count]:
        print_record(conversation, processor, template)
        are_taken &= _print_refusal(conversation, processor, template, known)
    return 0 if are_taken else 1


def load_processor(known: argparse.Namespace) -> "TinyLlavaProcessor":
    """Return the processor of ``--model``, or that of ``--language-model`` with CLIP."""
    from tinyllava.model.assemble import load_tokenizer, open_processor
    from tinyllava.model.processing import TinyLlavaProcessor
    from tinyllava.model.tokenizer import fit_template

    if known.model:
        processor = open_processor(Path(known.model))
    else:
        from transformers import CLIPImageProcessorPil

        from tinyllava.config import ModelConfig
        from tinyllava.parts.resolve import resolve

        parts = resolve(ModelConfig(vision_encoder="CLIP", language_model=known.language_model))
        tokenizer = load_tokenizer(parts.language)
        processor = TinyLlavaProcessor(
            image_processor=CLIPImageProcessorPil(),
            tokenizer=tokenizer,
            chat_template=fit_template(parts.template.text, tokenizer),
            num_image_tokens=parts.num_image_tokens,
        )
    if known.image_tokens:
        processor.num_image_tokens = known.image_tokens
    return processor


def _print_refusal(
    conversation: "Conversation",
    processor: "TinyLlavaProcessor",
    template: str | None,
    known: argparse.Namespace,
) -> bool:
    """Print why training rejects or skips a record; return whether training can start."""
    from rich.console import Console

    from tinyllava.data.dataset import Examples, measure
    from tinyllava.data.defects import Defect

    console = Console(highlight=False, soft_wrap=True, markup=False)
    examples = Examples(conversations=[conversation], processor=processor, template=template)
    try:
        _, skipped = measure(examples, known.max_length, tuple(known.skip))
    except Defect as defect:
        console.print(f"training rejects this record: {defect}", style="bold red")
        return False
    if skipped:
        console.print(f"training skips this record: {', '.join(skipped)}", style="dim")
    return True


def print_record(conversation: "Conversation", processor: "TinyLlavaProcessor", template: str | None) -> None:
    """Print the text that the model sees, with supervised parts marked, and its number of tokens."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    text, spans = processor.render(conversation, template=template)
    encoded = processor.encode(conversation, template=template)
    shown, position = Text(), 0
    for start, end in spans:
        shown.append(text[position:start])
        shown.append(text[start:end] if console.is_terminal else f">>{text[start:end]}<<", style="bold green")
        position = end
    shown.append(text[position:])
    console.rule(
        Text(f"{conversation.at or 'record'}{f' (id {conversation.id})' if conversation.id else ''}")
    )
    console.print(shown)
    num_image = encoded.input_ids.count(processor.image_token_id)
    console.print(
        f"{len(encoded.input_ids)} tokens, {num_image} of them for {len(conversation.images)} image(s), "
        f"{sum(encoded.supervised)} supervised",
        style="dim",
    )
