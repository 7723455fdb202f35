"""The plots: drawn from records, skipped without them, of the commit asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.common import plotting
from bench.kernels import plot as kernel_plot
from bench.serving import plot, plot_data
from bench.serving.loads import OURS, STOCK

LOAD, OTHER = "6000x500@20480", "2000x500@20480"
PNG = b"\x89PNG\r\n\x1a\n"
SMALLEST_PLOT = 10_000


def run(system: str, rate: float, speed: float, **more: Any) -> dict[str, Any]:
    """A record of `bench.serving`."""
    return {
        "engine": f"{system}#1",
        "commit": "aaaaaaaaaaaa",
        "gpu": "H200",
        "versions": {"sglang": "0.5.17", "torch": "2.11.0"},
        "load": LOAD,
        "system": system,
        "rate": rate,
        "prompts": 8,
        "seconds": 1000 / speed,
        "input_tokens": 900,
        "tokens_per_s": speed,
        "requests_per_s": 1.0,
        "largest_batch": 3 * max(rate, 1),
        "decode_step_ms": 5.0,
        "retractions": 0,
        **more,
    }


def kernel(name: str, case: str, layout: str, speed: float) -> dict[str, Any]:
    """A record of `bench.kernels`."""
    return {
        "commit": "aaaaaaaaaaaa",
        "gpu": "H200",
        "section": "decode",
        "kernel": name,
        "case": case,
        "layout": layout,
        "us": 100.0,
        "tb_s": speed,
        "check": "ok",
    }


SERVED = [
    run(STOCK, 0, 5000),
    run(STOCK, 0, 6000, load=OTHER),
    *(run(OURS, rate, 5000 * rate**0.4) for rate in (64, 8, 1)),
    run(OURS, 8, 15000, load=OTHER),
    run(OURS, 8, 99, load="first-requests"),
    run(OURS, 32, 1.0, error="died"),
    {"engine": f"{STOCK}#1", "ok": True},
    {"engine": f"{OURS}#1", "ok": True},
]
TIMED = [
    {**kernel("copy", "2 GiB", "", 4.25), "section": "copy"},
    *(
        kernel(name, case, layout, 3.5 + 0.1 * i)
        for case in ("32x8192 equal", "32x8192 skew")
        for i, (name, layout) in enumerate(kernel_plot.BARS)
        if case.endswith("equal") or layout == "packed"
    ),
]


def write(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / name).write_text("".join(lines))


def test_all_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    write(tmp_path, "serve.jsonl", SERVED)
    write(tmp_path, "kernels.jsonl", TIMED)
    written = plot.draw(tmp_path, tmp_path / "plots")
    written += kernel_plot.draw(tmp_path, tmp_path / "plots")
    assert [path.name for path in written] == [
        "throughput.png",
        "largest_batch.png",
        "decode_bandwidth.png",
    ]
    for path in written:
        content = path.read_bytes()
        assert content.startswith(PNG)
        assert len(content) > SMALLEST_PLOT


def test_missing_figures_skip_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    write(tmp_path, "kernels.jsonl", [TIMED[0]])
    assert plot.draw(tmp_path, tmp_path / "plots") == []
    assert kernel_plot.draw(tmp_path, tmp_path / "plots") == []
    said = capsys.readouterr().out
    assert said.count("skipped") == 3
    assert "kernels.jsonl" in said


def test_matplotlib_is_named_when_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        plotting.load_pyplot()


def test_lines_hold_what_has_a_figure() -> None:
    rows = plot_data.serve_rows(SERVED)
    lines = plot_data.rate_lines(rows, "ratio_to_stock")
    assert {load: [rate for rate, _ in points] for load, points in lines.items()} == {
        LOAD: [1, 8, 64],
        OTHER: [8],
    }
    assert dict(lines[OTHER])[8] == pytest.approx(2.5)
    assert plot_data.stock_levels(rows, "tokens_per_s") == {LOAD: 5000, OTHER: 6000}


def test_the_newest_or_the_given_commit_counts() -> None:
    newer = [run(OURS, 8, 20000, commit="bbbbbbbbbbbb")]
    records = [*SERVED, *newer]
    now = plot_data.rate_lines(plot_data.serve_rows(records), "tokens_per_s")
    assert now == {LOAD: [(8, 20000)]}
    # Stock of another commit still is what ours is compared with.
    ratio = plot_data.rate_lines(plot_data.serve_rows(records), "ratio_to_stock")
    assert ratio == {LOAD: [(8, 4.0)]}
    old = plot_data.rate_lines(plot_data.serve_rows(records, "aaaaaaa"), "tokens_per_s")
    assert [rate for rate, _ in old[LOAD]] == [1, 8, 64]
    assert plot_data.serve_rows(records, "ccccccc") == []
    timed = [TIMED[1], {**TIMED[2], "commit": "aaaaaaaaaaaa+dirty"}]
    assert plotting.of_commit(timed) == timed[1:]
    assert plotting.of_commit(timed, "aaaaaaa") == timed[:1]


def test_the_last_measurement_of_a_bar_counts() -> None:
    again = {**TIMED[1], "tb_s": 1.0}
    bars = kernel_plot.decode_bars([*TIMED, again])
    assert bars["32x8192 equal"]["decode_attention", "packed"] == 1.0
    assert set(bars["32x8192 skew"]) == {
        ("decode_attention", "packed"),
        ("fa3_folded", "packed"),
    }
