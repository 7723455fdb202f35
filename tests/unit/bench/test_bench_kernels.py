"""The kernel bench: its tables are consistent, and every section runs on the CPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from bench.kernels import append, decode, decode_tune, passes, prefill, reports
from bench.kernels.__main__ import arena_pages, parse_shape
from bench.kernels.batches import Batch, Shape, fold_by_head, head_blocks, make_arena
from bench.kernels.checks import POOL, POWER, SINKS, WINDOW, check_pass, small_case
from bench.kernels.decode_case import ARENA_PAGES, ROWS, Decode, Row, row_batch
from bench.kernels.pass_cases import RATE, PassCase, pass_batch
from bench.kernels.pass_stages import Stages
from bench.kernels.timing import (
    CheckError,
    Report,
    Timing,
    require_close,
    require_equal,
)
from sglang_kvc.kernels import decode_attention
from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.kernels.ops import OPS
from sglang_kvc.kernels.pass_plan import build_plan
from sglang_kvc.kernels.testing import random_ring
from tests.unit.bench.kernels_fixtures import PAGES, SMALL, OnceClock, fake_fa3


def owned_rows(batch: Batch, shape: Shape) -> list[torch.Tensor]:
    """Arena rows of each request."""
    lens = batch.seq_lens.tolist()
    return [
        rows.rows[rows.valid]
        for rows in (
            head_rows_ref(batch.tables, slot, fold, n)
            for slot, fold, n in zip(
                batch.slots.tolist(), batch.folds, lens, strict=True
            )
        )
    ]


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("mean", [1, 7, 500])
def test_head_blocks_fill_pages_and_respect_the_cap(mean: int, skew: bool) -> None:
    blocks = head_blocks(6, mean, 12, skew)
    assert blocks.min() >= 0
    assert blocks.max() <= 8 * mean
    assert (blocks.sum(1) == mean * 12).all()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("skew", [True, False])
def test_every_kv_has_a_cell_of_its_own(packed: bool, skew: bool) -> None:
    batch = row_batch(Row(3, 256, skew), SMALL, PAGES, "cpu", packed)
    rows = torch.cat(owned_rows(batch, SMALL))
    assert len(rows) == batch.resident.sum()
    assert len(rows.unique()) == len(rows)
    pages = rows // (PAGE_SIZE * SMALL.heads_per_page)
    assert pages.min() > 0
    assert not torch.isin(batch.free_pages, pages).any()
    layers = [batch.layer_kvs(i, SMALL.kv_heads) for i in range(SMALL.layers)]
    assert sum(layers) == len(rows)


def test_too_small_an_arena_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        row_batch(Row(3, 256, False), SMALL, 20, "cpu")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_decode_rows_fit_the_arena(row: Row) -> None:
    shape = Shape()
    for packed in (True,) if row.skew else (True, False):
        batch = row_batch(row, shape, ARENA_PAGES, "cpu", packed)
        mean = float(batch.resident.float().mean())
        assert mean == pytest.approx(row.mean, rel=0.05)
        assert batch.tables.req_to_token.shape[1] % 16 == 0


@pytest.mark.parametrize("case", passes.CASES, ids=lambda case: case.name)
def test_pass_cases_fit_the_arena(case: PassCase) -> None:
    shape, pages = Shape(), passes.ARENA_PAGES
    batch, requests = pass_batch(case, shape, pages, "cpu")
    plan = build_plan(requests, shape.heads_per_page, "cpu")
    kept = plan.num_kept // (PAGE_SIZE * shape.heads_per_page)
    assert kept == case.requests * case.keep_pages
    assert kept <= len(batch.free_pages)
    assert plan.num_entries == (case.packed + case.tail) * case.requests * 256
    # The plan's bound, and room for the survivors in the page table.
    blocks = batch.tables.block_offsets.diff(dim=1).max()
    assert blocks + -(-case.tail // PAGE_SIZE) <= plan.max_blocks
    assert batch.tables.packed_pages.shape[1] >= case.keep_pages
    # Every layer holds what a pass takes from it.
    by_layer = batch.tables.block_offsets[batch.slots, :: shape.kv_heads].diff(dim=1)
    held = by_layer + case.tail // PAGE_SIZE * shape.kv_heads
    frees = (plan.evict_most if not case.packed else plan.evict_blocks) / shape.layers
    assert (held >= frees[:, None]).all()


def test_kernels_are_checked_with_many_layers() -> None:
    """Layers that packed very different amounts broke the check, not the kernel."""
    assert check_pass("cpu", Shape(16, 2, 4, 16)) == {}


def test_what_is_checked_is_what_is_timed() -> None:
    """Or Triton compiles other kernels for the check than for the numbers."""
    case = small_case("cpu", SMALL)
    calls = [call for op in OPS for call in op.make_calls(case)]
    rules = [call.settings["rule"] for call in calls if "rule" in call.settings]
    assert {rule.sinks for rule in rules} == {SINKS}
    spread = [call.settings["pooling"] for call in calls if "pooling" in call.settings]
    assert spread == [POOL]
    powers = {call.settings["power"] for call in calls if "power" in call.settings}
    assert powers == {POWER}


def test_folded_tables_name_the_same_keys() -> None:
    """What FA3 is given holds exactly the entries of `decode_attention`."""
    batch = row_batch(Row(3, 256, True), SMALL, PAGES, "cpu")
    blocks, head_lens = fold_by_head(batch, SMALL)
    table, lengths = blocks[1].flatten(0, 1), head_lens[1].flatten()
    rows = table.long()[..., None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
    lens = batch.seq_lens.tolist()
    row = 0
    for slot, fold, n in zip(batch.slots.tolist(), batch.folds, lens, strict=True):
        want = head_rows_ref(batch.tables, slot, fold, n, first_head=2, num_heads=2)
        for h in range(2):
            got = rows[row].flatten()[: lengths[row]]
            assert torch.equal(got, want.rows[h][want.valid[h]])
            row += 1


def test_every_section_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole bench on the references: every number, no error, one record each."""
    torch.manual_seed(0)
    monkeypatch.setattr(decode, "ROWS", (Row(3, 256, True), Row(2, 128, False)))
    monkeypatch.setattr(passes, "CASES", (PassCase(1, 0, 512), PassCase(2, 64, 80)))
    monkeypatch.setattr(passes, "SLOTS", 3)
    monkeypatch.setattr(reports, "CASES", (PassCase(1, 0, 512), PassCase(2, 64, 80)))
    monkeypatch.setattr(append, "DECODE_BATCHES", (1, 4))
    monkeypatch.setattr(append, "PREFILL_TOKENS", 64)
    monkeypatch.setattr(prefill, "NEW_TOKENS", 64)
    monkeypatch.setattr(prefill, "PREFIXES", (0, 64))
    monkeypatch.setattr(prefill, "PACKED", ((2, 40, 64), (1, 64, 0)))
    arena = make_arena(PAGES, SMALL, "cpu")
    out = tmp_path / "kernels.jsonl"
    report = Report(out, {"commit": "abc"})
    base = (arena, SMALL, OnceClock(), report, False)
    decode.bench_decode(*base, fake_fa3)
    append.bench_append(*base)
    passes.bench_pass(*base)
    reports.bench_report(*base)
    prefill.bench_prefill(*base, fake_fa3)
    report.print_table()
    assert report.errors == []
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(r["check"] == "ok" and r["commit"] == "abc" for r in records)
    kernels = [(r["section"], r["kernel"]) for r in records]
    assert kernels.count(("decode", "decode_attention")) == 3
    assert kernels.count(("decode", "plan_decode")) == 3
    assert kernels.count(("decode", "fa3_folded")) == 2
    assert kernels.count(("decode", "decode_step")) == 3
    assert kernels.count(("decode", "fa3_folded_step")) == 2
    assert kernels.count(("decode", "fa3_stock_page64")) == 1
    assert kernels.count(("append", "append_kv")) == 3
    for stage in ("observe", "pool", "distinct", "select", "pack", "commit"):
        assert kernels.count(("pass", stage)) == 2
    assert kernels.count(("pass", "whole pass")) == 2
    for name in ("pass, off", "pass, on", "report_tokens"):
        assert kernels.count(("report", name)) == 2
    assert kernels.count(("prefill", "fa3_arena")) == 2
    assert kernels.count(("prefill", "packed_prefill")) == 2


