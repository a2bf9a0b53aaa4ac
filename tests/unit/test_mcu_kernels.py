"""Every integer kernel against its NumPy definition: on this machine under AddressSanitizer and UBSan, and in QEMU on both cores."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from kernel_calls import run
from kernel_calls.calls import (
    LIMITS,
    add,
    attention,
    average_pool,
    conv,
    depthwise,
    head,
    layer_norm,
    linear,
    lookup,
    low_rank,
    mean,
    patch_embed,
    scores,
    softmax,
    weighted,
)  # fmt: skip


def calls_of(kernel: str) -> list:
    """Odd sizes, single tokens and channels, every remainder modulo 4, values at the ends, buffers at odd addresses."""
    rng = np.random.default_rng(sum(map(ord, kernel)))
    kinds = ("rows", "table", "residual", "keys", "values")
    match kernel:
        case "linear":
            sizes = ((1, 1, 1), (4, 4, 2), (5, 27, 7), (11, 66, 5), (6, 34, 8))
            found = [linear(rng, *size, kind=kind) for kind in kinds for size in sizes]
            found += [linear(rng, n, 8, 3, kind="rows") for n in range(1, 10)] + [linear(rng, 5, k, 3) for k in range(1, 37)]
            found += [linear(rng, 6, 13, 5, kind=kind, gap=3, offset=1) for kind in ("rows", "table", "residual")]
            return [*found, linear(rng, 9, 768, 4, extreme=True), linear(rng, 5, 20, 4, kind="residual", extreme=True)]
        case "low_rank":
            sizes = ((1, 1, 1, 1), (4, 8, 4, 6), (5, 27, 7, 5), (7, 40, 17, 9), (6, 33, 18, 4))
            return [low_rank(rng, *size, kind) for size in sizes for kind in ("rows", "table", "residual")]
        case "head":
            return [head(rng, inputs, outputs) for inputs, outputs in ((1, 1), (96, 10), (27, 7), (33, 2))]
        case "attention":
            sizes = ((1, 1, 1), (4, 2, 4), (5, 5, 8), (7, 17, 32), (6, 66, 7), (9, 3, 18))
            found = [attention(rng, *size) for size in sizes] + [attention(rng, 6, 19, 16, over_q=True)]
            found += [attention(rng, 5, 512, 8, spread=0.001), attention(rng, 4, 30, 16, spread=1e-6)]
            found.append(attention(rng, 64, 40, 64))  # enough values for one that a reciprocal rounded down would change
            return [*found, attention(rng, 5, 65, 64, spread=0.05, extreme=True), attention(rng, 4, 511, 4, spread=0.0, extreme=True)]
        case "matmul":
            sizes = ((1, 1, 1), (5, 7, 9), (4, 18, 32), (6, 65, 6))
            return [make(rng, *size) for make in (scores, weighted) for size in sizes]
        case "softmax":
            found = [softmax(rng, rows, n, 0.05, in_place=n % 2 == 1) for rows, n in ((1, 1), (3, 2), (5, 17), (2, 196))]
            found += [softmax(rng, 1, 7, 0.1, fill=fill) for fill in LIMITS]
            found.append(softmax(rng, 600, 8, 0.02))  # as there
            return [*found, softmax(rng, 2, 300, 0.0), softmax(rng, 2, 9, 10.0)]
        case "layer_norm":
            found = [layer_norm(rng, 5, n, in_place=n % 2 == 1, offset=n % 4) for n in (2, 3, 4, 7, 33, 96, 192, 1024)]
            found += [layer_norm(rng, 4, 64, spread=spread, eps=eps) for spread in (1, 2, 300) for eps in (0.0, 1e-5, 1.0)]
            return found
        case "lookup":
            return [lookup(rng, n, in_place=n % 2 == 1, offset=n % 3) for n in (1, 2, 3, 7, 8, 9, 64, 257)]
        case "add":
            found = [add(rng, n, alias=alias, offset=0 if alias else 1) for n in (1, 3, 8, 13, 64) for alias in (None, 0, 1)]
            for zeros in ((-128, -128, 127), (127, 127, -128)):
                found.append(add(rng, 99, scales=(0.36999, 0.36999, 0.1), zeros=zeros, extreme=True))
            return [*found, add(rng, 99, scales=(0.2, 0.2, 0.055)), add(rng, 99, scales=(1e-4, 0.2, 0.2))]
        case "mean":
            return [mean(rng, *size) for size in ((1, 1), (3, 4), (5, 7, 2), (64, 96), (300, 5))]
        case "patch_embed":
            sizes = ((4, 3, 8, 3, 6), (2, 1, 5, 2, 3), (1, 1, 1, 1, 1), (7, 1, 6, 2, 5), (3, 3, 9, 2, 4), (5, 2, 2, 1, 2))
            return [patch_embed(rng, *size, residual=residual) for size in sizes for residual in (False, True)]
        case "conv":
            sizes = ((1, 1, 1, 1, 3, 1, 1), (5, 5, 3, 4, 3, 1, 1), (6, 7, 4, 5, 3, 2, 1), (8, 3, 2, 3, 3, 1, 0), (9, 9, 1, 8, 3, 2, 0))
            found = [conv(rng, *size) for size in (*sizes, (7, 4, 3, 2, 3, 3, 1))]
            found += [conv(rng, 4, 5, 8, 6, 1, 1, 0), conv(rng, 7, 7, 2, 3, 5, 2, 2), conv(rng, 4, 4, 3, 2, table=True)]
            return [*found, conv(rng, 4, 5, 4, 4, residual=True)]
        case "depthwise":
            sizes = ((1, 1, 1, 1, 1), (5, 6, 4, 1, 1), (7, 5, 5, 2, 1), (8, 8, 10, 2, 0), (3, 3, 7, 1, 0), (6, 6, 8, 3, 1), (9, 9, 4, 4, 2))
            return [depthwise(rng, *size, table=table) for size in sizes for table in (False, True)]
        case "average_pool":
            sizes = ((2, 2, 1, 2, 2), (7, 6, 5, 2, 2), (6, 6, 3, 3, 1), (5, 5, 8, 5, 1), (4, 4, 2, 1, 1))
            return [average_pool(rng, *size) for size in sizes]
    raise AssertionError(kernel)


def check(calls, results):
    for call, result in zip(calls, results, strict=True):
        expected = np.ascontiguousarray(call.expected).reshape(-1).view(np.int8)
        wrong = np.flatnonzero(expected != result.output)
        assert not wrong.size, (call.kernel, call.parameters, wrong[:8], expected[wrong[:8]], result.output[wrong[:8]])


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, mcu_tools: None) -> Path:
    return run.build_host(tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize("kernel", run.KERNEL_NAMES)
def test_a_kernel_returns_what_its_definition_says(kernel, host):
    calls = calls_of(kernel)
    check(calls, run.on_host(host, calls))


def random_calls(seed, count):
    """Kernels in turn, each of a size nobody chose."""
    rng = np.random.default_rng(seed)
    size = lambda low, high: int(rng.integers(low, high + 1))  # noqa: E731
    kinds = ("rows", "table", "residual", "keys", "values")
    makers = (
        lambda: linear(rng, size(1, 13), size(1, 70), size(1, 21), kind=str(rng.choice(kinds))),
        lambda: low_rank(rng, size(1, 9), size(1, 40), size(1, 20), size(1, 12), kind=str(rng.choice(kinds[:3]))),
        lambda: attention(rng, size(1, 9), size(1, 70), size(1, 40), spread=float(rng.choice([0.001, 0.02, 0.05]))),
        lambda: layer_norm(rng, size(1, 5), size(2, 300), spread=size(1, 128), eps=float(rng.choice([0.0, 1e-6, 0.1]))),
        lambda: patch_embed(rng, size(1, 6), size(1, 4), size(1, 9), size(1, 3), size(1, 7), residual=bool(size(0, 1))),
        lambda: conv(rng, size(3, 9), size(3, 9), size(1, 6), size(1, 7), size(1, 3), size(1, 3), size(0, 1)),
        lambda: depthwise(rng, size(3, 9), size(3, 9), size(1, 11), size(1, 3), size(0, 2), table=bool(size(0, 1))),
        lambda: average_pool(rng, size(4, 9), size(4, 9), size(1, 9), size(1, 4), size(1, 3)),
        lambda: head(rng, size(1, 130), size(1, 21)),
        lambda: scores(rng, size(1, 9), size(1, 70), size(1, 40)),
        lambda: weighted(rng, size(1, 9), size(1, 70), size(1, 40)),
        lambda: softmax(rng, size(1, 9), size(1, 260), float(rng.choice([0.001, 0.02, 0.3])), in_place=bool(size(0, 1))),
        lambda: lookup(rng, size(1, 90), in_place=bool(size(0, 1)), offset=size(0, 3)),
        lambda: add(rng, size(1, 90), alias=None if size(0, 1) else size(0, 1), offset=0),
        lambda: mean(rng, size(1, 90), size(1, 40), gap=size(0, 5)),
    )
    return [makers[i % len(makers)]() for i in range(count)]


@pytest.mark.parametrize("seed", [1, 2])
def test_so_it_does_at_sizes_nobody_chose(seed, host):
    calls = random_calls(seed, 480)
    assert {call.kernel for call in calls} == set(run.KERNEL_NAMES), "no kernel is left out"
    check(calls, run.on_host(host, calls))


@pytest.mark.parametrize("core", sorted(run.CORES))
def test_so_does_each_core_in_qemu(core, tmp_path, mcu_tools):
    calls = [call for kernel in run.KERNEL_NAMES for call in calls_of(kernel)] + random_calls(3, 120)
    results = run.in_qemu(run.build_target(tmp_path, core), calls, core)
    check(calls, results)
    assert min(result.instructions for result in results) > 10


def test_the_checker_sees_one_wrong_byte(host):
    [call, *_] = calls_of("add")
    wrong = run.Call(**{**vars(call), "expected": call.expected ^ np.int8(1)})
    with pytest.raises(AssertionError, match="add"):
        check([wrong], run.on_host(host, [wrong]))


def test_the_sanitizer_sees_one_byte_too_few(host):
    call = linear(np.random.default_rng(0), 5, 12, 4)
    short = run.Buffer(call.buffers[2].content.ravel()[:-1])
    with pytest.raises(RuntimeError, match="heap-buffer-overflow"):
        run.on_host(host, [run.Call(**{**vars(call), "buffers": (*call.buffers[:2], short, call.buffers[3])})])
