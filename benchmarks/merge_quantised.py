"""Where adapters trained over 4 or 8 bits may be merged: the logits of both ways against the trained model's.

Adapters are trained for a few steps over a quantised language model. Then they are put on the dequantised
weights, and on the weights that it came with. Prints how far the logits of both are from those of the model
as it was trained, and how far quantising alone moved them before there was an adapter.

    python benchmarks/merge_quantised.py FOLDER [--steps 20]
"""

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllava.model.quantised import QuantisedLinear, quantise

TEXT = "A chat about an image: a red circle stands left of a blue square. What stands right of the circle?"


def distances(folder: str, bits: int, steps: int) -> dict[str, tuple[float, float]]:
    """Return (largest, mean) difference of logits for each way, after training."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    targets = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"]
    original = {name: copy.deepcopy(model.get_submodule(name)) for name in targets}
    with torch.no_grad():
        untouched = model(ids).logits
    quantise(model, targets, bits)
    with torch.no_grad():
        start = model.train()(ids).logits
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=targets), model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected = model(ids).logits
        ways = {"quantising alone": start - untouched}
        for way in ("dequantised", "original"):
            for name in targets:
                layer = model.get_submodule(name)
                below = layer.base_layer
                if isinstance(below, QuantisedLinear):
                    layer.held = below
                layer.base_layer = layer.held.to_linear() if way == "dequantised" else original[name]
            ways[f"on {way} weights"] = model(ids).logits - expected
    return {way: (d.abs().max().item(), d.abs().mean().item()) for way, d in ways.items()}


def main() -> None:
    """Measure both widths and print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="a Hugging Face folder of a language model")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    for bits in (4, 8):
        for way, (largest, mean) in distances(arguments.folder, bits, arguments.steps).items():
            print(f"{bits} bits, {way:<24} largest {largest:.2g}, mean {mean:.2g}")


if __name__ == "__main__":
    main()
