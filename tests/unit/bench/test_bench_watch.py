"""`bench.serving.watch`: what it reads of /metrics, and the picture of it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.serving import watch
from sglang_kvc.config import series

TEXT = f"""
# TYPE {series.LOGICAL.name} gauge
{series.LOGICAL.name}{{dp_rank="0"}} 3000
{series.LOGICAL.name}{{dp_rank="1"}} 1000
# TYPE {series.RESIDENT.name} gauge
{series.RESIDENT.name} 1000
# TYPE {watch.RUNNING} gauge
{watch.RUNNING} 2
# TYPE {watch.QUEUED} gauge
{watch.QUEUED} 1
# TYPE {series.PASSES.name.removesuffix("_total")} counter
{series.PASSES.name}{{kind="prompt"}} %(passes)d
{series.PASSES.name}{{kind="decode"}} 5
# TYPE {series.DEFERRED.name.removesuffix("_total")} counter
{series.DEFERRED.name} 0
# TYPE {series.SECONDS.name.removesuffix("_total")} counter
{series.SECONDS.name} 1.5
"""


def test_processes_and_labels_add_up() -> None:
    found = watch.read_metrics(TEXT % {"passes": 4})
    assert found["logical"] == 4000
    assert found["passes"] == 9
    assert watch.value_of(found, "ratio") == 4


def test_a_server_without_them_is_told() -> None:
    with pytest.raises(SystemExit, match="kv_compress_resident_tokens.*--enable-metr"):
        watch.read_metrics("\n".join(TEXT.splitlines()[:4]))


def test_counters_begin_at_zero_and_the_last_look_is_behind_the_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, looks = threading.Event(), iter((10, 12, 15))

    def get(url: str, timeout: float) -> SimpleNamespace:
        passes = next(looks)
        if passes == 12:
            ended.set()
        text = TEXT % {"passes": passes}
        return SimpleNamespace(text=text, raise_for_status=lambda: None)

    monkeypatch.setattr(watch.requests, "get", get)
    samples = watch.watch("http://server", 0.01, ended)
    assert [sample["passes"] for sample in samples] == [0, 2, 5]
    assert [sample["running"] for sample in samples] == [2, 2, 2]


def test_a_small_picture(tmp_path: Path) -> None:
    """With a gap where nothing runs."""
    pytest.importorskip("matplotlib")
    names = (*watch.GAUGES, *watch.COUNTERS)
    samples = [
        {"t": t / 2, **{name: float(abs(t - 50) // 10 * 100) for name in names}}
        for t in range(100)
    ]
    record = {"commit": "abc", "gpu": None, "versions": {}, "samples": samples}
    watch.draw(record, tmp_path / "x.png")
    assert 5_000 < (tmp_path / "x.png").stat().st_size < 60_000
