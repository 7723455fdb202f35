"""What a slot's tables say after its owner has started from a snapshot."""

from __future__ import annotations

from typing import Any

import torch

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.kernels.layout import BlockTables
from sglang_kvc.kernels.query_ring import QueryRing
from sglang_kvc.memory.device_state import DeviceState
from sglang_kvc.scheduling.step_plan import Resumed, StepPlan
from sglang_kvc.sessions.snapshot import Snapshot

HEADS, SLOTS, PAGES = 4, 5, 8


def snapshot(number: int, fold: int, pages: int) -> Snapshot:
    offsets = torch.arange(HEADS + 1, dtype=torch.int32) * pages
    unit = torch.tensor(float(number))
    return Snapshot(number, b"", fold, 16 * pages, offsets, unit, 1)


def tokens(*pages: int) -> torch.Tensor:
    """Token ids of these pages."""
    return (torch.tensor(pages)[:, None] * 16 + torch.arange(16)).flatten()


def state() -> DeviceState:
    anything: Any = None
    tables = BlockTables(
        req_to_token=torch.zeros(SLOTS, 128, dtype=torch.int32),
        fold_lens=torch.full((SLOTS,), 7, dtype=torch.int32),
        block_offsets=torch.full((SLOTS, HEADS + 1), 7, dtype=torch.int32),
        packed_pages=torch.full((SLOTS, PAGES), 7, dtype=torch.int32),
    )
    rings = torch.full((SLOTS, 2), 7, dtype=torch.int32)
    return DeviceState(
        options=KVCompressOptions(sessions=True),
        shape=anything,
        arena=anything,
        tables=tables,
        query_ring=QueryRing(anything, anything, rings, window=32),
        novelty_unit=torch.full((SLOTS,), 7.0),
        device="cpu",
    )


def test_slots_read_their_snapshots_and_others_are_left_alone() -> None:
    """Two at once, of different lengths, one of them in a slot that was reset."""
    device = state()
    device.reset_slots([1, 3])
    resumed = [
        Resumed(3, snapshot(1, 160, 3), tokens(9, 4, 11)),
        Resumed(1, snapshot(2, 64, 1), tokens(20)),
    ]
    device.resume_slots(resumed)
    tables = device.tables
    assert tables.fold_lens.tolist() == [7, 64, 7, 160, 7]
    assert tables.block_offsets[3].tolist() == [0, 3, 6, 9, 12]
    assert tables.block_offsets[1].tolist() == [0, 1, 2, 3, 4]
    assert tables.packed_pages[3, :3].tolist() == [9, 4, 11]
    assert tables.packed_pages[1, :1].tolist() == [20]
    assert device.novelty_unit.tolist() == [7, 2, 7, 1, 7]
    for slot in (0, 2, 4):
        assert tables.block_offsets[slot].tolist() == [7] * (HEADS + 1)
        assert tables.packed_pages[slot].tolist() == [7] * PAGES


def test_ranks_that_resume_otherwise_plan_otherwise() -> None:
    def plan(number: int, *pages: int) -> StepPlan:
        return StepPlan(
            reset_slots=[1],
            resumed=[Resumed(1, snapshot(number, 64, len(pages)), tokens(*pages))],
        )

    one = plan(1, 5, 6).digest()
    assert one == plan(1, 5, 6).digest()
    assert len({one, plan(2, 5, 6).digest(), plan(1, 6, 5).digest()}) == 3
