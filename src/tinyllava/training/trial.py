"""Whether a form of training fits the memory of a device: run once, before anything depends on it.

Paper: none.
"""

from collections.abc import Iterator

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from tinyllava.config import Run
from tinyllava.data.dataset import Collator
from tinyllava.model.compat import set_checkpointing
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.planning.plan import Form
from tinyllava.training.prepare import Prepared
from tinyllava.training.trainer import choose_precision, trained_tensors


def out_of_memory(device_batch_size: int, checkpointing: bool) -> str:
    """Say what helps where the memory of a device does not do."""
    advice = [] if device_batch_size == 1 else [f"--hardware.device-batch-size {device_batch_size // 2}"]
    advice += [] if checkpointing else ["--hardware.gradient-checkpointing True"]
    advice += ["a recipe with adapters (lora, qlora)", "a smaller max_length_tokens"]
    return (
        f"out of memory with a device batch of {device_batch_size}"
        f"{' and recomputed activations' if checkpointing else ''}. Try {', '.join(advice[:-1])} or "
        f"{advice[-1]}; `tinyllava show` estimates each."
    )


def can_run_out() -> bool:
    """Whether this device says that its memory is full; on a CPU the system ends the process instead."""
    return bool(PartialState().device.type != "cpu")


def survives(
    form: Form,
    run: Run,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    prepared: Prepared,
) -> bool:
    """Run the largest micro-batches of a form forward and back, and leave everything as it was before.

    Memory for the optimizer's moments is taken meanwhile, and gradients of one pass lie there in the next.
    """
    if not can_run_out():
        return True
    device = PartialState().device
    set_checkpointing(model, form.checkpointing)
    fits = True
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.to(device)
            trained = trained_tensors(model).values()
            moments = [torch.empty_like(tensor, device=device) for tensor in [*trained, *trained]]
            for batch in _largest_batches(form.device_batch_size, processor, prepared):
                inputs = {name: value.to(device) for name, value in batch.items()}
                precision = choose_precision(run.hardware.precision)
                dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss = model(**inputs).loss
                loss.backward()
                del inputs, loss
            del moments
        except torch.OutOfMemoryError:
            fits = False
        model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return all(gather_object([fits]))


def _largest_batches(
    size: int, processor: TinyLlavaProcessor, prepared: Prepared
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of the longest sample and of the one with most images, one behind the other."""
    examples = prepared.examples
    places = range(len(examples))
    longest = max(places, key=lambda i: examples.lengths[i])
    fullest = max(places, key=lambda i: (len(examples.conversations[i].images), examples.lengths[i]))
    for place in (longest, fullest):
        collate = Collator(processor.tokenizer.pad_token_id, processor.image_token_id)
        batch = collate([examples[place]] * size)
        del batch["sample_ids"], batch["num_tokens"], batch["attention_mask"]  # see StageTrainer
        yield batch
