"""One thread per test, no network, and nothing written outside the test's own folders."""

from __future__ import annotations

import os
import sys
import tempfile

import pytest

# read when torch, tokenizers and huggingface_hub are imported, so before any test module is
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    XDG_DATA_HOME=tempfile.mkdtemp(prefix="nascompile-tests-"),
)


@pytest.fixture(scope="session")
def mcu_tools():
    """Cross-compiler, QEMU, host compiler and make: without them the test fails in CI and is skipped elsewhere, saying what to install."""
    from nascompile.backends import mcu_c

    if reason := mcu_c.PLUGIN.unavailable():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability=(8, 9), …): from then on there is a GPU of that kind, TensorRT and TensorRT-RTX, none of them real."""
    import tensorrt_stub

    from nascompile import cuda_driver, plugins

    def install(rtx=("8.9", "12.0"), version="11.4.0", **driver):
        found = tensorrt_stub.Driver(**driver)
        monkeypatch.setattr(cuda_driver, "library", lambda: found)
        cuda_driver._context.cache_clear()
        monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_stub.module(found, version))
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", tensorrt_stub.module(found, "1.7.1.116", rtx))
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setattr(plugins.get("backends", name), "_logger", None)
        return found

    yield install
    cuda_driver._context.cache_clear()
