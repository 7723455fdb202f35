"""bench.serving.agreement without an engine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from bench.serving import agreement, child


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
