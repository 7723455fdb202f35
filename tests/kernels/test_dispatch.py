"""Which implementation an op takes."""

from types import SimpleNamespace

import pytest
import torch

from sglang_kvc.kernels.dispatch import FORCE_REFERENCE, use_triton


def test_cpu_tensors_take_the_reference() -> None:
    assert not use_triton(torch.zeros(1))


@pytest.mark.parametrize(
    ("value", "expected"), [(None, True), ("0", True), ("1", False)]
)
def test_reference_can_be_forced(
    value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FORCE_REFERENCE, raising=False)
    if value is not None:
        monkeypatch.setenv(FORCE_REFERENCE, value)
    assert use_triton(SimpleNamespace(is_cuda=True)) is expected