def test_a_pass_can_be_repeated() -> None:
    """`restore` undoes a pass: the second one chooses the same survivors."""
    arena = make_arena(PAGES, SMALL, "cpu")
    ring = random_ring(3, WINDOW, 4, arena)
    batch, requests = pass_batch(PassCase(2, 64, 80), SMALL, PAGES, "cpu")
    before = [table.clone() for table in batch.tables]
    run = Stages(arena, ring, 4, batch, requests)
    run.whole()
    after = [table.clone() for table in batch.tables]
    assert int(batch.tables.fold_lens.max()) == 64 * RATE + 80
    run.restore()
    assert all(map(torch.equal, batch.tables, before))
    run.whole_planned()
    assert all(map(torch.equal, batch.tables, after))


def test_a_wrong_kernel_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = make_arena(PAGES, SMALL, "cpu")
    monkeypatch.setattr(decode, "ROWS", (Row(3, 256, True),))
    report = Report(None, {})

    def broken(q: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return torch.zeros_like(q)

    monkeypatch.setattr(decode_attention, "decode_attention", broken)
    decode.bench_decode(arena, SMALL, OnceClock(), report, False, None)
    assert report.rows == []
    assert "relative error" in report.errors[0]


def test_one_lost_block_is_seen() -> None:
    """The tolerance of the decode check is tight enough for a real mistake."""
    arena = make_arena(PAGES, SMALL, "cpu")
    batch = row_batch(Row(1, 1024, False), SMALL, PAGES, "cpu")
    case = Decode(arena, SMALL, batch)
    lens = batch.seq_lens - PAGE_SIZE
    arguments = {**case.arguments(0), "seq_lens": lens}
    out = decode_attention.decode_attention_ref(**arguments)
    with pytest.raises(CheckError):
        case.check(lambda layer: out)


def test_ranking_needs_every_row() -> None:
    times = {
        "a": {"x": Timing(10.0, "graph"), "y": Timing(40.0, "graph")},
        "b": {"x": Timing(20.0, "graph"), "y": Timing(20.0, "graph")},
        "c": {"x": Timing(1.0, "graph")},
    }
    ranked = decode_tune.ranking(times)
    assert [config for config, _ in ranked] == ["b", "a"]
    assert decode_tune.ranking({}) == []


def test_requirements() -> None:
    nan = torch.tensor([[float("nan"), 1.0]])
    require_equal("equal", nan, nan.clone())
    with pytest.raises(CheckError, match="differs"):
        require_equal("equal", nan, torch.tensor([[2.0, 1.0]]))
    with pytest.raises(CheckError, match="not finite"):
        require_close("close", nan, nan, 1.0)
    one = torch.ones(2, 4)
    assert require_close("close", one * 1.001, one, 0.01) < 0.002


def test_arena_sizes() -> None:
    """34 GiB of K and V for decode, less when it is left out."""
    assert arena_pages(["append", "prefill"]) < arena_pages(["pass"])
    assert arena_pages(["pass"]) < arena_pages(["decode", "pass"])
    shape = Shape()
    page = 4 * PAGE_SIZE * shape.heads_per_page * shape.head_dim
    assert arena_pages(["decode"]) * page == 34 << 30


def test_tuning_runs_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sweep itself, with the reference in place of the kernel."""
    ran = set()

    def attend(config: object, workspace: object, **arguments: object) -> torch.Tensor:
        ran.add(config)
        return decode_attention.decode_attention_ref(**arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(decode_attention, "decode_attention_triton", attend)
    monkeypatch.setattr(decode_attention, "plan_decode_triton", lambda *a, **k: None)
    monkeypatch.setattr(decode_tune, "ROWS", (Row(1, 64, True), Row(2, 64, False)))
    report = Report(None, {})
    base = (make_arena(PAGES, SMALL, "cpu"), SMALL, OnceClock(), report, False)
    decode_tune.tune_decode(*base, 100.0)
    assert report.errors == []
    assert 30 <= len(ran) <= 40
    assert len(report.rows) == 2 * decode_tune.SHOWN
    decode_tune.tune_decode(*base, -1.0)
    assert "out of time" in capsys.readouterr().out


def test_a_shape_is_four_numbers() -> None:
    assert parse_shape("32x4x64x256") == Shape(32, 4, 64, 256)
    for wrong in ("32x4x64", "32x4x64x256x1x1", "a", "32x3x64x128"):
        with pytest.raises(argparse.ArgumentTypeError, match=wrong):
            parse_shape(wrong)
