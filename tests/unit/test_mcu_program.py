"""What is refused before any C is written: sizes that kernels do not take, boards that cannot be, memory that is not enough."""

from __future__ import annotations

import re

import msgspec
import pytest

from nascompile import targets
from nascompile.errors import BudgetError, RecipeError, UnsupportedError
from nascompile.mcu import board as boards, emit, program as p, project, toolchain, transformer
from nascompile.records import Workload

BOARD = boards.Board(
    device="some", core=boards.CORES["cortex-m7"], ram=(boards.Region(origin=0x20000000, size=1 << 18),),
    flash=boards.Region(origin=0, size=1 << 20), clock_mhz=100.0,
)  # fmt: skip
WINDOW = {"height": 300, "width": 300, "channels": 1, "stride": 1}
PRODUCTS = (p.Product(name="p", multiplier=0, w_zero=0, zero_point=0),)


def linear(inputs: int, outputs: int = 4) -> p.Linear:
    return p.Linear(name="map", weights="", bias="", multiplier="", inputs=inputs, outputs=outputs)


def attend(tokens: int) -> p.Attend:
    head = p.Head(name="h", keys=linear(4), values=linear(4), score_multiplier=0, ratio=0, value_zero=0, zero_point=0)
    return p.Attend(heads=(head,), width=4, tokens=tokens, rows=1)


def low_rank(rank: int) -> p.Dense:
    return p.Dense(map=p.LowRank(name="map", first=linear(4, rank), second=linear(rank)), rows=1)


def normalize(width: int) -> p.Normalize:
    return p.Normalize(norm=p.Norm(name="n", affine="", epsilon=0, width=width), rows=1)


def conv(pad: int = 0, **sizes: int) -> p.Conv:
    return p.Conv(linear=linear(9), kernel=3, pad=pad, **(WINDOW | sizes))


def pool(kernel: int, **sizes: int) -> p.AveragePool:
    return p.AveragePool(multiplier=0, x_zero=0, zero_point=0, kernel=kernel, **(WINDOW | sizes))


def structure(kernel: p.Kernel) -> p.Structure:
    tensor = p.Tensor(name="x", shape=(1,), size_bytes=1)
    operation = p.Operation(name="here", kernel=kernel, inputs=(), outputs=("x",))
    return p.Structure(name="s", tensors=(tensor,), operations=(operation,), image=(1, 1, 1), output="x")


@pytest.mark.parametrize(
    ("make", "most", "says"),
    [
        (lambda n: p.Dense(map=linear(n), rows=1), 32768, "32,769 inputs of map"),
        (lambda n: p.Classify(linear=linear(n)), 32768, "32,769 inputs of map"),
        (low_rank, 2048, "2,049 values between the factors of map"),
        (attend, 512, "513 tokens, its kernel takes 1 to 512"),
        (normalize, 1024, "1,025 normalized channels"),
        (lambda n: p.Softmax(table="", rows=1, width=n), 65535, "65,536 scores in a row"),
        (lambda n: p.Scores(products=PRODUCTS, rows=1, tokens=1, width=n), 32768, "32,769 channels of a head"),
        (lambda n: p.Mix(products=PRODUCTS, rows=1, tokens=n, width=1), 32768, "32,769 tokens"),
        (lambda n: p.Mean(multiplier=0, x_zero=0, zero_point=0, rows=n, channels=1), 16384, "16,385 rows"),
        (conv, 2, "3 pixels of padding, its kernel takes 0 to 2"),
        (pool, 128, "16,641 pixels in a window"),
    ],
)
def test_sizes_that_a_kernel_does_not_take_are_refused(make, most, says):
    p.check(structure(make(most)))
    with pytest.raises(UnsupportedError, match=f"operator here has {says}"):
        p.check(structure(make(most + 1)))
    with pytest.raises(UnsupportedError, match="operator here has"):  # before anything is compiled
        project.place(structure(make(most + 1)), BOARD)


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (normalize(1), "1 normalized channels, its kernel takes 2 to 1,024"),
        (conv(height=2), "0 rows of output, its kernel takes at least 1"),
        (conv(width=1), "-1 columns of output"),
        (conv(stride=0), "0 pixels from window to window"),
        (pool(2, pad=1), "1 pixels of padding, its kernel takes 0 to 0"),
    ],
)
def test_so_are_sizes_of_nothing(kernel, says):
    with pytest.raises(UnsupportedError, match=f"operator here has {says}"):
        p.check(structure(kernel))


