"""Write a model as ONNX graphs in the layout that transformers.js reads, and compare them step by step.

Three graphs: ``vision_encoder`` (preprocessing, encoder and connector), ``embed_tokens`` and
``decoder_model_merged`` (language model with its cache). Any runtime of ONNX can run them.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyllava.checkpoints.exporting.compare import encode_example, example_image
from tinyllava.checkpoints.exporting.graphs import (
    LEVEL,
    DecoderGraph,
    ImageGraph,
    Pixels,
    TokenGraph,
    quantise,
)
from tinyllava.checkpoints.exporting.stock import without_bos
from tinyllava.errors import CheckpointError, first_line
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import IMAGE_TOKEN, TinyLlavaProcessor

Precision = Literal["fp32", "fp16", "int8"]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""Of the extra."""
_OPSET = 18
_SUFFIX = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}  # transformers.js finds the files by these
# Largest difference of a logit that is accepted, in standard deviations of the logits.
_TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "int8": 0.5}
# In int8, 0.11 on toys and 0.24 on a starter; one scale for a whole matrix gives the starter 0.5 to 1.8.
_NUM_STEPS = 8
_MOST_IN_ONE_FILE = 1_900_000_000  # bytes; a protocol buffer ends at 2 GiB
_HUGE = 1 << 20
# Sizes (height, width) of the images whose pixels are compared: wide, tall, small, larger than any encoder's.
_SIZES = ((61, 90), (90, 61), (97, 31), (9, 7), (480, 640))


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How close the graphs come to the model, over a prompt with an image and a greedy answer."""

    largest_difference: float
    """Of a logit."""
    deviation: float
    """Standard deviation of the model's logits."""
    num_equal: int
    """Answer tokens for which the graphs' most likely token is the model's."""
    num_tokens: int

    def __str__(self) -> str:
        """Return it in one line."""
        return (
            f"largest logit difference {self.largest_difference:.2g} (standard deviation of the logits: "
            f"{self.deviation:.2g}); same most likely token at {self.num_equal} of {self.num_tokens} steps"
        )


def reasons_against_onnx(config: TinyLlavaConfig) -> list[str]:
    """Return why the graphs would not compute the same as a model; empty if they would."""
    text: Any = config.text_config
    other = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention"})
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    limit = getattr(text, "max_position_embeddings", 0)
    if not other and not (window and window < limit):
        return []
    what = f"layers of kind {', '.join(other)}" if other else f"a window of {window} tokens"
    return [f"language model {text.model_type!r} has {what}: the graph supports only full attention"]


@torch.no_grad()
def write_onnx(
    folder: Path,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    precision: Precision = "fp32",
    *,
    for_browsers: bool = False,
) -> Agreement:
    """Write graphs, configs and tokenizer, open the graphs in onnxruntime and compare them with the model.

    Args:
        model: in single precision; it is in half precision afterwards where that is written.
        for_browsers: without doubles in the preprocessing and products of 8-bit integers, which the runtime
            of browsers lacks.

    Raises:
        CheckpointError: a graph cannot be made or does not open, or pixels or logits differ.
    """
    _compare_pixels(folder, processor, has_doubles=not for_browsers)
    reference = _make_reference(model, processor)
    _write_configs(folder, model, processor, precision)
    (folder / "onnx").mkdir()
    written = model.half() if precision == "fp16" else model
    with _quiet():
        for name, described in _describe_graphs(written, processor, not for_browsers).items():
            path = folder / "onnx" / f"{name}{_SUFFIX[precision]}.onnx"
            level = (0 if for_browsers else LEVEL) if precision == "int8" else None
            _save(_trace(name, described), path, level)
    return _compare(folder / "onnx", reference, model.config, _TOLERANCE[precision])


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages of torch and onnxruntime, because the graphs are compared afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _trace(name: str, described: Any) -> Any:
    """Return one graph.

    Raises:
        CheckpointError: torch cannot express it.
    """
    module, inputs, axes, (input_names, output_names) = described
    try:
        program: Any = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            opset_version=_OPSET,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=axes,
            verbose=False,
        )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = first_line(error.__cause__ or error)
        raise CheckpointError(f"not exported: torch cannot write {name} as ONNX: {reason}") from error
    return program.model


