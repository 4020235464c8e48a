"""``tinyllava train VARIANT``: resolve a run, check it, train its stages."""

import argparse
import dataclasses
import os
from pathlib import Path

from tinyllava.cli.parser import CommandParser, add_data_options, check_model, own_data
from tinyllava.config import ModelConfig, Run, Stage, Validation
from tinyllava.data.mixtures import resolve
from tinyllava.data.readers.containers import SUFFIXES, is_record_file
from tinyllava.data.readers.folder import is_image_folder
from tinyllava.data.readers.hub import is_hub_name
from tinyllava.data.sources import count_samples, parse_source
from tinyllava.errors import ConfigError, DataError
from tinyllava.parts.folders import recorded_model, recorded_name
from tinyllava.planning.check import check
from tinyllava.planning.launch import choose_processes, launch
from tinyllava.recipes.paper import PUBLISHED, as_published
from tinyllava.recipes.recipe import describe, fit_to
from tinyllava.recipes.variants import find_run

_HELP = """
Train a variant of the paper or your own model. The result is a self-contained
checkpoint.

  tinyllava train base-Sig-Phi --data /data
      on the files of Table 2, in their published layout in /data
  tinyllava train base --from CKPT --data my.json
      fine-tune a checkpoint on your own records
  tinyllava train my_recipes.py:MINE --data /data
      your own run: a Python file and a name in it
  tinyllava train my_recipes.py:MINE-Sig-Phi --data /data
      your own recipe with these parts
  tinyllava train base-C-TL --data /data --code llava
      with the settings of published code
  tinyllava train base-Sig-Phi --data /data --gpus 4
      on four GPUs of this machine (default: all of them)

VARIANT is RECIPE-ENCODER-LLM[-DATASET][-CONNECTOR], e.g. share-Sig-Phi (see
`tinyllava show variants`). With --from, the checkpoint defines the model, so a
recipe name is enough. Every setting is an option, e.g.
--finetune.learning-rate 1e-5 --model.connector resampler
--hardware.device-batch-size 4. `tinyllava train VARIANT --options` lists all
options with their values. Run the same command again to resume.
"""


def _make_parser() -> CommandParser:
    """Return the parser of the options that are not settings of a run."""
    parser = CommandParser("train", _HELP)
    parser.add_argument("variant", help="variant, FILE.py:NAME, or a recipe with --from")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        help="data folder of Table 2, or your own record file or folder of images (repeatable), with "
        "options such as FILE,weight=2 or FILE,repeat=2,limit=500,seed=1",
    )
    add_data_options(parser)
    parser.add_argument(
        "--from",
        "--start-from",
        dest="start_from",
        default="",
        metavar="CHECKPOINT",
        help="checkpoint folder to start from; runs only the last stage, on its model",
    )
    parser.add_argument(
        "--held-out",
        default="",
        metavar="FILE|10%",
        help="measure the last stage's loss on these records, which are not trained on, ten times or every "
        "--STAGE.validation.every-steps",
    )
    parser.add_argument(
        "--early-stopping",
        type=int,
        default=0,
        metavar="N",
        help="end after N validations without a lower held-out loss, with the weights of the lowest",
    )
    parser.add_argument(
        "--keep", type=int, default=None, metavar="N", help="keep the last N checkpoints of each stage"
    )
    parser.add_argument(
        "--add-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="tokens that questions and answers may contain, such as '<loc_0>'; their rows are trained",
    )
    parser.add_argument("--code", default="", help=f"settings of published code: {', '.join(PUBLISHED)}")
    parser.add_argument("--only", default="", help="run only this stage")
    parser.add_argument(
        "--output", default="", help="run folder (default: runs/NAME; with --from: runs/NAME-tuned-RECIPE)"
    )
    parser.add_argument(
        "--gpus", type=int, default=0, help="GPUs, one process each (default: all that the batch divides by)"
    )
    parser.add_argument("--options", action="store_true", help="list all options of the run and exit")
    return parser


def main(arguments: list[str]) -> int:
    """Train; print the folder of the model as the last line."""
    known, rest = _make_parser().parse_known_args(arguments)
    if known.start_from:
        known.start_from = str(check_model(known.start_from))
    model = recorded_model(Path(known.start_from)) if known.start_from else None
    run = find_run(known.variant, model)
    every_stage = list(run.stages)
    run = _with_shortcuts(as_published(run, known.code) if known.code else run, known)
    if model:
        run = _on_checkpoint(run, model, known)
    num_records = _count_few(known)
    if num_records:
        run = dataclasses.replace(
            run, stages={name: fit_to(stage, num_records) for name, stage in run.stages.items()}
        )
    run = _with_options(run, ["--help"] if known.options else rest, known.variant)
    if known.add_tokens:
        tokens = tuple(dict.fromkeys([*run.model.add_tokens, *known.add_tokens]))
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, add_tokens=tokens))
    if model and dataclasses.replace(run.model, add_tokens=model.add_tokens) != model:
        raise ConfigError(f"--model.* with --from {known.start_from}: {_describe_change(model, run.model)}")

    if num_records:
        check(run)  # before the settings are put into words
    num_processes = choose_processes(known.gpus, run)
    if num_processes > 1:
        check(run, num_ranks=num_processes)
        print(f"{num_processes} processes share each batch of {_batch_sizes(run)} samples")
        return launch(["train", *arguments], num_processes)
    if num_records and os.environ.get("RANK", "0") == "0":
        for name, stage in run.stages.items():
            print(f"{name}: {describe(stage, num_records)} (change them with --{name}.*)")

    left_out = every_stage[: every_stage.index(known.only)] if known.only and not run.start_from else []
    if left_out and os.environ.get("RANK", "0") == "0":
        print(
            f"{known.only}: starts without {', '.join(left_out)}, so the connector is untrained. To continue "
            "from a checkpoint of it, add --from RUN/model."
        )

    from tinyllava.training.run import train

    folder = train(run)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
        print(f"\nmodel: {folder}\nnext: tinyllava chat IMAGE --model {folder}")
    return 0


