"""bench.serving.agreement without an engine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from bench.serving import agreement, child, session


def started(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keywords, log and GPUs of the engines of a way."""
    calls: list[Any] = []

    def made(command: list[str], log: Path, environ: dict[str, str]) -> object:
        keywords = json.loads(command[command.index("--engine") + 1])
        gpus = environ.get("CUDA_VISIBLE_DEVICES", "")
        calls.append((keywords, log.name, [int(gpu) for gpu in gpus.split(",") if gpu]))
        return object()

    monkeypatch.setattr(child, "Child", made)
    args = argparse.Namespace(model="m", load_format="auto", pool=4096, extra_args="{}")
    assert len(agreement.start(args, way, Path("1.log"))) == len(calls)
    return calls


def test_each_node_has_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = started({"tp_size": 4, "nnodes": 2}, monkeypatch)
    assert [gpus for _, _, gpus in calls] == [[0, 1], [2, 3]]
    assert [keywords["node_rank"] for keywords, _, _ in calls] == [0, 1]
    assert len({log for _, log, _ in calls}) == 2
    address = {keywords["dist_init_addr"] for keywords, _, _ in calls}
    assert len(address) == 1, "all nodes meet at one place"


def test_one_node_sees_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    [(keywords, _, gpus)] = started({"tp_size": 2}, monkeypatch)
    assert gpus == []
    assert "node_rank" not in keywords
    assert keywords["kv_compress"] is True


def test_replicas_choose_their_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    [(keywords, _, _)] = started({"dp_size": 2}, monkeypatch)
    assert "nccl_port" not in keywords


def test_what_two_ways_have_in_common() -> None:
    found = agreement.agreement([[1, 2, 3], [4, 5]], [[1, 2, 9], [4, 5]])
    assert found == {"equal": 1, "alike_tokens": [2, 2], "tokens": [3, 2]}


# What a call does ---------------------------------------------------------------------


class Played:
    """An engine of a way that always gives the same tokens."""

    def __init__(self) -> None:
        self.limits: list[float] = []

    def wait(self, timeout: float) -> dict[str, Any]:
        self.limits.append(timeout)
        return {"ready_s": 41.6}

    def ask(self, command: dict[str, Any], timeout: float) -> dict[str, Any]:
        return {"ids": [[1, 2, 3]]} if command["op"] == "answers" else {}

    def close(self, timeout: float) -> None:
        pass


@pytest.mark.parametrize("apart", [False, True])
def test_logs_are_kept_and_engines_told_of_as_they_are_ready(
    apart: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engines: list[Played] = []
    logs: list[Path] = []

    def made(args: Any, way: dict[str, Any], log: Path) -> list[Played]:
        assert log.parent.is_dir()
        logs.append(log)
        engines.append(Played())
        return [engines[-1]]

    monkeypatch.setattr(agreement, "start", made)
    monkeypatch.setattr(agreement, "passages", lambda *_: [[7, 8]])
    monkeypatch.setattr(agreement, "IDLE_SECONDS", 0)
    words = ["--model", "m", "--text", "t", "--start-limit", "900"]
    words += ["--way", 'stock: {"stock": true}', "--way", "fp8 / new: {}"]
    words += ["--logs", str(tmp_path / "a/b"), "--out", str(tmp_path / "out.jsonl")]
    agreement.main([*words, *(["--apart"] if apart else [])])
    names = [log.relative_to(tmp_path / "a/b").name for log in logs]
    assert names == ["0-stock.log", "1-fp8-new.log"]
    assert [engine.limits for engine in engines] == [[900], [900]]
    said = capsys.readouterr().out
    order = ["starting stock", "stock ready in 42 s", "stock answered 1 prompts"]
    places = [said.index(text) for text in [*order, "fp8 / new ready in 42 s"]]
    assert places == sorted(places)
    second = said.index("starting fp8 / new")
    assert (second > places[0]) and (second > places[2]) is apart
    assert "1 of 1 answers equal" in said
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert (record["equal"], record["other"]) == (1, {})


def test_without_a_limit_an_engine_has_as_long_as_a_sessions() -> None:
    args = agreement.parse_arguments(
        ["--model", "m", "--text", "t", "--way", "ours: {}"]
    )
    assert (args.start_limit, args.logs) == (session.START_LIMIT, None)
