"""Networks for microcontrollers by name or by a configuration alone: made for the data, once, with a head for its labels."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors import safe_open

from nascompile import data, models, pipeline
from nascompile.data import DataSettings
from nascompile.errors import DataError, ModelError, UnsupportedError
from nascompile.settings import Budgets, Recipe, mcu_vit_recipe


def parquet(path, mode: str, size: tuple[int, int]) -> str:
    """90 images of noise in three shades, whose names are the labels."""
    rng, rows, labels = np.random.default_rng(0), [], []
    for i in range(90):
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(80 * (i % 3), 80 * (i % 3) + 80, shape).astype(np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
        labels.append(("dark", "grey", "light")[i % 3])
    pq.write_table(pa.table({"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), "label": labels}), path)
    return str(path)


def recipe(model: str, source: str, **changes) -> Recipe:
    return Recipe(model=model, data=DataSettings(data=source), budgets=Budgets(max_drop=1.0), **changes)


def stored(folder) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", framework="np") as weights:
        return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 (not a mapping)


@pytest.mark.parametrize(("mode", "size", "side", "channels"), [("L", (28, 28), 32, 1), ("RGB", (40, 48), 64, 3)])
def test_it_is_as_large_as_the_images_are(tmp_path, mode, size, side, channels):
    source, out = parquet(tmp_path / "train.parquet", mode, size), tmp_path / "run"
    pipeline.run(recipe("mcu_vit", source), out, until="data")
    config = models.read_config(out / "model")
    assert (config.model_type, config.image_size, config.num_channels) == ("mcu_vit", side, channels)
    manifest = data.load_manifest(out / "data")
    assert (manifest.head, manifest.label_names) == ("new", ("dark", "grey", "light"))
    split = data.open_split(out / "data", "train")
    assert split.inputs["pixel_values"].shape[1:] == (channels, side, side)
    before = stored(out / "model")
    (out / "stages" / "data.json").unlink()
    pipeline.run(recipe("mcu_vit", source), out, until="data")
    again = stored(out / "model")
    assert all((again[name] == value).all() for name, value in before.items())
    for seed in (0, 1):
        other = tmp_path / f"seed{seed}"
        pipeline.run(recipe("mcu_vit", source, seed=seed), other, until="data")
        name = "layers.0.mlp.up.first.weight"
        assert (stored(other / "model")[name] == before[name]).all() == (seed == 0), "weights are those of the seed"


def test_a_configuration_without_weights_is_a_network_too(tmp_path):
    source, folder, out = parquet(tmp_path / "train.parquet", "L", (16, 16)), tmp_path / "described", tmp_path / "run"
    folder.mkdir()
    sizes = {"model_type": "mcu_vit", "image_size": 16, "num_channels": 1, "hidden_size": 64, "num_hidden_layers": 4, "patch_sizes": [4]}
    (folder / "config.json").write_text(json.dumps(sizes))
    pixels = {"size": {"height": 16, "width": 16}, "image_mean": [0.2], "image_std": [0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    pipeline.run(recipe(str(folder), source), out, until="data")
    config = models.read_config(out / "model")
    assert (config.hidden_size, config.num_hidden_layers, config.patches) == (64, 4, (4,))
    assert data.load_manifest(out / "data").head == "new"
    assert data.open_split(out / "data", "train").preprocessor.settings.mean == (0.2,)
    (folder / "config.json").write_text(json.dumps(sizes | {"patch_sizes": [5]}))
    with pytest.raises(ModelError, match=r"cannot take .*: image size 16 is not a whole number of patches of 5") as caught:
        pipeline.run(recipe(str(folder), source), tmp_path / "other", until="data")
    assert caught.value.hint == "docs/mcu_vit.md has the entries of its config.json"
    (folder / "config.json").write_text(json.dumps(sizes | {"hidden_size": -32}))
    with pytest.raises(ModelError, match=r"choices of hidden are 1 or more, not .*-32"):
        pipeline.run(recipe(str(folder), source), tmp_path / "other", until="data")
    (folder / "config.json").write_text("{")
    assert not models.is_description(str(folder))


def test_other_devices_are_refused(tmp_path):
    source = parquet(tmp_path / "train.parquet", "L", (16, 16))
    with pytest.raises(UnsupportedError, match="builds no networks of the family mcu_vit: they are for mcu_c"):
        pipeline.run(recipe("mcu_vit", source, device="fake"), tmp_path / "run", until="profile")


def test_the_named_network_has_settings_and_data_of_its_own():
    own = mcu_vit_recipe()
    assert (own.model, own.device, own.finetune.recipe) == ("mcu_vit", "stm32f746", "bignas")
    assert own.finetune.epochs > 10, "it starts from random weights"
    assert own.finetune.candidate_epochs, "inside a super-network of random weights a small network stays far behind"
    with pytest.raises(DataError, match="no training data"):
        data.image_shape(DataSettings())


def test_without_data_it_is_trained_on_the_embedded_ones(tmp_path):
    pipeline.run(mcu_vit_recipe(), tmp_path / "run", until="data")
    assert models.read_config(tmp_path / "run" / "model").image_size == 32
    manifest = data.load_manifest(tmp_path / "run" / "data")
    assert (manifest.head, len(manifest.label_names), manifest.split("train").samples) == ("new", 10, 5000)
