"""Programs become C projects that give the same bytes on this computer, in QEMU and by the NumPy definition of every kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from transformers import ViTConfig

from nascompile import engine as engines, network, plugins, space as spaces, targets
from nascompile.backends import mcu_c
from nascompile.devices import Job
from nascompile.errors import BudgetError, DataError, RecipeError, RecordError, UnsupportedError
from nascompile.families import InputSpec
from nascompile.mcu import (
    board as boards,
    calibrated,
    emit,
    interpreter,
    plan_check,
    program as programs,
    project,
    toolchain,
    transformer,
)
from nascompile.mcu.program import Program, demand
from nascompile.mcu.runner import McuRunner
from nascompile.programs import lower as lowered
from nascompile.records import Workload

ODD = transformer.Shape.uniform((24, 24, 3), 8, 22, 2, 2, 37, 5)
"""Ten tokens, heads of eleven channels, an odd MLP: nothing is a multiple of four."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, mcu_tools):
    """Object files of kernels and firmware by core: the same in all projects, so compiled once for all tests."""
    return tmp_path_factory.mktemp("objects")


@pytest.fixture
def written(tmp_path, compiled):
    """written(program, board, **how to place it) writes a project into `tmp_path`; what was placed."""

    def write(program: Program, board: boards.Board, **options) -> project.Planned:
        planned = project.place(program.structure, board, **options)
        sample = images(ODD, 1)[0]
        project.write(tmp_path, program, planned, board, sample, interpreter.run(program, sample))
        if not (objects := compiled / board.core.name).exists():
            toolchain.make(tmp_path, "firmware.elf")
            for part in ("kernels", "firmware"):
                shutil.copytree(tmp_path / "build" / part, objects / part)
        for part in ("kernels", "firmware"):
            shutil.copytree(objects / part, tmp_path / "build" / part, copy_function=shutil.copy, dirs_exist_ok=True)  # newer than sources
        return planned

    return write


def board_of(name: str) -> boards.Board:
    target = targets.make(name, "", Workload())
    return boards.of_settings(target.device, dict(target.session))


def of_rank(rank: int) -> transformer.Shape:
    """`ODD` with maps in two factors; whole ones of rank 0."""
    return msgspec.structs.replace(ODD, layers=tuple(msgspec.structs.replace(layer, rank=rank) for layer in ODD.layers))


def images(shape: transformer.Shape, n: int) -> np.ndarray:
    return np.random.default_rng(7).integers(-128, 128, (n, *shape.image)).astype(np.int8)


@pytest.mark.parametrize(
    ("fusion", "rank", "device", "options"),
    [
        ("none", 0, "stm32f746", {"overlay": False}),
        ("none", 0, "stm32f746", {}),
        ("blocks", 0, "stm32f746", {}),
        ("blocks", 7, "stm32f427", {"smallest": True}),
        ("all", 7, "stm32h743", {"smallest": True}),
        ("none", 7, "stm32h743", {}),
    ],
)
def test_host_qemu_and_interpreter_give_the_same_bytes(tmp_path, written, fusion, rank, device, options):
    board, x = board_of(device), images(ODD, 3)
    program = transformer.build("odd", of_rank(rank), transformer.RandomNumbers(1), fusion)
    sizes = transformer.build("odd", of_rank(rank), transformer.SizesOnly(), fusion).structure
    assert project.place(sizes, board, **options).footprint == project.place(program.structure, board, **options).footprint
    planned = written(program, board, **options)
    assert plan_check.faults(demand(program.structure), planned.plan) == []
    toolchain.make(tmp_path, "firmware.elf", "firmware_host")
    want = np.stack([interpreter.run(program, image) for image in x]).view(np.uint8)
    assert len(np.unique(want, axis=0)) == 3, "three images, three results"
    host, emulated = toolchain.run_host(tmp_path, x), toolchain.run_emulated(tmp_path, board.core, x)
    assert host.outputs.tobytes() == want.tobytes()
    assert emulated.outputs.tobytes() == want.tobytes()
    assert (emulated.counts > 0).all()
    assert (emulated.ram_bytes, emulated.flash_bytes) == (planned.footprint.ram, planned.footprint.flash)
    assert 100 < emulated.stack_bytes < board.stack_bytes
    again = toolchain.run_emulated(tmp_path, board.core, x)
    assert (again.counts == emulated.counts).all(), "counts repeat exactly"
    assert section(tmp_path, ".arena") == planned.plan.arena_bytes


