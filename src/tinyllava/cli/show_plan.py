"""The output of ``tinyllava show VARIANT``: the resolved run, and its estimates in tables."""

from pathlib import Path

from tinyllava.cli.show import TABLES, Rows, format_table
from tinyllava.config import COMPONENTS, Component, Run, Stage, to_json
from tinyllava.errors import UnknownNameError
from tinyllava.parts.families import LANGUAGE_FAMILIES, VISION_FAMILIES
from tinyllava.planning.check import find_problems
from tinyllava.planning.plan import Plan, measured_speed, plan_run
from tinyllava.planning.rules import batch_problems
from tinyllava.planning.speed import GPUS, REACHED
from tinyllava.recipes.paper import as_published
from tinyllava.recipes.variants import find_run


def show_run(
    name: str, *, gpu: str, num_gpus: int, code: str = "", as_json: bool = False, measured: str = ""
) -> str:
    """Return the text for one variant or run of a user's file.

    Args:
        measured: file of ``benchmarks/gpu.py`` whose speed takes the place of the one that is expected.

    Raises:
        UnknownNameError: no such variant, GPU or published code.
        ConfigError: a part of the run is wrong in a way that leaves nothing to plan, or the file is.
    """
    try:
        run = find_run(name)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error} Tables to show: {', '.join(TABLES)}.") from error
    run = as_published(run, code) if code else run
    if as_json:
        return to_json(run).rstrip()
    reached = measured_speed(Path(measured)) if measured else REACHED
    plan = plan_run(run, gpu=gpu, num_gpus=num_gpus, reached=reached)
    sections = [
        f"{run.name}: {run.model.vision_encoder} + {run.model.connector} + {run.model.language_model}",
        _model(run, plan),
        format_table(_stages(run, plan)),
        format_table(_settings(run, plan.precision)),
        format_table(_parameters(plan)),
        format_table(_loads(plan)),
        *_times(plan, measured),
        f"on {num_gpus} x {gpu}; memory per GPU at the max length:"
        + _without_bf16(run, gpu)
        + _without_record(run, plan),
        format_table(_forms(plan)),
        *_proposals(plan),
    ]
    problems = find_problems(run, on_this_machine=False)
    for stage_name, stage in run.stages.items():
        problems += [f"stages.{stage_name}.{p}" for p in batch_problems(stage, run.hardware, num_gpus)]
    if problems:
        sections.append(
            "`tinyllava train` would reject this run:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    return "\n\n".join(sections)


def _without_bf16(run: Run, gpu: str) -> str:
    """Explain how a GPU without bf16 changes the precision of the run."""
    wanted = run.hardware.precision
    if GPUS[gpu].has_bf16 or wanted not in ("auto", "bf16"):
        return ""
    speed = GPUS[gpu].half_flops / GPUS[gpu].fp32_flops
    does = "trains in fp32" if wanted == "auto" else "is emulated and slower than estimated here"
    return (
        f"\n{gpu} has no bf16, so hardware.precision = {wanted!r} {does}; "
        f"--hardware.precision fp16 has {speed:.0f} times the peak of fp32."
    )


def _without_record(run: Run, plan: Plan) -> str:
    """Name the trained parts whose family has no record, because their activations are only estimated."""
    encoder, language = plan.parts.encoder, plan.parts.language
    encoders = [member.family for member in encoder.members or (encoder,)]
    is_trained = any(stage.vision_encoder.trains for stage in run.stages.values())
    unknown = [family for family in encoders if is_trained and family not in VISION_FAMILIES]
    # The gradient of a connector passes the language model's layers, trained or not.
    unknown += [language.family] if language.family not in LANGUAGE_FAMILIES else []
    return "".join(
        f"\nThe architecture {family!r} is unknown. Its activations are estimated like those of a typical "
        "architecture of its size."
        for family in dict.fromkeys(unknown)
    )


def _model(run: Run, plan: Plan) -> str:
    image, context = plan.parts.num_image_tokens, plan.context_tokens
    longest = max((stage.max_length_tokens for stage in run.stages.values()), default=context)
    return (
        f"image tokens   {image} of {plan.parts.num_patches} patches ({run.model.image_aspect})\n"
        f"sequence       max length {longest} of {context} positions, {longest - image} left for text\n"
        f"model folder   {_gigabytes(plan.model_bytes)} in fp32"
    )


def _stages(run: Run, plan: Plan) -> Rows:
    rows: Rows = [("stage", "data", "encoder", "connector", "LLM", "batch", "length", "template")]
    rows += [
        (
            name,
            ", ".join(stage.data.records),
            *(_describe(stage, c) for c in COMPONENTS),
            stage.global_batch_size,
            stage.length,
            stage.template or plan.parts.template,
        )
        for name, stage in run.stages.items()
    ]
    return rows


def _settings(run: Run, precision: str) -> Rows:
    """The rest of a stage's config; the optimizer is AdamW and the schedule a cosine in all of them."""
    rows: Rows = [
        (
            "AdamW, cosine",
            "warm-up",
            "decay",
            "clipped at",
            "max length",
            "grouping",
            "loss normalisation",
            "precision",
        )
    ]
    wanted = run.hardware.precision
    shown = wanted if wanted == precision else f"{wanted}: {precision}"
    rows += [
        (
            name,
            f"{stage.warmup_ratio:.0%}",
            f"{stage.weight_decay:g}",
            f"{stage.max_grad_norm:g}",
            f"{stage.max_length_tokens} tokens",
            stage.group_by,
            stage.loss_norm,
            shown,
        )
        for name, stage in run.stages.items()
    ]
    return rows


def _describe(stage: Stage, component: Component) -> str:
    """Describe how a stage trains a component, and at which rate."""
    tune = stage.tune(component)
    details = {
        "from_layer": f"from layer {tune.first_layer}",
        "lora": f"lora {tune.rank}" + (f" on {tune.bits} bits" if tune.bits < 16 else ""),
    }
    rate = f" at {stage.learning_rate_of(component):g}" if tune.trains else ""
    return details.get(tune.kind, tune.kind) + rate


def _parameters(plan: Plan) -> Rows:
    parts = plan.parts
    rows: Rows = [("parameters", "total", *(f"trained in {stage.name}" for stage in plan.stages))]
    for component, size in parts.sizes.items():
        rows.append(
            (component, f"{size.total:,}", *(f"{stage.trained[component]:,}" for stage in plan.stages))
        )
    rows.append(("all", f"{parts.total:,}", *(f"{sum(stage.trained.values()):,}" for stage in plan.stages)))
    return rows


def _loads(plan: Plan) -> Rows:
    rows: Rows = [
        ("stage", "samples", "steps", "tokens", "per sample", "FLOPs", "hours", "of peak", "checkpoint")
    ]
    for stage in plan.stages:
        checkpoint, load = _gigabytes(stage.checkpoint_bytes), stage.load
        if load is None:
            rows.append((stage.name, "your files", "-", "-", "-", "-", "-", "-", checkpoint))
            continue
        rows.append(
            (
                stage.name,
                f"{load.num_samples:,}",
                f"{load.num_steps:,}",
                f"{load.num_tokens / 1e6:,.0f} M",
                f"{load.mean_tokens:.0f}",
                f"{load.flops:.2e}",
                f"{stage.hours:.1f}",
                f"{stage.utilisation:.0%}",
                checkpoint,
            )
        )
    if loads := [stage.load for stage in plan.stages if stage.load]:
        samples, steps = sum(load.num_samples for load in loads), sum(load.num_steps for load in loads)
        tokens, flops = sum(load.num_tokens for load in loads), sum(load.flops for load in loads)
        hours = sum(stage.hours for stage in plan.stages)
        rows.append(
            (
                "all",
                f"{samples:,}",
                f"{steps:,}",
                f"{tokens / 1e6:,.0f} M",
                "",
                f"{flops:.2e}",
                f"{hours:.1f}",
                "",
                "",
            )
        )
    return rows


def _times(plan: Plan, measured: str) -> list[str]:
    """Return what the time of each stage goes into, and how it is known; nothing for files of the user's."""
    rows: Rows = [("time, min", "computing", "loading", "start-up", "checkpoints", "all")]
    for stage in plan.stages:
        if stage.seconds:
            seconds = (getattr(stage.seconds, name) for name in _TIMES)
            rows.append((stage.name, *(f"{s / 60:,.0f}" for s in seconds)))
    how = f"speed as measured in {measured}" if measured else "speed by a roofline and published times"
    return [f"{format_table(rows)}\n{how}"] if len(rows) > 1 else []


_TIMES = ("computing", "images", "start_up", "checkpoints", "total")


def _forms(plan: Plan) -> Rows:
    rows: Rows = [
        (
            "stage",
            "form",
            "peak memory",
            "device batch",
            "accumulation",
            "weights",
            "AdamW",
            "activations",
            "recomputed",
        )
    ]
    for stage in plan.stages:
        for label, form in stage.forms.items():
            memory = form.memory
            peak = _gigabytes(memory.peak) + ("" if form.fits else ", too much")
            rows.append(
                (
                    stage.name,
                    label,
                    peak,
                    form.device_batch_size,
                    form.accumulation,
                    _gigabytes(memory.weights),
                    _gigabytes(memory.optimizer),
                    _gigabytes(memory.activations),
                    "yes" if form.checkpointing else "no",
                )
            )
    return rows


_OPTIONS = {"LoRA, rank 128": "the recipe lora", "QLoRA, rank 128": "the recipe qlora"}


def _proposals(plan: Plan) -> list[str]:
    """Name a form that fits for each stage that does not fit as it is; first one that trains the same."""
    lines = []
    for stage in plan.stages:
        (label, own), *others = stage.forms.items()
        fitting = [label for label, form in others if form.fits]
        if not own.fits and stage.proposed != label:
            lines.append(
                f"{stage.name} does not fit as it is. It fits with --hardware.{stage.proposed}. Its time is "
                "estimated for that."
            )
        elif not own.fits and fitting:
            lines.append(
                f"{stage.name} does not fit as it is. It fits with {_OPTIONS.get(fitting[0], fitting[0])}."
            )
        elif not own.fits:
            lines.append(f"{stage.name} DOES NOT FIT in any form. Choose more GPUs or larger ones.")
    return ["\n".join(lines)] if lines else []


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