def test_at_these_sizes_sums_fit_32_bits_whatever_the_bytes_are():
    bias = 2**30  # constants.bias_words
    assert p.MOST_INPUTS * 127 * 255 + bias < 2**31
    assert p.MOST_INPUTS * 255 * 255 < 2**31, "shares by values"
    assert p.MOST_RANK * 127 * 4096 + bias < 2**31
    assert p.MOST_TOKENS * 16384 * 255 < 2**31
    assert p.MOST_ROWS * 255 * 256 < 2**31


def test_an_image_that_is_no_whole_number_of_patches():
    with pytest.raises(UnsupportedError, match="an image of 24 x 30 is no whole number of patches of 8 x 8"):
        transformer.Shape.uniform((24, 30, 3), 8, 16, 1, 2, 24, 4)


@pytest.fixture
def small(monkeypatch):
    """A program's structure, and what is in RAM beside its arena; kernels of a known size, so that nothing is compiled."""
    monkeypatch.setattr(toolchain, "base", lambda *_: toolchain.Base(text=1000, bss=40))
    shape = transformer.Shape.uniform((16, 16, 3), 8, 16, 1, 2, 24, 4)
    found = transformer.build("small", shape, transformer.SizesOnly()).structure
    footprint = project.place(found, BOARD).footprint
    return found, footprint.ram - footprint.arena


def with_ram(*sizes: int) -> boards.Board:
    return msgspec.structs.replace(BOARD, ram=tuple(boards.Region(origin=0, size=size) for size in sizes))


def test_a_ram_that_stack_and_variables_fill_is_not_without_limit(small):
    structure, rest = small
    for size in (rest - 8, rest):
        with pytest.raises(BudgetError, match=f"stack and variables alone take {rest:,} bytes of {size:,}"):
            project.place(structure, with_ram(size))
    with pytest.raises(BudgetError, match="the arena does not fit"):
        project.place(structure, with_ram(rest + 8))


def test_stack_and_variables_have_to_fit_the_region_that_is_theirs(small):
    structure, rest = small
    project.place(structure, with_ram(1 << 16, rest))
    with pytest.raises(BudgetError, match=f"alone take {rest:,} bytes of {rest - 8:,}"):
        project.place(structure, with_ram(1 << 16, rest - 8))
    assert project.place(structure, with_ram(64, 64), enforce=False).footprint.ram > 128


def test_below_the_stack_of_the_emulated_board_there_is_nothing():
    board = boards.emulated(with_ram(3072, 512, 1024))
    assert [(region.origin - 0x20000000, region.size) for region in board.ram] == [(1024, 3072), (4096, 512), (0, 1024)]
    guarded = boards.guard_regions(board)
    assert sum(1 << log2 for _, log2, access in guarded if access == boards.OPEN) == 4608
    assert (0, 28, boards.READ_ONLY) in guarded


def test_a_ram_that_cannot_be_guarded_names_one_that_can():
    with pytest.raises(UnsupportedError, match="a RAM of 327,648 bytes cannot be guarded") as caught:
        boards.guard_regions(with_ram(327648))
    assert caught.value.hint == "325,632 bytes can be"
    assert boards.guard_regions(with_ram(325632))