def _describe_graphs(
    model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor, has_doubles: bool
) -> Any:
    """Return for each graph its module, example inputs, names of the axes, names of inputs and outputs.

    Lengths of 1 would be taken for constants, so no example has one.
    """
    text: Any = model.config.text_config
    num_layers, num_heads = text.num_hidden_layers, getattr(text, "num_key_value_heads", None)
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = torch.zeros(2, num_heads or text.num_attention_heads, 5, head_width)
    pairs = [f"{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]
    past_axes = {0: "batch_size", 2: "past_sequence_length"}  # transformers.js knows batch_size by its name
    sequence = {0: "batch_size", 1: "sequence_length"}
    return {
        "vision_encoder": (
            ImageGraph(model, processor, has_doubles=has_doubles),
            (torch.zeros(2, 3, 40, 50),),
            ({0: "batch_size", 2: "height", 3: "width"},),
            (["pixel_values"], ["image_features"]),
        ),
        "embed_tokens": (
            TokenGraph(model),
            (torch.zeros(2, 3, dtype=torch.int64),),
            (sequence,),
            (["input_ids"], ["inputs_embeds"]),
        ),
        "decoder_model_merged": (
            DecoderGraph(model),
            (
                torch.zeros(2, 3, text.hidden_size),
                torch.ones(2, 8, dtype=torch.int64),
                torch.arange(5, 8).expand(2, -1).contiguous(),
                [cached.clone() for _ in pairs],
            ),
            (sequence, {0: "batch_size", 1: "total_sequence_length"}, sequence, [past_axes for _ in pairs]),
            (
                [
                    "inputs_embeds",
                    "attention_mask",
                    "position_ids",
                    *(f"past_key_values.{pair}" for pair in pairs),
                ],
                ["logits", *(f"present.{pair}" for pair in pairs)],
            ),
        ),
    }


def _save(graph: Any, path: Path, level: int | None = None) -> None:
    """Write a graph. If one file would be too large, its weights are in a second one (``.onnx_data``).

    Args:
        level: see ``LEVEL``; None leaves the weights as they are.
    """
    import onnx_ir

    if level is not None:
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            source, target = Path(scratch) / "source.onnx", Path(scratch) / "target.onnx"
            onnx_ir.save(graph, source, external_data="source.data")
            quantise(source, target, level)
            loaded = onnx_ir.load(target)
            onnx_ir.external_data.load_to_model(loaded)  # the scratch folder goes away
            _save(loaded, path)
        return
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    onnx_ir.save(graph, path, external_data=f"{path.name}_data" if size > _MOST_IN_ONE_FILE else None)


def _write_configs(
    folder: Path,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    precision: Precision,
) -> None:
    """Write the files that transformers.js reads next to the graphs."""
    config = model.config
    text = {**config.text_config.to_dict(), "_name_or_path": ""}
    heads = text.setdefault("num_key_value_heads", text["num_attention_heads"])
    text["num_key_value_heads"] = heads or text["num_attention_heads"]
    text["head_dim"] = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    values = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": config.image_token_id,
        "image_seq_length": config.num_image_tokens,
        "text_config": text,
        "vision_config": {"model_type": config.vision_config.model_type},
        "transformers.js_config": {"dtype": precision},
    }
    no_work = ("convert_rgb", "resize", "center_crop", "pad", "rescale", "normalize")
    image_processor = {f"do_{step}": step == "convert_rgb" for step in no_work} | {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
    }
    # The number of image tokens is fixed: with patches of this size the image's own size adds none.
    own = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": _HUGE,
        "num_additional_image_tokens": config.num_image_tokens,
        "vision_feature_select_strategy": "full",
    }
    files = {"config": values, "preprocessor_config": image_processor, "processor_config": own}
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    pipeline = folder / "tokenizer.json"  # transformers.js would add BOS to the template's
    steps = without_bos(json.loads(pipeline.read_text(encoding="utf-8")))
    pipeline.write_text(json.dumps(steps, ensure_ascii=False), encoding="utf-8")
    model.generation_config.save_pretrained(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _compare_pixels(folder: Path, processor: TinyLlavaProcessor, *, has_doubles: bool) -> None:
    """Hold the graph's preprocessing against the processor's: every value equal."""
    pixels = Pixels(processor, has_doubles=has_doubles)
    random = np.random.default_rng(1)
    for height, width in _SIZES:
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = processor.to_pixels([Image.fromarray(image)])
        found = pixels(torch.from_numpy(_raw(image)))
        same = expected.shape == found.shape
        difference = float((expected - found).abs().max()) if same else float("inf")
        if not difference <= 1e-6:
            raise CheckpointError(
                f"{folder}: not exported: the graph's pixels of an image of {width} x {height} differ by "
                f"up to {difference:.3g} from those of {type(processor.image_processor).__name__}."
            )


def _raw(image: Any) -> Any:
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None]


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """The results of the model itself."""

    sequence: Tensor
    """[1, N]: the prompt, and a greedy answer."""
    num_prompt: int
    logits: Tensor
    """[N - 1, vocabulary]"""


