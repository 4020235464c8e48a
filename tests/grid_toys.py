"""A grid on toy parts, its benchmark in the starter's form, and the program that a test can kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from training_toys import make_captions

ROOT = Path(__file__).parent.parent

FILE = """
from dataclasses import replace
from pathlib import Path
from tinyllava.config import DataConfig, Hardware, ModelConfig, Run
from tinyllava.studies.grid import cross
from tinyllava.recipes.paper import BASE

data = dict(
    pretrain=DataConfig(records=({captions!r},), images={images!r}),
    finetune=DataConfig(records=({records!r},), images={images!r}),
)
small = dict(learning_rate=1e-3, global_batch_size=4, max_length_tokens=256, num_epochs={epochs})
base = Run(
    name="toy", recipe="base", report_to=(),
    model=ModelConfig(vision_encoder={encoder!r}, language_model={llm!r}),
    stages={{name: replace(stage, data=data[name], **small) for name, stage in BASE.stages.items()}},
    hardware=Hardware(num_workers=0, device_batch_size=2, precision="fp32"),
)
TOY = cross(
    name="toy", title="A toy", base=base, benchmarks=("starter-whole",), panel="connector", seeds={seeds},
    axes={{
        "connector": {{"MLP": {{"model.connector": "mlp"}}, "Linear": {{"model.connector": "linear"}}}},
        "rate": {{
            "low": {{"stages.finetune.learning_rate": 1e-4}},
            "high": {{"stages.finetune.learning_rate": 1e-3}},
        }},
    }},
)
"""


def write_grid(
    folder: Path, parts: dict[str, Path], records: Path, *, epochs=1, seeds=(1,), high=1e-3
) -> Path:
    """Write a user's grid file: two connectors times two fine-tuning rates, the connector's stage shared."""
    path = folder / "my_grid.py"
    path.write_text(
        FILE.format(
            records=str(records),
            captions=str(make_captions(records)),
            images=str(records.parent / "images"),
            encoder=str(parts["siglip"]),
            llm=str(parts["llama"]),
            epochs=epochs,
            seeds=seeds,
        )
    )
    return path


def write_benchmark(folder: Path, num_questions: int = 6) -> Path:
    """Write held-out questions in the starter's form below ``folder/starter-whole``; return ``folder``."""
    inside = folder / "starter-whole"
    (inside / "images").mkdir(parents=True)
    records = []
    for number in range(num_questions):
        name = f"{number // 2}.png"
        Image.new("RGB", (40, 30), (number * 30, 60, 90)).save(inside / "images" / name)
        turns = [{"from": "human", "value": f"<image>\nIs it {number}?"}, {"from": "gpt", "value": "yes"}]
        records.append(
            {
                "id": f"q{number}",
                "image": name,
                "conversations": turns,
                "kind": "yes_no",
                "source": "easy_vqa",
            }
        )
    (inside / "held_out.json").write_text(json.dumps(records))
    return folder


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    """Start ``tinyllava reproduce`` in a process of its own."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "tinyllava", "reproduce", *arguments],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
