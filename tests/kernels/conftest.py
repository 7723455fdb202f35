"""Lanes of the kernel tests: Triton's interpreter on a CPU, or a CUDA device.

``TRITON_INTERPRET=1 pytest tests/kernels`` interprets the kernels (the variable must be
set before Triton is imported, so it is a run of its own); without it the same tests run
on the GPU.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.kernels import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED


def pytest_configure(config: pytest.Config) -> None:
    """Silence Triton's interpreter, which warns at every loop bound with NumPy 2."""
    config.addinivalue_line(
        "filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this lane cannot run."""
    no_triton = pytest.mark.skip(reason="needs a CUDA device or TRITON_INTERPRET=1")
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, without TRITON_INTERPRET=1")
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(no_gpu)
        if item.get_closest_marker("interpreter") and not (ON_GPU or INTERPRETED):
            item.add_marker(no_triton)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """See `interpreter`."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            interpreter.spare(patch)
        yield


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors of a test live."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same whatever ran before: one sample's error has a long tail."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` gives, so that an element nobody wrote shows."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor.fill_(-(2**30) if tensor.dtype.itemsize >= 4 else 1)

    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(
        torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))
    )
