"""Augmentation: what changes, what stays, what is drawn; images on an accelerator are those of the split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_finetune import make_job, split

from nascompile import augmentation, finetune, settings
from nascompile.errors import RecipeError
from nascompile.preprocess import Preprocessing, Preprocessor
from nascompile.progress import Silent
from nascompile.supernet import load_batch

torch.set_num_threads(1)


def images(n: int = 64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 1, (n, 3, 16, 16)).astype(np.float32))


def test_settings_and_kinds_have_the_same_names():
    assert tuple(augmentation.KINDS) == settings.AUGMENTATIONS


def test_crops_are_windows_of_the_image():
    torch.manual_seed(0)
    x = images()
    y = augmentation.crop(x)
    moved = set()
    for before, after in zip(x, y, strict=True):
        padded = np.pad(before.numpy(), ((0, 0), (2, 2), (2, 2)), mode="edge")
        found = [(i, j) for i in range(5) for j in range(5) if (padded[:, i : i + 16, j : j + 16] == after.numpy()).all()]
        assert len(found) == 1
        moved.add(found[0])
    assert len(moved) > 15  # of 25 places


def test_flips_are_of_half_the_images():
    torch.manual_seed(0)
    x = images(400)
    y = augmentation.flip(x)
    flipped = (y == x.flip(3)).all(3).all(2).all(1)
    assert torch.equal(y[~flipped], x[~flipped])
    assert 160 < flipped.sum() < 240


def test_light_keeps_shapes_and_changes_contrast():
    torch.manual_seed(0)
    x = images(100)
    y = augmentation.light(x)
    ratio = y.std((1, 2, 3)) / x.std((1, 2, 3))
    assert 0.7 <= ratio.min() < 0.8
    assert 1.2 < ratio.max() <= 1.3
    centred = [(v - v.mean((1, 2, 3), keepdim=True)) / v.std((1, 2, 3), keepdim=True) for v in (x, y)]
    torch.testing.assert_close(*centred, rtol=0, atol=1e-4)


def test_a_box_is_erased_in_a_quarter():
    torch.manual_seed(0)
    x = images(400)
    changed = (augmentation.erase(x) != x).any(1)
    hit = changed.any(2).any(1)
    assert 60 < hit.sum() < 140
    for mask in changed[hit]:
        rows, columns = torch.nonzero(mask.any(1)).flatten(), torch.nonzero(mask.any(0)).flatten()
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all(), "a rectangle"
    assert changed[hit].float().mean() < 0.3


def test_draws_follow_torchs_generator():
    x = images()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(augmentation.vary(x, ("crop", "flip", "light", "erase")))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert augmentation.vary(x, ()) is x


def as_images(part):
    """The same split as bytes of grey images."""
    preprocessor = Preprocessor(Preprocessing(modality="image", inputs=("pixel_values",), channels=1, mean=(0.4,), std=(0.3,)), {})
    pixels = np.clip(np.rint(60 * part.inputs["pixel_values"] + 128), 0, 255).astype(np.uint8)
    return replace(part, inputs={"pixel_values": pixels}, preprocessor=preprocessor)


def test_images_on_an_accelerator_are_those_of_the_split():
    part = as_images(split(20, 1, "pixel_values", (1, 4, 4)))
    rows = np.array([3, 19, 0, 7])
    inputs, labels = finetune.Resident.on(part, "cpu")(rows)
    want, classes = load_batch(part, rows)
    torch.testing.assert_close(inputs["pixel_values"], want["pixel_values"], rtol=0, atol=1e-6)
    assert torch.equal(labels, classes)
    assert finetune.Resident.of(part, torch.device("cpu")) is None
    assert finetune._evaluation_batch(part, torch.device("cpu")) == finetune.EVALUATION_BATCH
    assert finetune._evaluation_batch(part, torch.device("cuda")) == finetune.ACCELERATED_BATCH
    large = replace(part, inputs={"pixel_values": np.zeros((2, 3, 224, 224), np.uint8)})
    assert finetune._evaluation_batch(large, torch.device("cuda")) == finetune.EVALUATION_BATCH
    assert finetune.Resident.of(split(20, 1), torch.device("cuda")) is None, "vectors are small"


def test_training_sees_varied_images(tmp_path, monkeypatch):
    job = make_job(tmp_path / "run", "vit", recipe="plain", epochs=1, augmentation=("flip",))
    job = replace(job, train=as_images(job.train), validation=as_images(job.validation))
    seen = []

    def vary(values, kinds):
        seen.append((tuple(values.shape), kinds))
        return values

    monkeypatch.setattr(finetune, "vary", vary)
    finetune.train(job, Silent())
    assert seen == [((8, 1, 4, 4), ("flip",))] * 4


def test_what_is_no_image_is_refused(tmp_path):
    job = make_job(tmp_path / "run", augmentation=("flip",))
    with pytest.raises(RecipeError, match=r"finetune\.augmentation is for images, and this is vector"):
        finetune.train(job, Silent())
    with pytest.raises(RecipeError, match="the recipe cannot be run") as caught:
        settings.from_mapping({"finetune": {"augmentation": ["twist"]}, "budgets": {"max_drop": 1.0}}, "here")
    assert "finetune.augmentation = ('twist',): some of crop, flip, light, erase" in caught.value.detail
