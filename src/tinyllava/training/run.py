"""A run: the stages in order, each resumed, reused or trained; at the end one self-contained folder.

Paper: section 3.2, pre-training for feature alignment, then supervised fine-tuning.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from safetensors import SafetensorError
from transformers import set_seed

from tinyllava.config import COMPONENTS, Run, Stage, to_json
from tinyllava.data.dataset import Collator
from tinyllava.errors import ImageError, TrainingError
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.tuning import Ledger, apply_tuning, close_ledger, merge_adapters, open_ledger
from tinyllava.planning.check import check
from tinyllava.training import checkpoints
from tinyllava.training.prepare import Prepared, prepare
from tinyllava.training.progress import StageProgress
from tinyllava.training.trainer import StageTrainer, make_arguments

console = Console(highlight=False, markup=False, soft_wrap=True)


def train(run: Run) -> Path:
    """Train every stage of a run and return the folder of the finished model.

    Calling it again after a kill goes on from the last checkpoint, with the same weights bit by bit; stages
    that this or a neighbouring run has finished with the same inputs are reused. Under ``torchrun`` every
    process calls it; the first one writes.

    Raises:
        ConfigError: the run cannot work; everything that is wrong is listed.
        DataError, ImageError, CheckpointError, TrainingError: see the stages.
    """
    check(run)
    processes = PartialState(cpu=not torch.cuda.is_available())
    with processes.main_process_first():
        _save_or_compare(run)
    set_seed(run.seed)
    # In fp32 whatever it was saved in: in half precision small updates are rounded away.
    model, processor = (
        open_checkpoint(run.start_from, dtype="float32") if run.start_from else assemble(run.model)
    )
    papers: dict[str, Any] = {}
    for name, stage in run.stages.items():
        papers[name] = _run_stage(run, name, stage, model, processor)
    folder = run.folder / "model"
    provenance = {"environment": checkpoints.describe_environment(), "stages": papers}
    if processes.is_main_process:
        checkpoints.save_model(folder, model, processor, run, provenance)
    processes.wait_for_everyone()
    return folder


def _save_or_compare(run: Run) -> None:
    """Write the resolved config; refuse to mix two different runs in one folder.

    Raises:
        TrainingError: the folder holds another run, or cannot be made.
    """
    path = run.folder / "run.json"
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"{run.folder}: cannot be made ({error.strerror}); choose another folder with --output."
        ) from error
    if path.exists() and path.read_text(encoding="utf-8") != to_json(run):
        raise TrainingError(
            f"{path}: this folder holds a run with other settings; choose another --output, "
            f"or delete {run.folder} to begin anew."
        )
    if not PartialState().is_main_process:
        return
    path.write_text(to_json(run), encoding="utf-8")
    environment = json.dumps(checkpoints.describe_environment(), indent=2)
    (run.folder / "environment.json").write_text(environment + "\n", encoding="utf-8")


def _run_stage(
    run: Run, name: str, stage: Stage, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor
) -> dict[str, Any]:
    """Bring the model through one stage and return the stage's papers."""
    folder = run.folder / name
    folder.mkdir(exist_ok=True)
    apply_tuning(model, stage)
    ledger = open_ledger(model)
    prepared = prepare(run, stage, model, processor)
    key = checkpoints.stage_key(
        run,
        stage,
        ledger,
        prepared.digest,
        prepared.examples.template or processor.chat_template,
        model,
        processor,
    )
    # One answer for all ranks, whatever another run finishes meanwhile.
    [done] = broadcast_object_list([checkpoints.find_stage(run.folder.parent, key)])
    if done is not None:
        _say(f"{name}: done before, taken from {done}")
        checkpoints.load_stage(done, model)
        papers = json.loads((done / checkpoints.PAPERS).read_text(encoding="utf-8"))
    else:
        _announce(name, stage, ledger, prepared)
        papers = _train_stage(run, name, stage, model, processor, prepared, folder)
        ledger = close_ledger(ledger, model)
        papers = {"key": key, "stage": name, **papers, "data": prepared.summary()}
        if PartialState().is_main_process:
            ledger.save(folder / "ledger.json")
            checkpoints.save_stage(folder, model, papers)
    merge_adapters(model)
    model.requires_grad_(False)
    return dict(papers)


def _train_stage(
    run: Run,
    name: str,
    stage: Stage,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    prepared: Prepared,
    folder: Path,
) -> dict[str, Any]:
    checkpoints.require_space(folder, model)
    if run.hardware.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    transformers.utils.logging.set_verbosity_error()  # its notes on our lean checkpoints would only mislead
    arguments = make_arguments(
        stage,
        run.hardware,
        folder,
        seed=run.seed,
        num_samples=len(prepared.examples),
        report_to=run.report_to,
    )
    progress = StageProgress(name, folder / "metrics.jsonl")
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=prepared.examples,
        stage=stage,
        data_collator=Collator(processor.tokenizer.pad_token_id),
        callbacks=[progress],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    progress.trainer = trainer
    start = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=checkpoints.last_checkpoint(folder))
    except ImageError as error:  # a worker process hands over its whole traceback as the message
        raise ImageError(str(error).rpartition("ImageError: ")[2].strip()) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if "No space left" in str(error) or "PytorchStreamWriter" in str(error):
            raise TrainingError(
                f"{folder}: the disk is full; free some space and run the same command again."
            ) from error
        raise
    finally:
        progress.progress.stop()
    _release(trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "num_steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - start, 1),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def _release(trainer: StageTrainer) -> None:
    """Give the model back as it was before accelerate prepared it, so that the next stage's Trainer can.

    Accelerate leaves a model with its mark alone: the next stage would run without autocast.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    model._is_accelerate_prepared = False
    vars(model.config).pop("use_cache", None)  # the Trainer's own; a model of reused stages is saved without
    trainer.accelerator.free_memory()


def _announce(name: str, stage: Stage, ledger: Ledger, prepared: Prepared) -> None:
    """Say what is about to be trained on what."""
    data = prepared.summary()
    _say(f"\n{name}: {data['num_samples']:,} samples, {data['num_tokens']:,} tokens")
    for component in COMPONENTS:
        trained = ledger.num_parameters(component, trained_only=True)
        rate = f" at {stage.learning_rate_of(component):g}" if trained else ""
        _say(f"  {component:<15} {trained:>13,} of {ledger.num_parameters(component):>13,} trained{rate}")
    if prepared.skipped:
        _say("  left out: " + ", ".join(f"{count} {defect}" for defect, count in prepared.skipped.items()))


def _say(text: str) -> None:
    if PartialState().is_main_process:
        console.print(text)
