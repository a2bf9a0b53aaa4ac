"""The script that trains on a GPU, on two cores and a handful of images: what it stores is what a run goes on from."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from nascompile import finetune, models, pipeline
from nascompile.data import DataSettings
from nascompile.families import mcu_vit
from nascompile.progress import Silent
from nascompile.records import SearchSpace, load
from nascompile.settings import Budgets, Recipe

torch.set_num_threads(1)

TOOL = Path(__file__).parents[2] / "tools" / "benchmarks" / "mcu_train.py"
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 32, "patch_sizes": [4],
}  # fmt: skip


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("mcu_train", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # which the tool sets, and nobody after it should see
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec.loader.exec_module(module)
    return module


def store(path: Path, samples: int, seed: int) -> None:
    rng, rows = np.random.default_rng(seed), []
    for i in range(samples):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(80 * (i % 2), 80 * (i % 2) + 120, (16, 16, 3)).astype(np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image, "label": [("dark", "light")[i % 2] for i in range(samples)]}), path)


def stored_sizes(folder: Path, name: str) -> str:
    (folder / "sizes.json").write_text(json.dumps({name: SIZES}))
    return str(folder / "sizes.json")


def test_a_run_goes_on_from_what_it_stores(tool, tmp_path, capsys):
    source, out = tmp_path / "tiles", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    store(source / "train.parquet", 120, 0)
    store(source / "validation.parquet", 40, 1)
    given = ["--out", str(out), "--data", f"tiles={source}", "--device", "cpu", "--batch", "16", "--epochs", "2", "2", "--aware", "0.5"]
    tool.main([*given, "--sizes", stored_sizes(tmp_path, ""), "--one", "tiles:16", "--until", str(time.time() + 600)])
    found = json.loads((out / "tiles-16.result.json").read_text())
    rows = {(row["weights"], row["network"]): row["accuracy"] for row in found["networks"]}
    assert len(rows) == 2 + 1 + tool.RANDOM
    assert rows["teacher", "largest"] > 80, "dark and light are told apart"
    assert found["trainings"]["supernet"]["quantized_from"] == 1.0
    assert "of validation, supernet smallest" in capsys.readouterr().out
    run = tmp_path / "run"
    for name, folder in (("teacher", tmp_path), ("supernet", run)):
        with tarfile.open(out / f"tiles-16.{name}.tar") as tar:
            tar.extractall(folder, filter="data")
    store(source / "test.parquet", 20, 2)
    files = {name: str(source / f"{split}.parquet") for name, split in (("data", "train"), ("validation", "validation"), ("test", "test"))}
    recipe = Recipe(model=str(tmp_path / "teacher"), data=DataSettings(**files), device="stm32f746", budgets=Budgets(max_drop=2.0))
    pipeline.run(recipe, run, until="data")
    context = pipeline.Context(recipe, run, Silent(), pipeline.Given())
    trained = load(run / "supernet" / "manifest.json", SearchSpace)
    assert context.manifest.head == "kept"
    assert context.space_of(context.config, trained.layer_order).id == trained.id
    assert trained.model_digest == models.weights_digest(tmp_path / "teacher")
    before = (run / "supernet" / "model.safetensors").stat()
    finetune.finetune(context.training_plan(), Silent())
    assert (run / "supernet" / "model.safetensors").stat() == before, "it is there: nothing is trained"


def test_steps_are_timed(tool, tmp_path, capsys):
    store(tmp_path / "train.parquet", 60, 0)
    store(tmp_path / "validation.parquet", 20, 1)
    out = tmp_path / "out"
    given = ["--out", str(out), "--data", f"tiles={tmp_path}", "--device", "cpu", "--batch", "8", "--pace", "--tasks", "tiles:16:own"]
    tool.main([*given, "--sizes", stored_sizes(tmp_path, "own"), "--one", "tiles:16:own", "--until", "0"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 * 3
    assert all("tiles-16-own:" in line for line in said)
    assert said[1].endswith("ms a step of plain")
    assert not list(out.iterdir()), "nothing is trained"
    with pytest.raises(SystemExit, match="no sizes own; --sizes has other"):
        tool.main([*given, "--sizes", stored_sizes(tmp_path, "other")])


def test_tasks_by_default_have_sizes_that_the_family_takes(tool):
    sizes = json.loads(tool.SIZES.read_text())
    for text in tool.options().get_default("tasks"):
        task = tool.Task.parse(text)
        config = mcu_vit.McuVitConfig(**{"image_size": task.side} | sizes[task.sizes])
        assert mcu_vit.PLUGIN.unsupported(config) == ""


def test_tasks_take_turns_at_gpus(tool, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert [tool._environment(task, 2)["CUDA_VISIBLE_DEVICES"] for task in range(3)] == ["0", "1", "0"]
    assert tool._environment(1, 1)["CUDA_VISIBLE_DEVICES"] == "3"


def test_minutes_become_epochs(tool):
    assert tool.Task.parse("fashion:64") == tool.Task("fashion-64", "fashion", 64, "")
    assert tool.Task.parse("tiles:32:small") == tool.Task("tiles-32-small", "tiles", 32, "small")
    assert [tool._epochs(count) for count in (0.2, 17.9, 1e9)] == [1, 17, tool.MOST_EPOCHS]
