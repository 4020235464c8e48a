"""Other libraries' messages: dropped where they would stand in front of ours, and nowhere else."""

import logging
import subprocess
import sys

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


IMPORTED = {
    "import tinyllava.training.run": False,
    "import tinyllava.training.checkpoints": False,
    "from tinyllava.model.quantised import FourBitLinear; FourBitLinear(torch.nn.Linear(64, 64))": False,
    "from tinyllava.model.quantised import EightBitLinear; EightBitLinear(torch.nn.Linear(64, 64))": False,
    "from tinyllava.model.tuning import merge_adapters; merge_adapters(torch.nn.Linear(2, 2))": False,
    "import bitsandbytes": True,
}
"""Whether each warns: the last does, so the warning is there to be kept away."""

# Each is tried in a fork of one process that has imported all but bitsandbytes and what imports it.
EACH = r"""
import os, tinyllava
for name in ("Chat", "evaluate"):
    getattr(tinyllava, name)
import tinyllava.evaluation.run, tinyllava.model.quantised, tinyllava.model.tuning
assert not {"peft", "bitsandbytes"} & set(sys.modules), "what does not train loads adapters"
print("start", file=sys.stderr, flush=True)
for code in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(code)
        assert "bitsandbytes" in sys.modules
        sys.stderr.flush()
        os._exit(0)
    print(f"\nend {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", file=sys.stderr, flush=True)
"""


def test_bitsandbytes_comes_without_its_warning_and_only_with_what_trains():
    done = subprocess.run(
        [sys.executable, "-c", NOISY + EACH, *IMPORTED], capture_output=True, text=True, check=False
    )
    before, _, rest = done.stderr.partition("start\n")
    assert (done.returncode, before) == (0, ""), done.stderr
    *said, end = rest.split("\nend 0\n")
    assert (len(said), end) == (len(IMPORTED), ""), done.stderr
    for (code, warns), text in zip(IMPORTED.items(), said, strict=True):
        assert ("NOISE" in text) == warns, code
        assert warns or "Failed to load" not in text, code


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
