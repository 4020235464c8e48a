"""A small run on toy parts, and the ten-line loop that training is held against."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import RandomSampler

from tinyllava.config import FROZEN, FULL, DataConfig, Hardware, ModelConfig, Run, Stage, to_json
from tinyllava.data.dataset import Collator, Examples
from tinyllava.data.records import read_records
from tinyllava.training.progress import StageProgress


def toy_run(
    parts: dict[str, Path],
    records: Path,
    output: Path,
    *,
    llm: str = "llama",
    encoder: str = "siglip",
    **changes,
) -> Run:
    """Base recipe on toy parts: pre-training of the connector, then connector and language model."""
    data = DataConfig(records=(str(records),), images=str(records.parent / "images"))
    captions = DataConfig(records=(str(make_captions(records)),), images=data.images)
    pretrain = Stage(
        data=captions,
        template="caption",
        connector=FULL,
        vision_encoder=FROZEN,
        language_model=FROZEN,
        learning_rate=1e-2,
        global_batch_size=4,
        max_length_tokens=256,
    )
    finetune = Stage(
        data=data,
        connector=FULL,
        language_model=FULL,
        learning_rate=1e-3,
        global_batch_size=4,
        max_length_tokens=256,
    )
    settings = {
        "name": "toy",
        "model": ModelConfig(vision_encoder=str(parts[encoder]), language_model=str(parts[llm])),
        "stages": {"pretrain": pretrain, "finetune": finetune},
        "output": str(output),
        "report_to": (),
        "hardware": Hardware(num_workers=0, device_batch_size=2, precision="fp32"),
    }
    return Run(**settings | changes)


def write_run(run: Run, folder: Path) -> str:
    """Write a run as a user would, and return what ``tinyllava train`` calls it."""
    (folder / "run.json").write_text(to_json(run))
    (folder / "mine.py").write_text(
        "from pathlib import Path\nfrom tinyllava.config import run_from_json\n"
        "RUN = run_from_json(Path(__file__).with_name('run.json').read_text())\n"
    )
    return f"{folder / 'mine.py'}:RUN"


def make_captions(records: Path) -> Path:
    """Write as many captions as there are records: the first answer, and this or the last image."""
    captions, listed = [], json.loads(records.read_text())
    image = next(record["image"] for record in listed if "image" in record)
    for record in listed:
        image = record.get("image", image)
        answer = next(turn["value"] for turn in record["conversations"] if turn["from"] == "gpt")
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": answer}]
        captions.append({"id": record.get("id"), "image": image, "conversations": turns})
    path = records.with_name("captions.json")
    path.write_text(json.dumps(captions))
    return path


def signalled_at(stage: str, num_steps: int, number: int, action: Callable[[], object]) -> object:
    """Do an action whose process gets a signal in a stage, as soon as so many steps of it are logged."""
    log = StageProgress.on_log

    def logging(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        if Path(args.output_dir).name == stage and state.global_step == num_steps:
            os.kill(os.getpid(), number)

    StageProgress.on_log = logging
    return action()


def sampled_order(num_samples: int, seed: int) -> list[int]:
    """The order of transformers' random sampler for a seed."""
    return list(RandomSampler(range(num_samples), generator=torch.Generator().manual_seed(seed)))


def plain_loop(model, processor, stage: Stage, order: list[int], template: str | None = None) -> list[float]:
    """Train without the Trainer: losses of each step, in plain PyTorch."""
    conversations = read_records(Path(stage.data.records[0]), Path(stage.data.images)).conversations
    examples, collate = (
        Examples(conversations=conversations, processor=processor, template=template),
        Collator(0, processor.image_token_id),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.learning_rate, weight_decay=0.0)
    num_steps = len(order) // stage.global_batch_size
    warmup = -(-num_steps * 3 // 100)
    losses = []
    for step in range(num_steps):
        if step < warmup:
            factor = (step + 1) / warmup
        else:
            factor = 0.5 * (
                1 + torch.cos(torch.tensor(torch.pi * (step - warmup) / (num_steps - warmup))).item()
            )
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * factor
        batch = collate(
            [examples[i] for i in order[step * stage.global_batch_size :][: stage.global_batch_size]]
        )
        for name in ("sample_ids", "num_tokens", "supervised_positions"):
            batch.pop(name)
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1]
        logits = logits[..., : model.config.num_language_rows or None]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