def _make_reference(model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor) -> _Reference:
    inputs = encode_example(processor)
    given = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask", "pixel_values")}
    sequence = model.generate(
        **given, do_sample=False, min_new_tokens=_NUM_STEPS, max_new_tokens=_NUM_STEPS, num_beams=1
    )
    logits = model(input_ids=sequence[:, :-1], pixel_values=given["pixel_values"]).logits[0]
    return _Reference(
        sequence=sequence.cpu(), num_prompt=given["input_ids"].shape[1], logits=logits.float().cpu()
    )


def _compare(folder: Path, reference: _Reference, config: TinyLlavaConfig, tolerance: float) -> Agreement:
    """Run the prompt, then the answer token by token with the cache.

    Raises:
        CheckpointError: a graph does not open, or the logits differ by more than ``tolerance`` deviations.
    """
    graphs, ids = OpenGraphs(folder, config), reference.sequence[:, :-1].numpy()
    ends = range(reference.num_prompt, ids.shape[1] + 1)
    steps = zip([0, *ends], ends, strict=False)
    found = torch.cat([graphs.feed(ids[:, start:end]) for start, end in steps])
    expected = reference.logits
    difference = float((expected - found).abs().max()) if torch.isfinite(found).all() else float("inf")
    answer = slice(reference.num_prompt - 1, None)
    equal = expected[answer].argmax(-1) == found[answer].argmax(-1)
    agreement = Agreement(
        largest_difference=difference,
        deviation=float(expected.std()),
        num_equal=int(equal.sum()),
        num_tokens=len(equal),
    )
    if not difference <= tolerance * agreement.deviation:
        raise CheckpointError(
            f"{folder}: not exported: {agreement}; allowed: {tolerance:g} standard deviations."
        )
    return agreement


class OpenGraphs:
    """The three graphs of a folder in onnxruntime, with the cache of one sequence.

    Raises:
        CheckpointError: a graph does not open.
    """

    def __init__(self, folder: Path, config: TinyLlavaConfig) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = torch.get_num_threads()
        names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
        try:
            self.vision, self.embed, self.decoder = (
                onnxruntime.InferenceSession(
                    next(folder.glob(f"{name}*.onnx")), options, providers=["CPUExecutionProvider"]
                )
                for name in names
            )
        except Exception as error:  # onnxruntime's errors have no base of their own
            raise CheckpointError(f"onnxruntime cannot open the exported graphs: {error}") from error
        self.image_token_id = config.image_token_id
        self.length = 0
        self.cached = {
            entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
            for entry in self.decoder.get_inputs()[3:]
        }

    def feed(self, ids: Any) -> Tensor:
        """Run the next tokens [1, N] and return their logits [N, vocabulary]; the image is the example's."""
        embeds = self.embed.run(None, {"input_ids": ids})[0]
        if (ids == self.image_token_id).any():
            features = self.vision.run(None, {"pixel_values": _raw(example_image())})[0]
            embeds[ids == self.image_token_id] = features.reshape(-1, features.shape[-1])
        return torch.from_numpy(self.feed_embeds(embeds)[0])

    def feed_embeds(self, embeds: Any) -> Any:
        """Run the next tokens, embedded [1, N, D], and return their logits [1, N, vocabulary]."""
        start, self.length = self.length, self.length + embeds.shape[1]
        fed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(start, self.length)[None],
        }
        logits, *present = self.decoder.run(None, fed | self.cached)
        self.cached = dict(zip(self.cached, present, strict=True))
        return logits
