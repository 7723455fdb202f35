"""`bench.kernels --rows`: which rows and configurations, and the sweep over them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.kernels import decode, decode_tune
from bench.kernels.__main__ import arena_pages
from bench.kernels.batches import Shape, make_arena
from bench.kernels.decode_around import VALUES, configs_around, parse_fields
from bench.kernels.decode_case import (
    LAYOUTS,
    ROWS,
    TAIL,
    Decode,
    Row,
    layouts,
    parse_rows,
    row_batch,
    row_pages,
)
from bench.kernels.decode_steps import new_tokens
from bench.kernels.timing import Report
from sglang_kvc.kernels import decode_attention
from sglang_kvc.kernels.decode_schedule import default_config
from tests.unit.bench.kernels_fixtures import PAGES, SMALL, OnceClock, fake_fa3


def test_rows_are_requests_and_kvs() -> None:
    assert parse_rows("3x6250,256x512s") == (Row(3, 6250, False), Row(256, 512, True))
    for wrong in ("", "3", "3x", "3x6250t", "3x6250x1", "3x6250,", "0x100", "257x99"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_rows(wrong)
    with pytest.raises(argparse.ArgumentTypeError, match="KVs or more"):
        parse_rows("1x55")


@pytest.mark.parametrize("text", ["3x6250", "5x56", "1x57", "2x63s", "7x1000s"])
def test_an_arena_is_as_large_as_its_rows_need(text: str) -> None:
    (row,) = parse_rows(text)
    pages = arena_pages(["decode"], [row, Row(1, TAIL + 16, False)])
    assert pages == row_pages(row)
    used = []
    for layout in layouts(row):
        batch = row_batch(row, SMALL, pages, "cpu", layout == "packed")
        used.append(pages - 1 - len(batch.free_pages))
    assert max(used) >= pages - 1 - (row.requests if row.skew else 0)


def test_skewed_rows_are_packed() -> None:
    assert layouts(ROWS[0]) == LAYOUTS
    assert layouts(ROWS[0], "tail") == ("tail",)
    assert layouts(ROWS[1]) == ("packed",)
    assert layouts(ROWS[1], "tail") == ()


@pytest.mark.parametrize("byte_cells", [False, True])
@pytest.mark.parametrize("shape", [Shape(), Shape(qo_heads=64), Shape(head_dim=64)])
def test_configurations_around_the_default(shape: Shape, byte_cells: bool) -> None:
    group = shape.qo_heads // shape.kv_heads
    default = default_config(shape.head_dim, group, byte_cells=byte_cells)
    configs = configs_around(shape, byte_cells=byte_cells)
    assert configs[0] == default
    assert len(configs) == len(set(configs))
    assert 20 <= len(configs) <= 30
    for name, values in VALUES.items():
        assert {default._replace(**{name: value}) for value in values} <= set(configs)


def test_configurations_around_another_one() -> None:
    fields = parse_fields("num_stages=4,max_parts=None")
    configs = configs_around(Shape(), fields)
    assert configs[0] == default_config(128)._replace(num_stages=4, max_parts=None)
    assert all(config.num_stages in (3, 4, 5, 7) for config in configs)
    assert configs.count(configs[0]) == 1


def test_fields_of_a_configuration() -> None:
    assert parse_fields("") == {}
    assert parse_fields("tile=32") == {"tile": 32}
    for wrong in ("tiles=32", "tile", "tile=", "tile=a", "tile=-1", "tile=none=3"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_fields(wrong)


def kernel_of(ran: set[object]) -> Any:
    """The reference in place of the kernel; notes configurations."""

    def attend(config: object, workspace: object, **arguments: Any) -> torch.Tensor:
        ran.add(config)
        return decode_attention.decode_attention_ref(**arguments)

    return attend


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_tuned(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows share pages: a step of one stores tokens where the other has KVs."""
    ran: set[object] = set()
    monkeypatch.setattr(decode_attention, "decode_attention_triton", kernel_of(ran))
    monkeypatch.setattr(decode_attention, "plan_decode_triton", lambda *a, **k: None)
    rows = parse_rows("2x64,3x56")
    out = tmp_path / "tune.jsonl"
    report = Report(out, {})
    arena = make_arena(arena_pages(["decode"], rows), SMALL, "cpu")
    base = (arena, SMALL, OnceClock(), report)
    decode_tune.tune_rows(*base, rows, 100.0, fake_fa3, packed=packed)
    assert report.errors == []
    assert ran == set(configs_around(SMALL))
    records = [json.loads(line) for line in out.read_text().splitlines()]
    kernels = [(r["section"], r["kernel"], r["case"]) for r in records]
    for row in rows:
        assert kernels.count(("decode", "fa3_stock_page1", row.name)) == 1
        for kernel in ("decode_attention", "decode_step"):
            assert kernels.count(("tune", kernel, row.name)) == decode_tune.SHOWN


def test_stored_tokens_change_what_is_wanted() -> None:
    """Without `Decode.store` attention would be held to tokens that are gone."""
    arena = make_arena(PAGES, SMALL, "cpu")
    case = Decode(arena, SMALL, row_batch(Row(2, 64, False), SMALL, PAGES, "cpu"))
    before = case.want[0].clone()
    new = new_tokens(case)
    case.store(new)
    assert not torch.equal(case.want[0], before)
    case.check(
        lambda layer: decode_attention.decode_attention_ref(
            **case.arguments(layer), new_tokens=new
        )
    )
    case.check(
        lambda layer: decode_attention.decode_attention_ref(**case.arguments(layer))
    )


def test_given_rows_are_timed_in_one_layout() -> None:
    report = Report(None, {})
    base = (make_arena(PAGES, SMALL, "cpu"), SMALL, OnceClock(), report, False, None)
    decode.bench_decode(*base, rows=parse_rows("2x64,1x72s"), only="packed")
    assert report.errors == []
    timed = [row for row in report.rows if row["kernel"] == "decode_attention"]
    assert [row["case"] for row in timed] == ["2x64 equal", "1x72 skew"]
    assert {row["layout"] for row in timed} == {"packed"}
    decode.bench_decode(*base, rows=parse_rows("2x64,1x72s"), only="tail")
    assert [row["layout"] for row in report.rows[-2:]] == ["tail", "tail"]
