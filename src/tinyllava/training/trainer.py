"""transformers' Trainer with the additions that the paper needs.

A learning rate per component, lean checkpoints, grouped batches, and a stop if the loss is NaN or infinite.

Paper: section 4.1.2.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil, cos, isfinite, pi
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler

from tinyllava.config import COMPONENTS, Hardware, Run, Sharding, Stage
from tinyllava.data.batches import PackedBatches, RankBatches
from tinyllava.data.workers import begin_worker, out_of_shared_memory
from tinyllava.errors import ConfigError, TrainingError
from tinyllava.model.devices import fastest_attention
from tinyllava.model.modeling import IGNORED
from tinyllava.model.quiet import keeping_random_state
from tinyllava.model.tuning import component_of
from tinyllava.training.compiling import not_compiled
from tinyllava.training.packing import Epochs, pad_stage
from tinyllava.training.precision import choose_precision
from tinyllava.training.sharding import choose_sharding, gather_trained, load_moments, reshard, shard
from tinyllava.training.writing import CheckpointWriter

MOST_SAMPLES = 16
"""Samples of a forward pass where memory does not set the bound: more make nothing faster on a CPU."""


@dataclass
class StageArguments(TrainingArguments):
    """The Trainer's settings, for one device in each process."""

    sharding: Sharding = "none"
    """What the processes divide among them, see ``tinyllava.training.sharding``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.bf16 or self.fp16):  # otherwise that of accelerate's configuration
            self.mixed_precision = "no"

    @property
    def n_gpu(self) -> int:
        """At most 1: the Trainer would wrap the model in ``nn.DataParallel`` and multiply the batch by it."""
        return min(1, int(super().n_gpu))

    @property
    def place_model_on_device(self) -> bool | None:
        """False: the Trainer leaves the model on the host, whole, while its twin is sharded."""
        return None if self.sharding == "none" else False


class StageTrainer(Trainer):
    """Trains one stage.

    Args:
        stage: the stage; its learning rates and grouping are read here, the rest is in ``args``.
        packed: this process's micro-batches, where samples share a row; None pads them.
    """

    def __init__(self, *args: Any, stage: Stage, packed: PackedBatches | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.args.n_gpu <= 1, "see StageArguments"
        if self.accelerator.ddp_handler is not None:  # otherwise DDP holds every gradient twice
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.optimizer: Any
        self.train_dataset: Any
        self.batches: RankBatches
        self.lr_scheduler: Any
        self.model: Any
        self.whole: Any = self.model
        """The model that holds all weights; with sharding ``model`` is its divided twin."""
        self.writer = CheckpointWriter(self.args.sharding, self.args.ddp_timeout_delta)
        self.resumed: Path | None = None
        self.control: Any
        self.stage = stage
        if packed is None:
            self.batches = pad_stage(
                self.args.train_batch_size,
                stage,
                self.train_dataset,
                self.args.seed,
                self.args.world_size,
                self.args.process_index,
            )
        else:
            self.batches = packed
        self.add_callback(Epochs(self.batches))
        self.undo: list[Callable[[], None]] = []
        """Gives the model back as it was: its frozen weights, and layers that are not compiled."""
        self.num_tokens = 0
        self.num_samples = 0
        self._since_log: list[tuple[Tensor, list[str]]] = []
        self.seconds_validating = 0.0
        if stage.loss_norm == "micro":
            self.model_accepts_loss_kwargs = False  # then the Trainer averages the micro-batches' means

    def create_accelerator_and_postprocess(self) -> None:
        """Have accelerate leave a divided model as it is; it would wrap it in DDP."""
        super().create_accelerator_and_postprocess()
        if self.args.sharding != "none":
            accelerator: Any = self.accelerator
            accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)

    def train(self, resume_from_checkpoint: str | None = None, **options: Any) -> Any:
        """Train, from a checkpoint on if there is one; ``whole`` has the result."""
        self.resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        output = super().train(resume_from_checkpoint, **options)
        if self.args.sharding != "none":
            gather_trained(self.model, self.whole)
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The stage's optimizer with one group for each trained component, at its own learning rate.

        Before it, once a checkpoint's weights are in place, the model is divided if that was asked for.
        """
        if self.optimizer is None:
            if self.args.sharding != "none":
                self.model = self.model_wrapped = shard(self.whole, self.args.sharding)
            trained = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            groups = [
                {
                    "params": [p for n, p in trained if component_of(n) == component],
                    "lr": self.stage.learning_rate_of(component),
                    "weight_decay": self.stage.weight_decay,
                    "component": component,
                }
                for component in COMPONENTS
            ]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            self.optimizer = cls([group for group in groups if group["params"]], **options)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of ``rate_factor``, or another one after the same warm-up.

        Transformers' own warm-up has the rate 0 at the first step.
        """
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        inner.register_state_dict_post_hook(self.writer.take_state)
        if self.resumed is not None:  # the optimizer loads its state next
            inner.register_load_state_dict_post_hook(partial(load_moments, self.resumed, self.model))
        if self.lr_scheduler is None:
            num_warmup = ceil(num_training_steps * self.stage.warmup_ratio)
            factor = make_schedule(self.stage, num_training_steps, num_warmup)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        schedule: torch.optim.lr_scheduler.LRScheduler = self.lr_scheduler
        return schedule

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's batches of an epoch, in the order that the stage's grouping gives."""
        args = self.args
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            timeout=args.ddp_timeout if args.dataloader_num_workers else 0,
            worker_init_fn=begin_worker,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Take a step's micro-batches out of the shared memory, where workers prepare the next step's."""
        found: tuple[list[Any], Any] = super().get_batch_samples(
            map(out_of_shared_memory, epoch_iterator), num_batches, device
        )
        return found

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass, in which the host never waits for the device."""
        sample_ids = inputs.pop("sample_ids", [])
        self.num_tokens += inputs.pop("num_tokens", 0)
        self.num_samples += len(sample_ids)
        # Padding stands on the right, where no supervised position looks: without a mask attention is plainly
        # causal, for which PyTorch has its fastest kernels, and the loss is the same.
        inputs.pop("attention_mask", None)
        inputs = send_to_device(inputs, self.args.device, non_blocking=self.args.dataloader_pin_memory)
        inputs = self.train_dataset.unpacked(inputs)
        with fastest_attention(inputs, bf16=self.args.bf16):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._since_log.append((loss, sample_ids))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step, which waits for the device anyway, and look at its loss before anything is saved.

        Raises:
            TrainingError: the loss is not a finite number; the samples are named.
        """
        if "loss" not in logs:  # of a validation
            super().log(logs, start_time)
            return
        losses, self._since_log = self._since_log, []
        if not isfinite(logs["loss"]):
            bad = [sample for loss, ids in losses if not isfinite(loss.item()) for sample in ids]
            raise TrainingError(
                f"the loss is {logs['loss']} at step {self.state.global_step}; "
                f"samples: {', '.join(gather_object(bad))}. "
                "Look at them with `tinyllava record`; lower the learning rate, or train with precision fp32."
            )
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the mean loss over the supervised tokens of all held-out records.

        The training continues as if it had not happened: the random state is restored, and no layer uses it.
        """
        start, was_training = time.monotonic(), self.model.training
        with keeping_random_state(), not_compiled():
            self.model.eval()
            mean = self._held_out_loss()
            metrics = {"eval_loss": mean, "eval_seconds": round(time.monotonic() - start, 3)}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(was_training)
        self.seconds_validating += time.monotonic() - start
        return metrics

    def _held_out_loss(self) -> float:
        """Return the loss of each token, summed over all processes' batches and divided by their number.

        Every process runs as many batches as the first, so that none waits in a collective call: where one
        has fewer left, it runs its first batch once more, and that does not count.
        """
        rank, world_size = PartialState().process_index, PartialState().num_processes
        size = self.args.per_device_eval_batch_size
        examples: Any = self.eval_dataset
        order = sorted(range(len(examples)), key=lambda i: examples.lengths[i])  # little padding
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        own = batches[rank::world_size]
        num_missing = -(-len(batches) // world_size) - len(own)
        loader = DataLoader(
            examples,
            batch_sampler=own + (own or batches)[:1] * num_missing,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            timeout=self.args.ddp_timeout if self.args.dataloader_num_workers else 0,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),
        )
        total, count = 0.0, 0
        with torch.no_grad():
            for number, batch in enumerate(loader):
                for name in ("sample_ids", "num_tokens", "attention_mask"):  # as in a training step
                    batch.pop(name, None)
                inputs = examples.unpacked(send_to_device(batch, self.args.device))
                with fastest_attention(inputs, bf16=self.args.bf16):
                    loss = self.model_wrapped(**inputs, num_items_in_batch=1).loss
                if number < len(own):
                    total += float(loss.double())
                    count += int((inputs["labels"][:, 1:] != IGNORED).sum())
        reshard(self.model)
        sums = torch.tensor([total, count], dtype=torch.float64, device=self.args.device)
        summed: Tensor = reduce(sums, reduction="sum")
        return float(summed[0] / summed[1])

    def save_model(self, output_dir: str | None = None, *_: Any, **__: Any) -> None:
        """Write only the trained tensors, because the frozen ones exist elsewhere; no pickle.

        With sharding every process also writes its share of the optimizer's state. See ``CheckpointWriter``.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self.args.sharding != "none":
            gather_trained(self.model, self.whole)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        if self.args.sharding != "none":
            PartialState().wait_for_everyone()  # for the folder
        tensors = trained_tensors(self.whole) if self.args.should_save else {}
        self.writer.take(folder, tensors, self.model, getattr(self.optimizer, "optimizer", self.optimizer))


def rate_factor(step: int, num_steps: int, num_warmup: int) -> float:
    """Return the share of the peak rate at a step, counted from 0.

    The last of k warm-up steps has the full rate, so that a stage of a single step trains at it. Behind them
    half a cosine falls towards 0, which it would reach at step ``num_steps``.
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + cos(pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def make_schedule(stage: Stage, num_steps: int, num_warmup: int) -> Callable[[int], float]:
    """Return the share of the peak rate by step: ``rate_factor``'s warm-up, then the stage's schedule.

    Raises:
        ConfigError: options that the schedule does not take.
    """
    if stage.schedule == "cosine" and not stage.schedule_options:
        return lambda step: rate_factor(step, num_steps, num_warmup)
    name = "constant_with_warmup" if stage.schedule == "constant" else stage.schedule
    nothing = torch.optim.SGD([torch.zeros(1)], lr=stage.learning_rate)
    given = stage.schedule_options
    options = {key: int(value) if float(value).is_integer() else value for key, value in given.items()}
    try:
        [behind] = get_scheduler(name, nothing, num_warmup, num_steps, options or None).lr_lambdas
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"schedule_options = {given} of schedule {stage.schedule!r}: {error}. Fix the options."
        ) from error
    return lambda step: rate_factor(step, num_steps, num_warmup) if step < num_warmup else float(behind(step))


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors by name, a tied one once."""
    return {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def make_arguments(
    run: Run,
    stage: Stage,
    hardware: Hardware,
    folder: Path,
    num_samples: int,
    prefetch_factor: int,
    packed: PackedBatches | None,
) -> StageArguments:
    """Translate a stage into the Trainer's words."""
    world_size = PartialState().num_processes
    per_device = micro_batch(stage, hardware)
    num_steps = stage.max_steps or max(
        1, round(-(-num_samples // stage.global_batch_size) * stage.num_epochs)
    )
    num_passes = stage.global_batch_size // (per_device * world_size)
    assert num_passes * per_device * world_size == stage.global_batch_size, (
        "a rule of tinyllava.planning.check"
    )
    num_passes = num_passes if packed is None else packed.num_passes
    precision = choose_precision(hardware.precision)
    return StageArguments(
        output_dir=str(folder),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=num_passes,
        num_train_epochs=stage.num_epochs,
        max_steps=stage.max_steps or -1,
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        **({} if stage.optimizer == "adamw" else {"optim": stage.optimizer}),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=hardware.num_workers,
        dataloader_prefetch_factor=prefetch_factor if hardware.num_workers else None,
        dataloader_persistent_workers=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # copies while the device computes
        seed=run.seed,
        data_seed=run.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=hardware.save_steps or max(1, num_steps // 10),
        eval_strategy="steps" if stage.validation.held_out else "no",
        eval_steps=stage.validation.every_steps or max(1, num_steps // 10),
        per_device_eval_batch_size=per_device,
        remove_unused_columns=False,
        report_to=list(run.report_to),
        disable_tqdm=True,
        average_tokens_across_devices=True,
        sharding=choose_sharding(hardware),
        ddp_timeout=hardware.timeout_seconds,
        ddp_find_unused_parameters=False,
    )


def micro_batch(stage: Stage, hardware: Hardware) -> int:
    """Return the number of samples of one forward pass of one process, whatever the memory of the device.

    ``training.devices.fit_hardware`` chooses by memory; this is the choice where it may not or cannot.
    """
    per_rank = stage.global_batch_size // PartialState().num_processes
    return hardware.device_batch_size or max(d for d in range(1, MOST_SAMPLES + 1) if per_rank % d == 0)
