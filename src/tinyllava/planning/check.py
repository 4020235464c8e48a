"""Check all rules about a run's fields together, and raise one error, before anything is loaded.

Paper: section 4.1.2 sets most values. The rules are the limits of the architectures of Figure 2.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from tinyllava.config import Component, ModelConfig, Run
from tinyllava.data.defects import check_skip
from tinyllava.data.mixtures import find_mixture, resolve
from tinyllava.errors import ConfigError, TinyLlavaError
from tinyllava.parts.families import VISION_FAMILIES
from tinyllava.parts.folders import check_checkpoint, read_config, recorded_model
from tinyllava.parts.language import LanguageModel
from tinyllava.parts.resolve import Found, find_parts
from tinyllava.parts.templates import Template
from tinyllava.parts.vision import VisionEncoder
from tinyllava.planning import rules
from tinyllava.planning.rules import Limits, literal_tokens

TRACKERS = (
    "tensorboard",
    "wandb",
    "mlflow",
    "comet_ml",
    "clearml",
    "neptune",
    "swanlab",
    "trackio",
    "dvclive",
)
"""Trackers of the transformers Trainer, by the package that each needs."""
_OF_ACCELERATE = {
    "ACCELERATE_USE_FSDP": "--hardware.sharding all",
    "ACCELERATE_USE_DEEPSPEED": "--hardware.sharding all",
    "ACCELERATE_USE_MEGATRON_LM": "--hardware.sharding all",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--hardware.sharding all",
    "ACCELERATE_DYNAMO_BACKEND": "--hardware.compile True",
}
"""Variables by which accelerate launch would have the model changed, and our own settings for the same."""


def check(run: Run, *, on_this_machine: bool = True, num_ranks: int = 0) -> None:
    """Check a run, and reject it if it cannot work.

    Args:
        on_this_machine: also check this machine: record files, ranks, trackers and CUDA.
        num_ranks: number of training processes; 0 means those of a launcher, or else one.

    Raises:
        ConfigError: lists every problem on a line of its own, with the field, the value and the fix.
    """
    problems = find_problems(run, on_this_machine=on_this_machine, num_ranks=num_ranks)
    if problems:
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ConfigError(f"{run.name or 'run'}: {len(problems)} problem(s):\n{listed}")


def find_problems(run: Run, *, on_this_machine: bool = True, num_ranks: int = 0) -> list[str]:
    """Return the problems of a run in words; see ``check``."""
    problems: list[str] = []
    limits = _limits_of_checkpoint(run, problems) or _limits_of_parts(run, problems)
    problems += _run_problems(run)
    trained_before = bool(run.start_from)
    for name, stage in run.stages.items():
        for rule in rules.RULES:
            problems += [f"stages.{name}.{problem}" for problem in rule(stage, limits)]
        problems += [f"stages.{name}.{p}" for p in rules.source_problems(stage, trained_before)]
        problems += [f"stages.{name}.{p}" for p in rules.hardware_problems(stage, run.hardware)]
        trained_before = trained_before or stage.connector.trains
    problems += _data_problems(run, on_this_machine)
    if on_this_machine:
        problems += _machine_problems(run, num_ranks)
    return problems


def _limits_of_checkpoint(run: Run, problems: list[str]) -> Limits | None:
    """Return the limits of the checkpoint that a run starts from; None if it cannot be read."""
    folder = Path(run.start_from)
    if not run.start_from or not (folder / "config.json").is_file():
        return None
    try:
        recorded, config = recorded_model(folder), read_config(folder)
    except TinyLlavaError as error:
        problems.append(f"start_from: {error}")
        return Limits(num_layers={"connector": 0}, language="", context_tokens=None, num_image_tokens=None)
    if run.model.connector != recorded.connector:
        problems.append(
            f"model.connector = {run.model.connector!r}: the checkpoint {folder} has {recorded.connector!r}; "
            "keep it, or train from the parts."
        )
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    is_cnn = config.get("encoder_kind") == "cnn"
    return Limits(
        num_layers={
            "vision_encoder": 0 if is_cnn else vision.get("num_hidden_layers"),
            "connector": 0,
            "language_model": text.get("num_hidden_layers"),
        },
        language=f"the language model of {folder}",
        context_tokens=text.get("max_position_embeddings"),
        num_image_tokens=config.get("image_seq_length"),
        without_linears=_without_linears(vision.get("model_type", "")),
    )


def _limits_of_parts(run: Run, problems: list[str]) -> Limits:
    """Resolve the parts. A missing part is a problem, and the rules about it are skipped."""
    model, found = run.model, find_parts(run.model)
    problems += [
        f"model.{name}: empty; give a name or a folder (`tinyllava show` lists names)."
        for name in ("vision_encoder", "language_model")
        if not getattr(model, name) and not run.start_from  # a checkpoint brings its own
    ]
    problems += [f"model.{name}: {error}" for name, error in found.errors.items()]
    encoder, language = found.encoder, found.language
    problems += _model_problems(model, found)
    problems += _image_processor_problems(model, encoder)
    return Limits(
        num_layers={
            "vision_encoder": encoder.num_kept_layers if encoder else None,
            "connector": 0,
            "language_model": language.num_layers if language else None,
        },
        language=language.name if language else "",
        context_tokens=language.context_tokens if language else None,
        num_image_tokens=found.num_image_tokens,
        without_linears=_without_linears(encoder.family if encoder else ""),
    )


def _without_linears(family: str) -> tuple[Component, ...]:
    known = VISION_FAMILIES.get(family)
    return ("vision_encoder",) if known and not known.has_linears else ()


def _model_problems(model: ModelConfig, found: Found) -> Iterator[str]:
    if found.encoder:
        yield from _size_problems(model.image_size_px, found.encoder)
    if model.template == "caption":
        yield "model.template = 'caption': drops every question. Use it for a stage, not for a model."
    elif found.language and found.template:
        yield from _template_problems(found.template, found.language)


def _size_problems(image_size_px: int, encoder: VisionEncoder) -> Iterator[str]:
    if image_size_px < 0:
        yield f"model.image_size_px = {image_size_px}: must not be negative. 0 means the size of the encoder."
    elif image_size_px and not encoder.any_size and image_size_px != encoder.image_size_px:
        yield (
            f"model.image_size_px = {image_size_px}: the positions of {encoder.name} are for "
            f"{encoder.image_size_px} px; leave it at 0."
        )


def _template_problems(template: Template, language: LanguageModel) -> Iterator[str]:
    """A template that writes marks of its own needs a tokenizer that knows them and stops at them."""
    literals = literal_tokens(template.text)
    if literals and language.eos_token not in literals:
        yield (
            f"model.template = {template.name!r}: writes {' or '.join(sorted(literals))}, but the "
            f"tokenizer of {language.name} ends with {language.eos_token!r}; leave it empty "
            f"({language.template!r})."
        )


def _run_problems(run: Run) -> Iterator[str]:
    if not run.stages:
        yield "stages: empty; use those of a recipe, such as tinyllava.recipes.paper.BASE.stages."
    if not run.name and not run.output:
        yield "name: empty; give a name, which also names the run folder."
    if not 0 <= run.seed < 2**32:
        yield f"seed = {run.seed}: must be from 0 to {2**32 - 1}."
    if run.start_from and run.folder.resolve() in (
        Path(run.start_from).resolve(),
        *Path(run.start_from).resolve().parents,
    ):
        yield f"output = {run.folder}: contains start_from = {run.start_from}; choose another folder."
    for field in ("device_batch_size", "num_workers", "save_steps", "keep_checkpoints"):
        value = getattr(run.hardware, field)
        if value < 0:
            yield f"hardware.{field} = {value}: must not be negative."
    if run.hardware.timeout_seconds < 1:
        yield f"hardware.timeout_seconds = {run.hardware.timeout_seconds}: must be at least 1, such as 3600."
    for tracker in run.report_to:
        if tracker not in TRACKERS:
            yield f"report_to = {tracker!r}: unknown tracker; known: {', '.join(TRACKERS)}."
    if run.hardware.sharding != "none" and run.hardware.precision == "fp16":
        yield (
            f"hardware.sharding = {run.hardware.sharding!r}: fp16 needs loss scaling, which sharding does "
            "not support; set hardware.precision to bf16 or fp32."
        )


def _image_processor_problems(model: ModelConfig, encoder: VisionEncoder | None) -> Iterator[str]:
    """Try the image processor of a local folder: at the first batch it would be a traceback."""
    if encoder is None or not Path(encoder.path).is_dir() or model.image_size_px < 0:
        return
    from tinyllava.model.assemble import load_image_processor

    try:
        load_image_processor(model, encoder)
    except (TinyLlavaError, OSError, ValueError) as error:
        yield f"model.vision_encoder = {model.vision_encoder!r}: {error}"


def _has_cuda() -> bool:
    """Ask torch, which is imported only for a run that needs to know."""
    import torch

    return torch.cuda.is_available()


def _has_tf32() -> bool:
    import torch

    return _has_cuda() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def _machine_problems(run: Run, num_ranks: int) -> Iterator[str]:
    if run.start_from and not (Path(run.start_from) / "config.json").is_file():
        try:
            check_checkpoint(Path(run.start_from))
        except TinyLlavaError as error:
            yield f"start_from: {error}"
    for tracker in run.report_to:
        if tracker in TRACKERS and find_spec(tracker) is None:
            source = "'tinyllava[trackers]'" if tracker == "tensorboard" else tracker
            yield f"report_to = {tracker!r}: not installed; run pip install {source}, or leave it out."
    for variable, setting in _OF_ACCELERATE.items():
        value = os.environ.get(variable, "no")
        if value.lower() not in ("no", "false", ""):
            yield (
                f"{variable} = {value!r}: set by accelerate's configuration, but only the run's own settings "
                f"count. Switch it off with `accelerate config`, and use {setting} if you need it."
            )
    num_ranks = num_ranks or int(os.environ.get("WORLD_SIZE", "1"))
    for name, stage in run.stages.items():
        yield from (f"stages.{name}.{p}" for p in rules.batch_problems(stage, run.hardware, num_ranks))
        yield from (f"stages.{name}.{p}" for p in rules.bits_problems(stage))
    if run.hardware.precision == "fp16" and not _has_cuda():
        yield "hardware.precision = 'fp16': needs a CUDA device; choose auto, bf16 or fp32."
    if run.hardware.precision == "tf32" and not _has_tf32():
        yield "hardware.precision = 'tf32': needs an NVIDIA GPU since Ampere (A100); choose auto or fp32."


def _data_problems(run: Run, on_this_machine: bool) -> Iterator[str]:
    """Names of records and skips; on this machine also the files."""
    for name, stage in run.stages.items():
        try:
            check_skip(stage.data.skip)
            held = stage.validation.held_out if stage.validation.share is None else ""
            for record in (*stage.data.records, *([held] if held else [])):
                find_mixture(record)
            if on_this_machine and not (wanted := _wanted_root(run, name)):
                resolve(stage.data, run.data_root)
                if held:
                    resolve(replace(stage.data, records=(held,)), run.data_root)
            elif on_this_machine:
                yield f"stages.{name}.{wanted}"
        except TinyLlavaError as error:
            yield f"stages.{name}.data: {error}"
            continue
        for mixture in filter(None, map(find_mixture, stage.data.records)):
            if stage.template == "caption" and mixture.num_text_only:
                yield (
                    f"stages.{name}.template = 'caption': {mixture.name} has {mixture.num_text_only:,} "
                    "records without an image, of which only the answers would remain. Leave the template "
                    "empty."
                )


def _wanted_root(run: Run, name: str) -> str:
    """Say how a stage comes by data when it names a mixture and no data root is given; empty if it has it."""
    found = (find_mixture(record) for record in run.stages[name].data.records)
    mixture = next((mixture for mixture in found if mixture), None)
    if mixture is None or run.data_root:
        return ""
    may_start_later = not run.start_from and name != list(run.stages)[-1]
    return (
        f"data.records = {mixture.name!r}: a mixture of Table 2, which needs data_root. Give --data FOLDER "
        f"with {mixture.records} in it (see `tinyllava show data`), or your own file with "
        f"--{name}.data.records FILE"
        + (", or --from CHECKPOINT to fine-tune only." if may_start_later else ".")
    )