def _batch_sizes(run: Run) -> str:
    return " and ".join(dict.fromkeys(str(stage.global_batch_size) for stage in run.stages.values()))


def _record_files(known: argparse.Namespace) -> tuple[str, ...]:
    """Return the record files and image folders named by --data; the rest are roots of mixtures."""
    return tuple(
        given
        for given, path in ((given, parse_source(given).name) for given in known.data)
        if is_hub_name(path)
        or is_record_file(path)
        or is_image_folder(Path(path))
        or (known.reader and Path(path).exists())
    )


def _with_shortcuts(run: Run, known: argparse.Namespace) -> Run:
    """Apply --data, --images, --from, --only, --held-out, --early-stopping, --keep and --output."""
    files = _record_files(known)
    folders = [path for path in known.data if path not in files]
    for folder in folders:
        if not Path(folder).is_dir():
            raise DataError(f"--data {folder}: not a folder and not a record file ({', '.join(SUFFIXES)}).")
    if len(folders) > 1:
        raise ConfigError(
            f"--data {' --data '.join(folders)}: give only one folder, with all mixtures in it."
        )
    own = {"--images": known.images, "--column": " ".join(known.column), "--reader": known.reader}
    given = next((option for option, value in own.items() if value), "")
    if given and not files:
        raise ConfigError(f"{given} {own[given]}: needs --data FILE.json. Add it, or leave out {given}.")
    stages = dict(run.stages)
    if known.start_from:
        stages = dict([list(stages.items())[-1]])
    if known.only:
        if known.only not in stages:
            raise ConfigError(f"--only {known.only}: no such stage; this run has {', '.join(run.stages)}.")
        stages = {known.only: stages[known.only]}
    if files:
        name = list(stages)[-1]
        stages[name] = dataclasses.replace(stages[name], data=own_data(known, *files))
    stages |= _with_validation(list(stages.items())[-1], known)
    if known.skip:
        stages = {
            name: dataclasses.replace(
                stage, data=dataclasses.replace(stage.data, skip=(*stage.data.skip, *known.skip))
            )
            for name, stage in stages.items()
        }
    return dataclasses.replace(
        run,
        stages=stages,
        start_from=known.start_from or run.start_from,
        output=known.output or run.output,
        data_root=folders[0] if folders else run.data_root,
        hardware=run.hardware
        if known.keep is None
        else dataclasses.replace(run.hardware, keep_checkpoints=known.keep),
    )


def _with_validation(last: tuple[str, Stage], known: argparse.Namespace) -> dict[str, Stage]:
    """Return the last stage by name, with the settings of --held-out and --early-stopping."""
    name, stage = last
    changes: dict[str, object] = {"held_out": known.held_out} if known.held_out else {}
    if known.early_stopping:
        changes |= {"patience": known.early_stopping, "result": "best"}
    return {name: dataclasses.replace(stage, validation=dataclasses.replace(stage.validation, **changes))}  # type: ignore[arg-type]


_LARGE_BYTES = 200_000_000
"""Record files above this size hold many records and take seconds to count."""


def _count_few(known: argparse.Namespace) -> int:
    """Return the number of samples of the user's own that a checkpoint is fine-tuned on; 0 if it is large.

    It is also 0 where the settings are somebody's own: of a user's file, or of published code.
    """
    files = _record_files(known)
    if not known.start_from or known.code or ":" in known.variant or not files:
        return 0
    try:
        found = resolve(own_data(known, *files))
    except DataError:  # told with all that is wrong with the run
        return 0
    if sum(path.stat().st_size for _, places in found for path, _ in places) > _LARGE_BYTES:
        return 0

    from tinyllava.data.records import read_raw

    counts = [
        sum(1 for path, _ in places for _ in read_raw(path, reader=known.reader)) for _, places in found
    ]
    num_samples = sum(count_samples([source for source, _ in found], counts))
    return round(num_samples * (1 - (Validation(held_out=known.held_out).share or 0)))


def _on_checkpoint(run: Run, model: ModelConfig, known: argparse.Namespace) -> Run:
    """Give a run the model and name of the checkpoint; a run from a user's file keeps its name."""
    if ":" in known.variant:
        return dataclasses.replace(run, model=model)
    name = f"{recorded_name(Path(known.start_from))}-tuned-{run.recipe or known.variant}"
    return dataclasses.replace(run, model=model, name=name)


def _describe_change(model: ModelConfig, wanted: ModelConfig) -> str:
    """Name the first setting that differs from the checkpoint's model."""
    fields = (field.name for field in dataclasses.fields(model))
    name = next(name for name in fields if getattr(model, name) != getattr(wanted, name))
    option = f"--model.{name.replace('_', '-')}"
    return (
        f"the checkpoint has {name} {getattr(model, name)!r}, not {getattr(wanted, name)!r}; leave "
        f"out {option}, or train from the parts without --from."
    )


def _with_options(run: Run, rest: list[str], name: str) -> Run:
    """Apply every other option; ``--finetune.x`` is short for ``--stages.finetune.x``."""
    import tyro

    rest = [
        next((f"--stages.{arg[2:]}" for stage in run.stages if arg.startswith(f"--{stage}.")), arg)
        for arg in rest
    ]
    return tyro.cli(
        Run,
        default=run,
        args=rest,
        prog=f"tinyllava train {name}",
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