SETTINGS = {"core": "cortex-m7", "clock_mhz": "100", "ram": "0x20000000:65536", "flash": "0x08000000:65536"}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"clock_mhz": "0"}, "clock_mhz = 0"),
        ({"clock_mhz": "-1"}, "clock_mhz = -1"),
        ({"clock_mhz": "nan"}, "clock_mhz = nan"),
        ({"ram": "0x20000000:65530"}, "not a size of RAM of `mine`: 65,530 bytes"),
        ({"ram": "0x20000000:65536,0x10000000:16"}, "not a size of RAM of `mine`: 16 bytes"),
        ({"ram": "0x20000000:65536,0x10000000:4096", "stack_bytes": "4096"}, "a stack of 4,096 bytes does not fit the 4,096 of RAM"),
        ({"flash": "0x08000000:8388608"}, "`mine` has more memory than the emulated board"),
    ],
)
def test_boards_that_cannot_be(changed, says):
    assert boards.of_settings("mine", SETTINGS).ram_bytes == 65536
    with pytest.raises(UnsupportedError, match=says) as caught:
        boards.of_settings("mine", SETTINGS | changed)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("line", "instead", "says", "hint"),
    [
        ("clock_mhz", "", "`mine` does not say its clock_mhz", "clock_mhz = 216.0"),
        ("core", "", "`mine` does not say its core", 'core = "cortex-m7"'),
        ("ram =", "", "`mine` does not say its ram", 'ram = ["0x20000000:327680"]'),
        ("flash =", "", "a memory of `mine` cannot be read: ''", 'flash = "0x08000000:1048576"'),
        ("ram =", 'ram = ["0x20000000:-327680"]', "cannot be read: '0x20000000:-327680'", "ADDRESS:BYTES"),
        ("ram =", 'ram = ["-0x20000000:327680"]', "cannot be read: '-0x20000000:327680'", "ADDRESS:BYTES"),
        ("ram =", 'ram = ["0xFFFF0000:327680"]', "cannot be read: '0xFFFF0000:327680'", "within 32 bits"),
        ("ram =", 'ram = ["20000000h:327680"]', "cannot be read: '20000000h:327680'", "ADDRESS:BYTES"),
        ("ram =", 'ram = ["0x20000000:163840", "0x20010000:163840"]', "that at 0x20000000 reaches that at 0x20010000", "memory map"),
        ("flash =", 'flash = "0x20000000:1048576"', "memories of `mine` overlap", "memory map"),
        ("flash_bytes", "flash_bytes = 524288", "flash_bytes 524288, but its memories have 327680 and 1048576", "ram_bytes = 327680"),
    ],
)
def test_profiles_that_cannot_be(tmp_path, line, instead, says, hint):
    text = targets._files(None)["stm32f746"].read_text()
    (tmp_path / "mine.toml").write_text(text)
    assert dict(targets.make("mine", "", Workload(), profiles=tmp_path).session)["core"] == "cortex-m7"
    lines = [instead if said.startswith(line) else said for said in text.splitlines()]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=re.escape(says)) as caught:
        targets.make("mine", "", Workload(), profiles=tmp_path)
    assert hint in caught.value.hint
    [listed] = [device for device in targets.known(tmp_path) if device.name == "mine"]
    assert (listed.runs_here, listed.reason) == (False, caught.value.message)


def test_memories_that_touch_do_not_overlap(tmp_path):
    text = targets._files(None)["stm32f746"].read_text()
    (tmp_path / "mine.toml").write_text(text.replace('["0x20000000:327680"]', '["0x20010000:0x40000", "0x20000000:65536"]'))
    session = dict(targets.make("mine", "", Workload(), profiles=tmp_path).session)
    assert boards.of_settings("mine", session).ram_bytes == 327680


def test_two_parameters_of_one_name_are_never_taken_for_one(small):
    writer = emit.written(small[0], project.place(small[0], BOARD).plan)
    before = writer.model_bytes
    assert writer.struct("nc_add_t", "a.b", {"constant": 1}) == writer.struct("nc_add_t", "a_b", {"constant": 1})
    assert writer.model_bytes == before + 16, "once"
    with pytest.raises(AssertionError, match="two parameters are named a_b"):
        writer.struct("nc_add_t", "a_b", {"constant": 2})


def test_what_makes_programs_is_part_of_their_version():
    names = [path.name for path in toolchain.sources()]
    assert {"programs.py", "calibrated.py", "kernels.h", "link.ld", "Makefile"} <= set(names)
    assert len(names) == len(set(toolchain.sources()))
