"""Which prefill a device has."""

from __future__ import annotations

import pytest

from sglang_kvc.attention import prefill_kernels
from sglang_kvc.attention.prefill_kernels import CHOICE, PrefillDevice, prefill_device
from sglang_kvc.errors import ConfigError


@pytest.mark.parametrize(
    ("capability", "chosen", "device"),
    [
        ((8, 0), "", PrefillDevice.OTHER_NVIDIA),
        ((9, 0), "", PrefillDevice.HOPPER),
        ((10, 0), "", PrefillDevice.OTHER_NVIDIA),
        ((9, 0), "flashinfer", PrefillDevice.OTHER_NVIDIA),
        ((8, 9), "fa3", PrefillDevice.HOPPER),
    ],
)
def test_prefill_of_a_gpu(
    capability: tuple[int, int],
    chosen: str,
    device: PrefillDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CHOICE, chosen)
    monkeypatch.setattr(prefill_kernels, "get_device_capability", lambda: capability)
    assert prefill_device(on_gpu=True) is device


def test_the_cpu_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "flashinfer")
    assert prefill_device(on_gpu=False) is PrefillDevice.CPU


def test_unknown_choice_is_refused_wherever_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CHOICE, "triton")
    with pytest.raises(ConfigError, match="must be fa3 or flashinfer, got 'triton'"):
        prefill_device(on_gpu=False)
