"""Threads, and where the public data lies."""

import os

# Before torch is imported anywhere: idle threads sleep, and each of several test processes keeps to one core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if PARALLEL:
    os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _one_thread_a_process():
    if PARALLEL:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in [name for name in os.environ if name.startswith("REPLIB_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public files beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no public data: {SHARED} does not exist")
    return SHARED
