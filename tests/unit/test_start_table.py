"""The table of memory in the start-up log."""

from __future__ import annotations

import re

import pytest
import torch

from sglang_kvc.memory.start_table import (
    DeviceBytes,
    Part,
    device_bytes,
    memory_table,
    weight_bytes,
)

GIB = 1 << 30
ROW = re.compile(r"^  (\S.*?) +(\d+\.\d{3}) GiB +(\d+\.\d) %", re.MULTILINE)


def rows(table: str) -> dict[str, tuple[float, float]]:
    """GiB and percent by name."""
    return {name: (float(gib), float(part)) for name, gib, part in ROW.findall(table)}


def test_all_rows_but_the_total_add_up_to_it() -> None:
    parts = [Part("weights", 3 * GIB), Part("scores", GIB), Part("graphs", 0)]
    table = memory_table(parts, DeviceBytes(free=5 * GIB, total=10 * GIB))
    found = rows(table)
    assert found["other"] == (1.0, 10.0)
    assert "graphs" not in found
    total = found.pop("total")
    assert total == (10.0, 100.0)
    assert sum(gib for gib, _ in found.values()) == total[0]
    assert len({line.index("GiB") for line in table.splitlines()}) == 1


def test_pages_that_nobody_has_written_are_no_debt() -> None:
    parts = [Part("keys and values", 8 * GIB)]
    found = rows(memory_table(parts, DeviceBytes(free=5 * GIB, total=10 * GIB)))
    assert found["other"] == (0.0, 0.0)


def test_shared_weights_count_once() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 4)
    )
    tied = torch.nn.ModuleList([model, model[0]])
    assert weight_bytes(tied) == 4 * (4 * 8 + 8 * 4 + 4)


def test_a_machine_has_memory() -> None:
    free, total = device_bytes("cpu")
    assert 0 < free < total


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_memory() -> None:
    free, total = device_bytes("cuda")
    assert 0 < free < total
