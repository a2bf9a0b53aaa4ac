"""One thread per test, no network, and nothing written outside the test's own folders."""

from __future__ import annotations

import os
import tempfile

# read when torch, tokenizers and huggingface_hub are imported, so before any test module is
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    XDG_DATA_HOME=tempfile.mkdtemp(prefix="nascompile-tests-"),
)
