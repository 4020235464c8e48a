"""An image processor that does not fit its encoder is refused before loading, with both sizes."""

import dataclasses
import json
import shutil

import pytest

from tinyllava.config import ModelConfig
from tinyllava.errors import ConfigError
from tinyllava.model.assemble import assemble
from tinyllava.planning.check import check
from training_toys import toy_run

WRONG = {
    "size": (
        "siglip", "pad", {"size": {"height": 28, "width": 56}},
        r"produces images of 56 x 28, but the encoder takes 28 x 28 px",
    ),
    "larger": ("siglip", "pad", {"size": {"height": 56, "width": 56}}, "produces images of 56 x 56"),
    "no crop": (
        "clip", "square", {"do_center_crop": False},
        r"images of 37 x 28, .* takes 28 x 28 px\. With image_aspect 'square' it must crop the centre",
    ),
    "one mean": ("clip", "pad", {"image_mean": [0.5]}, r"image_mean is \[0\.5\]; RGB needs 3 numbers"),
    "one std": ("siglip", "square", {"image_std": [0.5]}, r"image_std is \[0\.5\]; RGB needs 3 numbers"),
    "no resample": ("siglip", "pad", {"resample": 77}, "image processor fails on an image"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_image_processor_that_does_not_fit_is_refused_with_both_numbers(parts, records, tmp_path, case):
    kind, aspect, changes, message = WRONG[case]
    folder = tmp_path / "encoder"
    shutil.copytree(parts[kind], folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    model = ModelConfig(vision_encoder=str(folder), language_model=str(parts["llama"]), image_aspect=aspect)
    with pytest.raises(ConfigError, match=message):
        assemble(model)
    run = dataclasses.replace(toy_run(parts, records, tmp_path / "run"), model=model)
    with pytest.raises(ConfigError, match=rf"1 problem\(s\):\n  1\. model\.vision_encoder = .*{message}"):
        check(run)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_one_that_fits_is_taken(parts, records, tmp_path, kind, aspect):
    model = ModelConfig(
        vision_encoder=str(parts[kind]), language_model=str(parts["llama"]), image_aspect=aspect
    )
    check(dataclasses.replace(toy_run(parts, records, tmp_path / "run"), model=model))
