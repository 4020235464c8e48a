"""Other libraries' messages: dropped where they would stand in front of ours, and nowhere else."""

import logging
import subprocess
import sys

import pytest

from tinyllava.conversation import ask
from tinyllava.model.assemble import assemble
from tinyllava.model.quiet import without_loading_bars, without_messages_of
from training_toys import toy_run

# bitsandbytes warns on some CPUs only: here it warns on all of them.
NOISY = """
import logging, sys, torch

class Noisy:
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes.functional":
            logging.getLogger("bitsandbytes.backends.cpu.ops").warning("NOISE: imported")

sys.meta_path.insert(0, Noisy())
"""


@pytest.mark.parametrize(
    "code",
    [
        "import tinyllava.training.run",
        "import tinyllava.training.checkpoints",
        "from tinyllava.model.quantised import FourBitLinear; FourBitLinear(torch.nn.Linear(64, 64))",
        "from tinyllava.model.quantised import EightBitLinear; EightBitLinear(torch.nn.Linear(64, 64))",
        "from tinyllava.model.tuning import merge_adapters; merge_adapters(torch.nn.Linear(2, 2))",
    ],
)
def test_bitsandbytes_is_imported_without_its_warning(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{NOISY}\n{code}\nassert 'bitsandbytes' in sys.modules"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "NOISE" not in done.stderr
    assert "Failed to load" not in done.stderr


@pytest.mark.parametrize("name", ["Chat", "evaluate", "evaluation.run"])
def test_what_does_not_train_loads_no_adapters(name):
    code = (
        "import importlib, sys, tinyllava\n"
        f"getattr(tinyllava, {name!r}, None) or importlib.import_module('tinyllava.' + {name!r})\n"
        "assert not {'peft', 'bitsandbytes'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_bitsandbytes_would_warn_otherwise():
    done = subprocess.run(
        [sys.executable, "-c", f"{NOISY}\nimport bitsandbytes"], capture_output=True, text=True, check=True
    )
    assert "NOISE" in done.stderr


def test_messages_are_dropped_in_the_block_only_and_of_that_logger_only(caplog):
    logger = logging.getLogger("tinyllava.test_quiet")
    with without_messages_of("tinyllava.test_quiet"):
        with without_messages_of("tinyllava.test_quiet"):
            logger.error("inner")
        logger.error("outer")
        logging.getLogger("tinyllava.test_quiet.child").error("child")
    logger.error("after")
    assert caplog.messages == ["child", "after"]
    assert logger.filters == []


def test_a_text_beyond_the_context_is_left_to_our_own_error(parts, records, tmp_path, capfd):
    _, processor = assemble(toy_run(parts, records, tmp_path, llm="llama", encoder="clip").model)
    processor.tokenizer.model_max_length = 8
    conversation = ask("Is there anything in this image that is longer than a cat?")
    assert len(processor.encode(conversation, open_answer=True).input_ids) > 8
    processor(text=processor.render(conversation, open_answer=True)[0])
    assert capfd.readouterr().err == ""


def test_bars_for_loading_and_writing_weights_are_hidden_in_the_block_only(parts, records, tmp_path, capfd):
    run = toy_run(parts, records, tmp_path, llm="llama", encoder="clip")
    model, _ = assemble(run.model)
    with without_loading_bars():
        model.save_pretrained(tmp_path / "hidden")
    assert "%" not in capfd.readouterr().err
    model.save_pretrained(tmp_path / "shown")
    assert "100%" in capfd.readouterr().err
