"""`plan_decode` and the workspace it fills: who works on which tiles."""

from typing import NamedTuple

import pytest
import torch

from sglang_kvc.kernels import decode_plan, decode_schedule
from sglang_kvc.kernels.decode_attention import (
    DecodeConfig,
    decode_attention_ref,
    decode_attention_triton,
    make_decode_workspace,
    plan_decode,
    plan_decode_ref,
    plan_decode_triton,
)
from sglang_kvc.kernels.testing import Case, make_case
from tests.kernels import oracles
from tests.kernels.decode_checks import make_batch, make_workspace
from tests.kernels.decode_checks import one_sm as one_sm


class HandPlan(NamedTuple):
    """The plan of one layer, tile by tile and row by row."""

    cu_tiles: list[int]
    first_rows: list[int]
    share: int
    records: list[list[int]]


def plan_by_hand(
    case: Case, layer: int, slots: list[int], config: DecodeConfig
) -> HandPlan:
    """Plan live rows, then padding. A record is [slot, .., entries] of one row."""
    sizes, records = [], []
    for b, slot in enumerate(slots):
        for h in range(case.arena.num_kv_heads):
            lh, live = layer * case.arena.num_kv_heads + h, b < len(case.slots)
            n = len(oracles.entries(case, b, lh)) if live else 1
            first, end = case.tables.block_offsets[slot, lh : lh + 2].tolist()
            fold = int(case.tables.fold_lens[slot])
            sizes.append(-(-n // config.tile))
            records.append([slot, first, 16 * (end - first), fold, n])
    programs = config.programs_per_sm
    share = max(config.min_share, -(-sum(sizes) // programs))
    if config.max_parts is not None:
        parts = -(-max(sizes) // config.max_parts)
        # All programs are on one multiprocessor.
        share = max(share, min(parts, sum(sizes)))
    if config.row_slack is not None:
        for wider in range(share, share + config.row_slack + 1):
            whole = [-(-size // wider) for size in sizes]
            if sum(whole) <= programs:
                share, sizes = wider, [count * wider for count in whole]
                break
    owners = [row for row, size in enumerate(sizes) for _ in range(size)]
    starts = [min(p * share, len(owners) - 1) for p in range(programs)]
    cu_tiles = [sum(sizes[:row]) for row in range(len(sizes) + 1)]
    return HandPlan(cu_tiles, [owners[tile] for tile in starts], share, records)


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize(
    ("programs", "min_share", "chunk", "row_slack", "max_parts"),
    [
        (1, 1, 64, None, None),
        (7, 1, 8, None, None),
        (50, 2, 16, None, None),
        (512, 1, 4, None, None),
        pytest.param(7, 1, 64, 9, None, id="more-rows-than-programs"),
        pytest.param(50, 1, 64, 0, None, id="no-slack"),
        pytest.param(50, 1, 64, 4, None, id="aligned"),
        pytest.param(50, 1, 16, 4, None, id="more-rows-than-a-chunk"),
        pytest.param(512, 1, 64, 1, None, id="every-tile-a-program"),
        pytest.param(512, 1, 4, None, 3, id="three-parts"),
        pytest.param(512, 1, 64, 1, 3, id="three-parts-aligned"),
    ],
)
def test_plan(
    programs: int,
    min_share: int,
    chunk: int,
    row_slack: int | None,
    max_parts: int | None,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Skewed rows, rows of one token, padding; prefix sums in several chunks."""
    monkeypatch.setattr(decode_plan, "_PLAN_CHUNK", chunk)
    seq_lens, folds = [1, 60, 1, 2000, 333, 16, 17], [0, 0, 0, 1600, 320, 0, 16]
    # Rings of three pages, 128 rows each.
    shape = {"layers": 2, "group": 1, "head_dim": 16, "window": 300}
    case = make_case(seq_lens, folds, **shape, skew=4.0, device=device)
    _, slots, lengths = make_batch(case, padding=2)
    config = DecodeConfig(
        programs_per_sm=programs,
        min_share=min_share,
        row_slack=row_slack,
        max_parts=max_parts,
    )
    workspace = make_workspace(case, len(slots) + 3, config)
    args = (case.tables, slots, lengths)
    how = {"num_kv_heads": 2, "config": config, "query_ring": case.query_ring}
    plan_decode_triton(*args, workspace, **how)
    plan = plan_decode_ref(*args, **how, programs=programs, rows_per_block=64)
    assert torch.equal(workspace.ring_pages[: len(slots)], plan.ring_pages)
    assert plan.ring_pages.tolist() == [
        *(
            int(case.query_ring.pages[slot, (n - 1) % 300 // 128])
            for slot, n in zip(case.slots, seq_lens, strict=True)
        ),
        *(0, 0),
    ]
    rows = 2 * len(slots)
    assert torch.equal(workspace.shares, plan.shares)
    records = workspace.records
    assert torch.equal(records[:, programs:][:, :rows, :5], plan.row_records)
    assert torch.equal(records[:, :programs], plan.program_records)
    assert torch.equal(workspace.cu_tiles[:, : rows + 1], plan.cu_tiles)
    if rows > chunk:
        config = config._replace(row_slack=None)
    for layer in range(2):
        by_hand = plan_by_hand(case, layer, slots.tolist(), config)
        assert plan.cu_tiles[layer].tolist() == by_hand.cu_tiles
        assert plan.shares[layer] == by_hand.share
        assert plan.row_records[layer].tolist() == by_hand.records
        assert plan.program_records[layer].tolist() == [
            [*by_hand.records[row], *by_hand.cu_tiles[row : row + 2], row]
            for row in by_hand.first_rows
        ]


@pytest.mark.interpreter
def test_idle_multiprocessors_limit_max_parts(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of 40 tiles and one of 8 on 12 multiprocessors: no 2 parts of 20 tiles."""
    monkeypatch.setattr(decode_schedule, "_num_sms", lambda device: 12)
    case = make_case(
        [640, 128], layers=1, kv_heads=1, group=1, head_dim=16, device=device
    )
    _, slots, lengths = make_batch(case)
    for max_parts, share in ((None, 2), (20, 2), (13, 4), (2, 4)):
        config = DecodeConfig(16, max_parts=max_parts, row_slack=None)
        workspace = make_workspace(case, 2, config)
        args, how = (case.tables, slots, lengths), {"num_kv_heads": 1, "config": config}
        workspace.ring_pages.fill_(7)
        plan_decode_triton(*args, workspace, **how)
        plan = plan_decode_ref(*args, **how, programs=36)
        assert workspace.shares.tolist() == plan.shares.tolist() == [share]
        # No ring is given.
        assert workspace.ring_pages.tolist() == plan.ring_pages.tolist() == [0, 0]


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize("programs", [5, 16])
def test_one_plan_serves_all_layers(programs: int, device: str) -> None:
    case = make_case(
        [200, 70, 30], [192, 48, 0], layers=3, group=2, head_dim=64, device=device
    )
    config = DecodeConfig(16, programs_per_sm=programs)
    q, slots, seq_lens = make_batch(case)
    workspace = make_workspace(case, 3, config)
    batch = (case.tables, slots, seq_lens)
    plan_decode_triton(*batch, workspace, num_kv_heads=2, config=config)
    args = (case.arena, case.tables, q, slots, seq_lens)
    for layer in (2, 0, 1):
        how = {"layer": layer, "sm_scale": 0.125}
        run = {**how, "config": config}
        out = decode_attention_triton(*args, **run, workspace=workspace)
        assert torch.equal(out, decode_attention_triton(*args, **run))
        torch.testing.assert_close(out, decode_attention_ref(*args, **how))


def test_plan_of_the_reference_path_does_nothing() -> None:
    case = make_case([20], layers=1, kv_heads=1, group=1, head_dim=16)
    _, slots, seq_lens = make_batch(case)
    workspace = make_workspace(case, 1)
    before = workspace.cu_tiles.clone()
    plan_decode(case.tables, slots, seq_lens, workspace, num_kv_heads=1)
    assert torch.equal(workspace.cu_tiles, before)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_batch": 1}, "make it with max_batch >= 9"),
        ({"num_kv_heads": 1}, "num_kv_heads=2"),
        ({"num_layers": 1}, "num_layers=3"),
        ({"config": DecodeConfig(programs_per_sm=1)}, "the same config"),
        ({"num_qo_heads": 8}, "not \\(2, 64\\)"),
        ({"head_dim": 128}, "not \\(2, 64\\)"),
    ],
)
def test_unfit_workspace_is_refused(changed: dict, message: str, device: str) -> None:
    case = make_case([90, *[17] * 8], layers=3, group=2, head_dim=64, device=device)
    q, slots, seq_lens = make_batch(case)
    shape = {
        "max_batch": 9,
        "num_qo_heads": 4,
        "head_dim": 64,
        "num_kv_heads": 2,
        "num_layers": 3,
    }
    workspace = make_decode_workspace(**{**shape, **changed}, device=device)
    args = (case.arena, case.tables, q, slots, seq_lens)
    how = {"layer": 0, "sm_scale": 0.125, "workspace": workspace}
    with pytest.raises(ValueError, match=message):
        decode_attention_triton(*args, **how)


def test_workspace_bytes_can_be_counted() -> None:
    workspace = make_decode_workspace(
        256, 32, 128, "meta", num_kv_heads=8, num_layers=32
    )
    assert 0 < sum(part.nbytes for part in workspace) < 2**24
    more = make_decode_workspace(
        256, 32, 128, "meta", num_kv_heads=8, config=DecodeConfig(programs_per_sm=16)
    )
    assert more.partial_out.nbytes > workspace.partial_out.nbytes
