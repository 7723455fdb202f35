"""The logs and the table of `bench.serving`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.serving import log, report
from bench.serving.loads import OURS, STOCK
from tests.unit.bench.serve_fixtures import record

DECODE = (
    "[2026-11-22 19:00:00] Decode batch, #running-req: {}, #token: 700, token usage: "
    "0.51, cuda graph: True, gen throughput (token/s): {:.2f}, #queue-req: 3"
)
PREFILL = (
    "[2026-11-22 19:00:00] Prefill batch, #new-seq: 1, #new-token: 512, #cached-token: "
    "0, token usage: 0.02, #running-req: 8, #queue-req: 0, "
)


def checks(*systems: str, good: bool = True) -> list[Any]:
    return [{"engine": f"{system}#1", "ok": good} for system in systems]


def test_log_gives_the_step_of_the_largest_batch() -> None:
    # Lines after a prefill carry its time: 8 at 100 tokens/s are no step of 80 ms.
    lines = [DECODE.format(2, 500), PREFILL, DECODE.format(8, 100)]
    lines += [DECODE.format(8, rate) for rate in (1000, 800, 1600)]
    lines += ["KV cache pool is full. Retract requests. #retracted_reqs: 1"]
    found = log.parse_log("\n".join(lines))
    assert found["largest_batch"] == 8
    assert found["decode_step_ms"] == pytest.approx(8.0)
    assert (found["decode_step_lines"], found["decode_step_clean"]) == (3, True)
    assert found["retractions"] == 1


def test_log_with_prefills_everywhere_uses_all_lines() -> None:
    lines = [PREFILL, DECODE.format(8, 800)] * 3
    found = log.parse_log("\n".join(lines))
    assert found["decode_step_ms"] == pytest.approx(10.0)
    assert not found["decode_step_clean"]
    assert log.parse_log("")["decode_step_ms"] is None


def test_prompts_of_each_replica_are_counted() -> None:
    line = "[2026-11-30 07:00:00 DP{} TP0] Prefill batch, #new-seq: {}, #new-token: 9"
    text = "\n".join(line.format(*pair) for pair in ((0, 2), (1, 1), (0, 3)))
    assert log.parse_log(text)["replicas"] == {"0": 5, "1": 1}
    assert "replicas" not in log.parse_log("[2026] Prefill batch, #new-seq: 2")


def test_start_of_the_log() -> None:
    text = "x\nKV-Compress metadata: 2.4 GiB = 3 % of 80 GiB\nmax_total_num_tokens=99, "
    assert log.parse_start(text) == {
        "metadata": "2.4 GiB = 3 % of 80 GiB",
        "pool_tokens": 99,
    }


def test_table_scales_stock_and_judges_targets() -> None:
    load = "6000x500@20480"
    records = [
        record(load, STOCK, 0, 40.0),
        record(load, OURS, 8, 40.0),
        record(load, OURS, 64, 32.0),
        record("6000x1@all", STOCK, 0, 20.0),
        *checks(STOCK, OURS),
    ]
    rows = {(r["load"], r["rate"]): r for r in report.summarize(records)}
    row = rows[load, 8]
    assert row["stock_seconds"] == pytest.approx(160), "stock ran 32 of 128 prompts"
    assert row["ratio_to_stock"] == pytest.approx(4.0)
    assert row["prefill_bound"] == pytest.approx(160 / 20 * 6001 / 6000)
    assert report.verdict(row) == ">= 3.5 met"
    assert report.verdict(rows[load, 64]) == ">= 5.5 missed"
    text = report.format_table(list(rows.values()))
    assert "4.000" in text and "missed" in text and "not run" not in text


def test_table_takes_medians_and_shows_the_spread() -> None:
    load = "32000x1500@all"
    memory = {"memory_idle_mib": 1000, "memory_peak_mib": 1200, "ready_s": 40.0}
    records = [record(load, STOCK, 0, s) for s in (40, 44, 36)]
    records += [record(load, OURS, 8, s, **memory) for s in (20, 22, 21)]
    (row,) = (r for r in report.summarize(records) if r["system"] == OURS)
    assert row["seconds"] == 21
    assert row["ratio_to_stock"] == pytest.approx(40 / 21)
    assert report.verdict(row) == ">= 1.5 met, step >= 2 met"
    text = report.format_table([row])
    assert "21.0±5%" in text and "idle check not run" in text
    assert "memory, kvc: idle 1000 MiB, peak 1200 MiB" in text


def test_red_check_prints_no_figure() -> None:
    load = "6000x500@20480"
    records = [record(load, STOCK, 0, 40.0), record(load, OURS, 8, 12.3)]
    text = report.format_table(
        report.summarize([*records, *checks(STOCK), *checks(OURS, good=False)])
    )
    assert "FAILED" in text and "12.3" not in text
    broken = [records[0], {**records[1], "error": "nothing was compressed"}]
    text = report.format_table(report.summarize([*broken, *checks(STOCK, OURS)]))
    assert "FAILED: nothing was compressed" in text and "12.3" not in text


def test_table_says_that_stock_refuses() -> None:
    refused = {**record("60000@20480", STOCK, 0, 1.0), "refused": "exceeds the maximum"}
    ours = record("60000@20480", OURS, 8, 5.0)
    text = report.format_table(report.summarize([refused, ours]))
    assert "refused: exceeds" in text and "nothing to compare with" in text


def test_newest_commit_counts_but_stock_outlives_it() -> None:
    load = "6000x256@all"
    old = [record(load, STOCK, 0, 20.0), record(load, OURS, 1, 30.0)]
    new = [record(load, OURS, 1, 20.0, commit="def")]
    (row,) = (r for r in report.summarize(old + new) if r["system"] == OURS)
    assert row["ratio_to_stock"] == pytest.approx(1.0)
    new.append(record(load, STOCK, 0, 22.0, commit="def"))
    (row,) = (r for r in report.summarize(old + new) if r["system"] == OURS)
    assert row["ratio_to_stock"] == pytest.approx(1.1)


def test_records_survive_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "serve.jsonl"
    path.write_text('{"system": "old format"}\n{"engine": "a", "ok": true}\n{"engine')
    assert report.read_records(path) == [{"engine": "a", "ok": True}]
    assert report.read_records(tmp_path / "none") == []
    assert report.summarize([]) == []