def convolutional(seed: int) -> Program:
    """Every kernel that a transformer does not use: convolutions with and without residual, depthwise, pointwise, both kinds of pooling."""
    numbers = transformer.RandomNumbers(seed)

    def linear(name: str, inputs: int, outputs: int, *, residual: bool = False) -> programs.Linear:
        found = numbers.map(name, inputs, outputs, gelu=not residual, residual=residual)
        assert isinstance(found, programs.Linear)
        return found

    def dense(name: str, inputs: int, outputs: int, rows: int, *, residual: bool = False) -> programs.Dense:
        return programs.Dense(map=linear(name, inputs, outputs, residual=residual), rows=rows)

    taps = linear("taps", 9, 10)  # for its numbers: nine weights a channel
    window = {"height": 12, "width": 12, "channels": 10, "stride": 1, "pad": 1}
    numbered = {"weights": taps.weights, "bias": taps.bias, "multiplier": taps.multiplier, "table": taps.table}
    depthwise = programs.Depthwise(name="depthwise", x_zero=3, zero_point=-2, **numbered, **window)
    stem = programs.Conv(linear=linear("stem", 27, 10), height=24, width=24, channels=3, kernel=3, stride=2, pad=1)
    conv = programs.Conv(linear=linear("conv", 90, 10, residual=True), kernel=3, **window)
    pool = programs.AveragePool(multiplier=2**22, x_zero=1, zero_point=2, height=12, width=12, channels=7, kernel=2, stride=2)
    mean = programs.Mean(multiplier=2**24 // 30, x_zero=2, zero_point=-1, rows=36, channels=7)
    classify = programs.Classify(linear=numbers.map("head", 7, 5))
    chain = [
        ("image", programs.Read(rows=24), (), (24, 24, 3)), ("stem", stem, ("image",), (12, 12, 10)),
        ("depthwise", depthwise, ("stem",), (12, 12, 10)), ("conv", conv, ("depthwise", "stem"), (12, 12, 10)),
        ("pointwise", dense("pointwise", 10, 7, 144), ("conv",), (144, 7)), ("pool", pool, ("pointwise",), (6, 6, 7)),
        ("mean", mean, ("pool",), (1, 7)), ("head", classify, ("mean",), (5,)),
    ]  # fmt: skip
    tensors = tuple(programs.Tensor(name=n, shape=s, size_bytes=int(np.prod(s)) * (4 if n == "head" else 1)) for n, _, _, s in chain)
    operations = tuple(programs.Operation(name=n, kernel=k, inputs=i, outputs=(n,)) for n, k, i, _ in chain)
    structure = programs.Structure(name="convolutional", tensors=tensors, operations=operations, image=(24, 24, 3), output="head")
    return Program(structure, numbers.constants)


def test_a_convolutional_network_gives_the_same_bytes(tmp_path, written):
    program, board, x = convolutional(3), board_of("stm32f746"), images(ODD, 3)
    planned = written(program, board)
    assert plan_check.faults(demand(program.structure), planned.plan) == []
    assert planned.plan.overlaid == {"conv": "stem"}
    toolchain.make(tmp_path, "firmware.elf", "firmware_host")
    want = b"".join(interpreter.run(program, image).tobytes() for image in x)
    assert len({want[i : i + 20] for i in (0, 20, 40)}) == 3
    assert toolchain.run_host(tmp_path, x).outputs.tobytes() == want
    emulated = toolchain.run_emulated(tmp_path, board.core, x)
    assert emulated.outputs.tobytes() == want
    assert (emulated.ram_bytes, emulated.flash_bytes) == (planned.footprint.ram, planned.footprint.flash)


def section(folder, name: str) -> int:
    text = subprocess.run(["arm-none-eabi-size", "-A", folder / "firmware.elf"], capture_output=True, text=True, check=True).stdout
    return next(int(line.split()[1]) for line in text.splitlines() if line.split()[:1] == [name])


def test_three_plans_need_less_and_less(mcu_tools):
    peaks = []
    shape = transformer.Shape.uniform((64, 64, 3), 8, 48, 2, 3, 96, 10)
    for fusion, overlay in (("none", False), ("none", True), ("blocks", True), ("all", True)):
        program = transformer.build("peaks", shape, transformer.SizesOnly(), fusion)
        peaks.append(project.place(program.structure, board_of("stm32f746"), overlay=overlay, smallest=True).plan.arena_bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4


def test_make_run_prints_outputs_counts_and_memory(tmp_path, written):
    program = transformer.build("odd", ODD, transformer.RandomNumbers(1), "blocks")
    planned = written(program, board_of("stm32f746"))
    said = toolchain.make(tmp_path, "run")
    expected = interpreter.run(program, images(ODD, 1)[0])
    assert said.split("operator")[0].split()[1:] == [str(value) for value in expected]
    assert f"RAM: {planned.footprint.ram} of 327680 bytes" in said
    assert f"flash: {planned.footprint.flash} of 1048576 bytes" in said
    assert "stack: " in said
    assert boards.COUNT_REMARK in said
    operators = dict(line.rsplit(None, 1) for line in said.split("instructions\n")[1].split("\n\n")[0].splitlines())
    total = int(operators.pop("total"))
    assert total == sum(map(int, operators.values()))
    assert list(operators) == [c["label"] for c in project.facts(tmp_path)["operators"]]
    assert "layers.0.attention.keys" in operators
    hosted = toolchain.make(tmp_path, "host")
    assert hosted.split() == said.split("operator")[0].split()


def test_sanitizers_are_not_left_out_where_the_host_build_is_there_already(tmp_path, written):
    written(transformer.build("odd", ODD, transformer.RandomNumbers(1), "blocks"), board_of("stm32f746"))
    plain = toolchain.make(tmp_path, "host")
    before = (tmp_path / "firmware_host").read_bytes()
    assert toolchain.make(tmp_path, "host", "SANITIZE=-fsanitize=undefined") == plain
    checked = (tmp_path / "firmware_host").read_bytes()
    assert b"ubsan" not in before
    assert b"ubsan" in checked
    built = (tmp_path / "firmware_host").stat().st_mtime_ns
    toolchain.make(tmp_path, "host", "SANITIZE=-fsanitize=undefined")
    assert (tmp_path / "firmware_host").stat().st_mtime_ns == built, "nothing is built twice"


def test_what_is_cleaned_can_be_made_again(tmp_path, written):
    written(transformer.build("odd", ODD, transformer.RandomNumbers(1), "blocks"), board_of("stm32f746"))
    files = {path for path in tmp_path.rglob("*") if path.is_file() and "build" not in path.parts}
    toolchain.make(tmp_path, "firmware.bin", "firmware_host")
    toolchain.make(tmp_path, "clean")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == files, "the sample is no product"


def test_a_board_has_to_be_named(tmp_path, written):
    written(transformer.build("odd", ODD, transformer.RandomNumbers(1), "blocks"), board_of("stm32f746"))
    with pytest.raises(UnsupportedError) as caught:
        toolchain.make(tmp_path, "firmware_board.elf")
    assert "which board? make firmware_board.elf BOARD=my_board.c" in caught.value.detail


def test_counters_count_every_instruction(tmp_path, written):
    """Nops that are added to an operator come out one by one, and nowhere else."""
    board = board_of("stm32f746")
    written(transformer.build("odd", ODD, transformer.RandomNumbers(1), "blocks"), board)
    path, script = tmp_path / "model.c", tmp_path / "qemu.ld"
    good, counts = path.read_text(), []
    for nops in (1, 2, 1001):
        mark = "NC_MARK(1);"
        assert good.count(mark) == 1
        path.write_text(good.replace(mark, f'{mark} __asm volatile(".rept {nops}\\n nop\\n .endr");'))
        if nops == 1001:
            with pytest.raises(UnsupportedError, match="need more flash than was set aside"):
                toolchain.make(tmp_path, "firmware.elf")
            script.write_text(re.sub(rf"\b{set_aside(script)}\b", "100000", script.read_text()))
        toolchain.make(tmp_path, "firmware.elf")
        counts.append(toolchain.run_emulated(tmp_path, board.core, images(ODD, 1)).counts[0].astype(int))
    for found, more in zip(counts[1:], (1, 1000), strict=True):
        assert list(found - counts[0]) == [0, more, *[0] * (len(found) - 2)]


def set_aside(script) -> int:
    """Bytes of flash for model.c."""
    return int(re.search(r"_model_end - _model_start <= (\d+)", script.read_text())[1])


@pytest.mark.parametrize("device", ["stm32f746", "stm32h743", "stm32f427"])
def test_what_the_device_lacks_is_not_there(tmp_path, written, device):
    program = transformer.build("odd", ODD, transformer.RandomNumbers(1), "blocks")
    board = board_of(device)
    written(program, board)
    path, good = tmp_path / "model.c", (tmp_path / "model.c").read_text()
    mark = "NC_MARK(0);"
    end = 0x20000000 + board.ram_bytes
    for address, dies in ((end - 4, False), (end, True), (0x1FFFFFFC, True), (0x00010000, True)):  # the last is flash
        path.write_text(good.replace(mark, f"{mark} *(volatile uint32_t *)0x{address:08X}u = 1;"))
        toolchain.make(tmp_path, "firmware.elf")
        if dies:
            with pytest.raises(UnsupportedError, match="status 99: a fault"):
                toolchain.run_emulated(tmp_path, board.core, images(ODD, 1))
        else:
            toolchain.run_emulated(tmp_path, board.core, images(ODD, 1))
    deep = f"volatile char deep[{board.stack_bytes}]; for (int i = {board.stack_bytes}; i--;) deep[i] = deep[0];"
    path.write_text(good.replace(mark, f"{mark} {deep}"))
    toolchain.make(tmp_path, "firmware.elf")
    with pytest.raises(UnsupportedError, match="a stack that grew too deep"):
        toolchain.run_emulated(tmp_path, board.core, images(ODD, 1))


@pytest.mark.parametrize(
    ("device", "places"),
    [
        ("stm32f746", {".vectors": 0x08000000, ".stack": 0x20000000, ".arena": 0x20000000}),
        ("stm32h743", {".vectors": 0x08000000, ".stack": 0x24000000, ".arena": 0x24000000}),
        ("stm32f427", {".vectors": 0x08000000, ".stack": 0x10000000, ".arena": 0x20000000}),
    ],
)
def test_the_firmware_of_a_board_lies_where_its_memory_is(tmp_path, written, device, places):
    written(transformer.build("odd", ODD, transformer.RandomNumbers(1), "blocks"), board_of(device))
    own = '#include "board.h"\nvoid board_start(void) {}\nvoid board_send(uint8_t byte) { (void)byte; }\n'
    (tmp_path / "mine.c").write_text(own + "uint8_t board_receive(void) { return 0; }\n")
    toolchain.make(tmp_path, "firmware_board.elf", "BOARD=mine.c")
    text = subprocess.run(["arm-none-eabi-size", "-A", tmp_path / "firmware_board.elf"], capture_output=True, text=True, check=True).stdout
    found = {line.split()[0]: int(line.split()[2]) for line in text.splitlines() if line.startswith(".")}
    assert {name: found[name] & 0xFF000000 for name in places} == places
    assert found[".vectors"] == 0x08000000


def test_the_board_of_the_documentation_compiles(tmp_path, written):
    written(transformer.build("odd", ODD, transformer.RandomNumbers(1), "blocks"), board_of("stm32f746"))
    text = (Path(__file__).parents[2] / "docs" / "microcontroller.md").read_text("utf-8")
    (tmp_path / "mine.c").write_text(text.split("```c\n")[1].split("```")[0])
    toolchain.make(tmp_path, "firmware_board.elf", "BOARD=mine.c")
    command = ["arm-none-eabi-nm", tmp_path / "firmware_board.elf"]
    symbols = {line.split()[2] for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()}
    assert {"board_start", "board_send", "board_receive", "board_counter", "board_restart_counter"} <= symbols


@pytest.mark.parametrize(("what", "pattern"), [("ram", "region `RAM' overflowed by"), ("flash", "region `FLASH' overflowed by")])
def test_too_much_memory_does_not_link(tmp_path, written, what, pattern):
    program = transformer.build("odd", ODD, transformer.RandomNumbers(1), "blocks")
    board = board_of("stm32f746")
    planned = written(program, board)
    exact = {"ram": planned.footprint.ram, "flash": planned.footprint.flash}
    for less, fits in ((0, True), (8, False)):
        sizes = exact | {what: exact[what] - less}
        tight = msgspec.structs.replace(
            board, ram=(boards.Region(origin=0x20000000, size=sizes["ram"]),), flash=boards.Region(origin=0, size=sizes["flash"])
        )
        template = (project.HERE / "firmware" / "link.ld").read_text()
        script = boards.linker_script(template, tight, "tight", set_aside(tmp_path / "qemu.ld"))
        (tmp_path / "qemu.ld").write_text(script)
        if fits:
            toolchain.make(tmp_path, "firmware.elf")
        else:
            with pytest.raises(UnsupportedError, match=pattern):
                toolchain.make(tmp_path, "firmware.elf")


def test_sizes_are_what_the_compiler_says(tmp_path, mcu_tools):
    checks = "".join(f'_Static_assert(sizeof({name}) == {size}, "{name}");\n' for name, size in emit.STRUCTS.items())
    linear = programs.Linear(name="l", weights="", bias="", multiplier="", inputs=37, outputs=11)
    head = programs.Head(name="h", keys=linear, values=linear, score_multiplier=0, ratio=0, value_zero=0, zero_point=0)
    attend = programs.Attend(heads=(head,), width=11, tokens=9, rows=9)
    conv = programs.Conv(linear=linear, height=5, width=6, channels=4, kernel=3, stride=1, pad=1)
    depthwise = programs.Depthwise(name="d", weights="", bias="", multiplier="", height=5, width=7, channels=4, stride=1, pad=1)
    low = programs.LowRank(name="r", first=linear, second=linear)
    sizes = {
        "NC_LINEAR_SCRATCH(37)": linear.scratch, "NC_LOW_RANK_SCRATCH(37, 11)": low.scratch, "NC_CONV_SCRATCH(37)": conv.scratch(0),
        "NC_DEPTHWISE_SCRATCH(7, 1)": depthwise.scratch(0), "NC_KEYS_BYTES(9, 11)": programs.keys_bytes(9, 11),
        "NC_VALUES_BYTES(9, 11)": programs.values_bytes(9, 11), "NC_CONV_OUT(6, 3, 1, 1)": programs.out_size(6, conv),
        "NC_ATTENTION_SCRATCH(9, 11)": attend.attention_scratch,
        "NC_MATMUL_SCRATCH(9)": programs.Mix(products=(), rows=9, tokens=9, width=11).scratch(0),
    }  # fmt: skip
    checks += "".join(f'_Static_assert({name} == {size}, "{name}");\n' for name, size in sizes.items())
    (tmp_path / "sizes.c").write_text(f'#include "model.h"\n{checks}')
    flags = [*boards.CORES["cortex-m7"].flags.split(), *toolchain.CFLAGS, *(f"-I{toolchain.HERE / d}" for d in ("kernels", "firmware"))]
    subprocess.run([toolchain.COMPILER, *flags, "-c", tmp_path / "sizes.c", "-o", tmp_path / "sizes.o"], check=True)


def test_a_network_too_large_says_where_and_by_how_much(mcu_tools):
    wide = transformer.Shape.uniform((224, 224, 3), 16, 192, 12, 3, 768, 1000)
    program = transformer.build("deit-tiny", wide, transformer.SizesOnly(), "blocks")
    with pytest.raises(BudgetError, match=r"flash of `stm32f746` is too small: 5,\d+,\d+ bytes of 1,048,576, 4,\d+,\d+ too many"):
        project.place(program.structure, board_of("stm32f746"))
    many = transformer.Shape.uniform((320, 320, 3), 16, 96, 2, 3, 96, 10)
    plain = transformer.build("plain", many, transformer.SizesOnly(), "none")
    with pytest.raises(BudgetError, match=r"too many; the peak is at `layers.0.(scores|softmax)`") as caught:
        project.place(plain.structure, board_of("stm32f746"))
    assert "RAM of `stm32f746`: 327,680 bytes" in caught.value.detail
    assert "fewer tokens" in caught.value.hint


def test_the_host_build_is_clean_under_sanitizers(tmp_path, written):
    program = transformer.build("odd", of_rank(7), transformer.RandomNumbers(1), "all")
    written(program, board_of("stm32f746"))
    toolchain.make(tmp_path, "firmware_host", "SANITIZE=-fsanitize=address,undefined -fno-sanitize-recover=all -g")
    found = toolchain.run_host(tmp_path, images(ODD, 2))
    assert found.outputs.tobytes() == b"".join(interpreter.run(program, image).tobytes() for image in images(ODD, 2))


def test_the_sanitizers_of_the_documentation_end_with_an_error(tmp_path, written):
    """Without -fno-sanitize-recover an overflow would be a line on stderr, and make would succeed."""
    written(transformer.build("odd", ODD, transformer.RandomNumbers(1), "blocks"), board_of("stm32f746"))
    text = (Path(__file__).parents[2] / "docs" / "microcontroller.md").read_text("utf-8")
    [flags] = re.findall(r"`make host SANITIZE=([^`]+)`", text)
    path, good = tmp_path / "model.c", (tmp_path / "model.c").read_text()
    toolchain.make(tmp_path, "host", f"SANITIZE={flags}")
    for fault, says in (
        ("volatile int32_t most = 2147483647; most = most + 1;", "signed integer overflow"),
        ("volatile int8_t few[4] = {0}; volatile int at = 4; few[at] = few[0];", "out of bounds"),
    ):
        path.write_text(good.replace("NC_MARK(0);", f"{{ {fault} }} NC_MARK(0);"))
        with pytest.raises(UnsupportedError) as caught:
            toolchain.make(tmp_path, "host", f"SANITIZE={flags}")
        assert says in caught.value.detail


def test_samples_larger_than_the_image_are_averaged(tmp_path, written):
    board, program = board_of("stm32f746"), transformer.build("odd", ODD, transformer.RandomNumbers(1), "blocks")
    pixels = programs.Pixels(scale=(50.0, 51.0, 52.0), offset=(1.0, 2.0, 3.0), pool=2)
    program = replace(program, structure=msgspec.structs.replace(program.structure, pixels=pixels))
    written(program, board)
    runner = McuRunner(tmp_path, board)
    x = np.random.default_rng(3).normal(0, 2, (2, 3, 48, 48)).astype(np.float32)
    small = x.reshape(2, 3, 24, 2, 24, 2).mean((3, 5)).transpose(0, 2, 3, 1)
    quantized = np.clip(np.rint(small * [50, 51, 52] + [1, 2, 3]), -128, 127).astype(np.int8)
    np.testing.assert_array_equal(runner.run({"pixel_values": x})["logits"], [interpreter.run(program, image) for image in quantized])
    with pytest.raises(DataError, match=r"the network takes float32 of shape \(n, 3, 48, 48\)"):
        runner.run({"pixel_values": x[:, :, :24, :24].copy()})


# ---------------------------------------------------------------------------------------------- as plug-ins


@pytest.fixture(scope="module")
def engine(tmp_path_factory, mcu_tools):
    """(folder, graphs, target, program) of a small network for the F746."""
    numbers = transformer.RandomNumbers(1)
    program = transformer.build("odd", ODD, numbers, "blocks")
    pixels = programs.Pixels(scale=(50.0, 51.0, 52.0), offset=(1.0, 2.0, 3.0))
    structure = msgspec.structs.replace(program.structure, pixels=pixels, logits=programs.Logits(scale=0.25))
    program = replace(program, structure=structure, sample=images(ODD, 1)[0])
    target = targets.make("stm32f746", "", Workload(resolution=(24, 24), sequence=10))
    folder = tmp_path_factory.mktemp("engine")
    return folder, plugins.get("backends", "mcu_c").build(program, target, folder), target, program


def test_an_engine_is_its_flash_image_and_runs(engine):
    folder, graphs, target, program = engine
    backend = plugins.get("backends", "mcu_c")
    facts = project.facts(folder)
    assert sum((folder / name).stat().st_size for name in graphs) == facts["flash"]["used"]
    runner = backend.load(folder, graphs, target)
    x = np.random.default_rng(3).normal(0, 1, (3, 3, 24, 24)).astype(np.float32)
    found = runner.run({"pixel_values": x})["logits"]
    quantized = np.clip(np.rint(x.transpose(0, 2, 3, 1) * [50, 51, 52] + [1, 2, 3]), -128, 127).astype(np.int8)
    np.testing.assert_array_equal(found, np.stack([interpreter.run(program, image) for image in quantized]) * np.float32(0.25))
    np.testing.assert_array_equal(runner.emulate({"pixel_values": x})["logits"], found)
    for wrong in ({}, {"pixels": x}, {"pixel_values": x[:, :2]}, {"pixel_values": x.astype(np.float64)}):
        with pytest.raises(DataError):
            runner.run(wrong)


def test_many_samples_keep_their_order_on_all_cores(engine, monkeypatch):
    folder, graphs, target, _ = engine
    runner = plugins.get("backends", "mcu_c").load(folder, graphs, target)
    x = np.random.default_rng(3).normal(0, 1, (17, 3, 24, 24)).astype(np.float32)
    one_by_one = np.concatenate([runner.run({"pixel_values": image[None]})["logits"] for image in x])
    assert len(np.unique(one_by_one, axis=0)) == 17
    for cores in (1, 3, 64):
        monkeypatch.setattr(toolchain.os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        np.testing.assert_array_equal(runner.run({"pixel_values": x})["logits"], one_by_one)


def test_its_folder_is_verified_file_by_file(engine, tmp_path):
    _, _, target, program = engine
    x = np.random.default_rng(3).normal(0, 1, (2, 3, 24, 24)).astype(np.float32)
    spec = InputSpec("pixel_values", "float32", ("batch", 3, 24, 24))
    parts = engines.Parts(
        name="baseline", role="baseline", target=target, form=program, inputs=(spec,), task="classification", labels=tuple("abcde"),
        config={}, sample={"pixel_values": x},
    )  # fmt: skip
    manifest = engines.write(tmp_path / "e", parts, mcu_c.PLUGIN)
    assert manifest.size_bytes == project.facts(tmp_path / "e")["flash"]["used"]
    assert {"kernels/linear.c", "model.c", "firmware.elf"} <= {check.name for check in engines.verify(tmp_path / "e")}
    found = engines.load(tmp_path / "e").run({"pixel_values": x})["logits"]
    np.testing.assert_array_equal(found, engines.read_sample(tmp_path / "e")[1]["logits"])
    toolchain.make(tmp_path / "e", "run", "host", "firmware_uart.elf")
    (tmp_path / "e" / "firmware_host").write_text("#!/bin/sh\nexit 3\n")
    assert engines.verify(tmp_path / "e"), "what make leaves behind is neither a fault nor what is run"
    (tmp_path / "e" / "kernels" / "build").mkdir()
    (tmp_path / "e" / "kernels" / "build" / "linear.c").write_text("")
    with pytest.raises(RecordError) as caught:
        engines.verify(tmp_path / "e")
    assert caught.value.detail == "unknown file: kernels/build/linear.c"
    shutil.rmtree(tmp_path / "e" / "kernels" / "build")
    with (tmp_path / "e" / "kernels" / "linear.c").open("a") as file:
        file.write("/* changed */")
    with pytest.raises(RecordError, match="not as it was built") as caught:
        engines.verify(tmp_path / "e")
    assert caught.value.detail == "changed file: kernels/linear.c"


def test_a_footprint_is_that_of_the_build(tmp_path, written):
    """For candidates of a real space, whose graph is all that is known of them."""
    config = ViTConfig(
        image_size=24, patch_size=8, num_channels=3, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
        num_labels=5,
    )  # fmt: skip
    family, backend = plugins.get("families", "vit"), mcu_c.PLUGIN
    target = targets.make("stm32f746", "", family.workload(config, 1, 0))
    space = network.search_space(family, config, backend, target, "model")
    board = board_of("stm32f746")
    for number, point in enumerate((spaces.largest(space), spaces.sample(space, np.random.default_rng(5)))):
        graph = network.graph(family, config, space, point, target)
        found = backend.footprint(graph, target)
        shape = transformer.Shape.of_graph(graph, target.workload.resolution)
        program = transformer.build("candidate", shape, transformer.RandomNumbers(number), "blocks")
        assert written(program, board).footprint == found
        toolchain.make(tmp_path, "firmware.elf")
        ran = toolchain.run_emulated(tmp_path, board.core, images(shape, 1))
        assert (ran.ram_bytes, ran.flash_bytes) == (found.ram, found.flash)


def test_time_is_modelled_from_exact_counts(engine):
    folder, graphs, target, _ = engine
    runner = plugins.get("backends", "mcu_c").load(folder, graphs, target)
    device = targets.device("stm32f746")
    x = np.zeros((1, 3, 24, 24), np.float32)
    latency, reference = device.time([Job("engine", runner, {"pixel_values": x}), device.reference()], seconds=1, seed=0)
    assert (latency.kind, latency.unit) == ("modelled", "ms")
    count = int(runner.count({"pixel_values": x}).counts.sum())
    assert latency.value == pytest.approx(count * 0.925 / 216e3)
    assert latency.n == 1
    assert boards.instructions_of(latency.value, 216.0) == count
    assert boards.instructions_of(reference.value, 100.0) == 1_000_000
    assert device.peak_memory("mcu_c", str(folder), target, {}) == project.facts(folder)["ram"]["used"]


def trained() -> tuple[calibrated.Network, np.ndarray]:
    """A network of made up weights with one map in two factors, and images for it: as if somebody had trained it."""
    rng, shape = np.random.default_rng(4), ODD
    sizes = {"embedding": (8 * 8 * 3, shape.width), "head": (shape.width, shape.classes)}
    for i, layer in enumerate(shape.layers):
        wide, inner = shape.width, layer.inner
        parts = {"query": (wide, inner), "key": (wide, inner), "value": (wide, inner), "out": (inner, wide)}
        parts |= {"up": (wide, layer.hidden), "down": (layer.hidden, wide)}
        sizes |= {f"layers.{i}.{part}": size for part, size in parts.items()}
    parameters = {}
    for name, (inputs, outputs) in sizes.items():
        parameters |= {f"{name}.weight": rng.normal(0, inputs**-0.5, (outputs, inputs)), f"{name}.bias": rng.normal(0, 0.1, outputs)}
    for name in ("norm", *(f"layers.{i}.norm{j}" for i in range(len(shape.layers)) for j in (1, 2))):
        parameters |= {f"{name}.weight": rng.normal(1, 0.1, shape.width), f"{name}.bias": rng.normal(0, 0.1, shape.width)}
    parameters |= {"position": rng.normal(0, 0.5, (shape.tokens, shape.width)), "class_token": rng.normal(0, 0.5, shape.width)}
    u, s, v = np.linalg.svd(parameters.pop("layers.0.value.weight"), full_matrices=False)
    parameters |= {"layers.0.value.first": s[:9, None] * v[:9], "layers.0.value.second": u[:, :9]}
    net = calibrated.Network(shape, parameters, epsilon=1e-6, mean=(0.5,) * 3, deviation=(0.25,) * 3)
    return net, (rng.integers(0, 256, (16, 3, 24, 24)) / 255 - 0.5) / 0.25


def test_a_calibrated_network_is_an_engine(tmp_path, mcu_tools):
    net, x = trained()
    program = lowered(net, calibrated.observe(net, [x]), "blocks", x[0])
    target = targets.make("stm32f746", "", Workload(resolution=(24, 24), sequence=10))
    backend = plugins.get("backends", "mcu_c")
    runner = backend.load(tmp_path, backend.build(program, target, tmp_path), target)
    inputs = {"pixel_values": x[:4].astype(np.float32)}
    found = runner.run(inputs)["logits"]
    np.testing.assert_array_equal(runner.emulate(inputs)["logits"], found)
    scores = np.stack([interpreter.run(program, image) for image in runner.quantized(inputs)])
    np.testing.assert_array_equal(found, (scores * program.structure.logits.scale).astype(np.float32))
    want = calibrated.forward(net, x[:4])
    assert 10 * np.log10((want**2).sum() / ((found - want) ** 2).sum()) > 20, "dB of the scores against float ones"


def test_a_program_that_the_kernels_do_not_compute_is_no_engine(engine, tmp_path, monkeypatch):
    *_, target, program = engine
    monkeypatch.setattr(interpreter, "run", lambda *_: np.zeros(5, np.int32))
    with pytest.raises(UnsupportedError, match="gives other bytes on this computer"):
        mcu_c.PLUGIN.build(program, target, tmp_path)


def test_profiles_of_boards_say_what_memory_they_have(tmp_path):
    for name, ram, flash in (("stm32f746", 320, 1024), ("stm32h743", 512, 2048), ("stm32f427", 256, 1024)):
        board = board_of(name)
        assert (board.ram_bytes, board.flash.size) == (ram * 1024, flash * 1024)
        guarded = boards.guard_regions(boards.emulated(board))
        assert board.ram_bytes == sum(1 << log2 for _, log2, access in guarded if access == boards.OPEN)
    text = (targets.load_profile("stm32f746") and targets._files(None)["stm32f746"].read_text()).replace("327680\n", "262144\n")
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(RecipeError, match="contradicts itself: ram_bytes 262144"):
        targets.make("mine", "", Workload(), profiles=tmp_path)
    (tmp_path / "mine.toml").write_text(text.replace("cortex-m7", "cortex-m33").replace("262144\n", "327680\n"))
    target = targets.make("mine", "", Workload(), profiles=tmp_path)
    with pytest.raises(UnsupportedError, match="core cortex-m33"):
        boards.of_settings("mine", dict(target.session))


def test_tools_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name.startswith("qemu") else f"/usr/bin/{name}")
    assert mcu_c.PLUGIN.unavailable().startswith("qemu-system-arm is not installed: apt-get install")
