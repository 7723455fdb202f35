"""bench.serving without an engine: plans, deadlines, the pipe."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.common.ports import free_ports
from bench.common.record import ROOT
from bench.serving import report
from bench.serving.child import Child, ChildError
from bench.serving.engine import Seen, sampling_params, summarize, token_gaps
from bench.serving.loads import ABSENT, LOADS, OURS, STOCK, Load, choose, make_prompts
from bench.serving.plan import (
    Clock,
    Run,
    Spec,
    adhoc,
    check,
    chosen,
    engine_arguments,
    engines_together,
    plan,
    spec_of,
    supported,
    with_rates,
    with_systems,
    without_stock,
)
from tests.unit.bench.serve_fixtures import namespace, record

FAKE = """
import json, os, sys
fd = int(sys.argv[sys.argv.index("--answer-fd") + 1])
answer = lambda **values: os.write(fd, json.dumps(values).encode() + b"\\n")
answer(ready_s=0.5, plugin_loaded=False)
for line in sys.stdin:
    command = json.loads(line)
    if command["op"] == "die":
        print("a traceback", flush=True)
        sys.exit(3)
    if command["op"] == "late":
        continue
    if command["op"] == "break":
        answer(error="out of memory")
        continue
    print("served", command["op"], flush=True)
    answer(op=command["op"], padding="x" * 200_000)
"""
SLOW = """
import os, sys, time
time.sleep(1)
os.write(int(sys.argv[sys.argv.index("--answer-fd") + 1]), b'{"ready_s": 1}\\n')
sys.stdin.read()
"""


def test_prompts_are_equal_for_both_systems_and_prefixes_of_each_other() -> None:
    load = LOADS["6000x500@20480"]
    stock, ours = (load.command(s, 8) for s in (STOCK, OURS))
    assert (stock["prompts"], ours["prompts"]) == (32, 128)
    assert (stock["rate"], ours["rate"]) == (None, 8)
    assert load.count(OURS, 1) == 32
    few = make_prompts({**stock, "prompts": 2}, 1000)
    assert make_prompts({**ours, "prompts": 3}, 1000)[:2] == few
    assert [len(ids) for ids in few] == [6000, 6000]
    assert few[0] != few[1] and all(10 <= i < 990 for i in few[0])
    made = adhoc(namespace()).command(OURS, 8)
    assert all(10 <= len(ids) <= 20 for ids in make_prompts(made, 1000))


def test_only_the_small_engines_are_alive_together() -> None:
    loads = [load for load in map(supported, choose("every")) if load]
    small, *alone = plan(loads, 2)
    assert {run.spec.pool for run in small} == {20480, 28736, 49152}
    assert [batch[0].spec.system for batch in alone] == [STOCK, ABSENT, OURS]
    assert all(len({run.spec for run in batch}) == 1 for batch in alone)
    for batch in (alone[0], alone[2]):
        assert batch[0].load.mode == "first"
        assert sum(run.load.mode == "first" for run in batch) == 1
    order = [(r.spec.system, r.rate) for r in small if r.load.id == "6000x500@20480"]
    assert order[:3] == [(STOCK, 0), (OURS, 8), (OURS, 64)]
    assert len(order) == 2 * 8
    assert {r.spec.min_budget for r in small if r.spec.system == OURS} == {128}
    with pytest.raises(SystemExit, match="unknown loads"):
        choose("", ["nonsense"])


def test_no_more_engines_are_alive_than_the_gpu_holds() -> None:
    assert [engines_together(mib) for mib in (None, 143771, 81559, 16384)] == [
        0,
        5,
        3,
        1,
    ]
    loads = [load for load in map(supported, choose("every")) if load]
    everything = plan(loads, 1)
    split = plan(loads, 1, 2)
    engines = [list(dict.fromkeys(run.spec for run in batch)) for batch in split]
    assert max(map(len, engines)) == 2
    assert [spec.system for spec in engines[0]] == [STOCK, OURS]
    assert len(sum(engines, [])) == len(set(sum(engines, []))), "none starts twice"
    assert sorted(map(str, sum(split, []))) == sorted(map(str, sum(everything, [])))
    first = [run for run in everything[0] if run.spec in engines[0]]
    assert split[0] == first, "the order stays"


def test_engines_of_large_models_are_alone_unless_a_number_is_given() -> None:
    loads = choose("70b")
    assert [len({run.spec for run in batch}) for batch in plan(loads, 1, 4)] == [1, 1]
    assert [len({run.spec for run in b}) for b in plan(loads, 1, 4, large=True)] == [2]


def test_cpu_compares_with_the_plugin_without_its_flag() -> None:
    load = without_stock(LOADS["6000x256@all"])
    assert load.systems == (ABSENT, OURS)
    assert without_stock(LOADS["flag-absent"]).systems == (ABSENT,)
    runs = [record(load.id, ABSENT, 0, 30.0), record(load.id, OURS, 1, 20.0)]
    (row,) = (r for r in report.summarize(runs) if r["system"] == OURS)
    assert row["ratio_to_stock"] == pytest.approx(1.5)


def test_unknown_keyword_leaves_the_load_out(capsys: Any) -> None:
    load = Load("x", 1, 1, 1, 16, (8,), engine={"kv_compress_nonsense": 1})
    assert supported(load) is None
    assert "no kv_compress_nonsense" in capsys.readouterr().out
    wanted = Load("x", 1, 1, 1, 16, (8,), engine={"kv_compress_interval": 64})
    kept = supported(wanted)
    assert kept is not None and kept.engine == {}, "it is the default"


def test_a_cache_of_another_dtype_is_that_of_every_system() -> None:
    load = LOADS["6000x500@40960+fp8"]
    for system in (STOCK, OURS):
        arguments = engine_arguments(namespace(), spec_of(load, system))
        assert arguments["kv_cache_dtype"] == "fp8_e4m3"
    plain = engine_arguments(namespace(), spec_of(LOADS["6000x500@20480"], STOCK))
    assert "kv_cache_dtype" not in plain


def test_engine_arguments_differ_in_the_plugin_only() -> None:
    load = LOADS["6000x500@20480"]
    args = namespace(extra_args='{"kv_compress_interval": 16, "tp_size": 1}')
    stock, absent, ours = (
        engine_arguments(args, spec_of(load, s)) for s in (STOCK, ABSENT, OURS)
    )
    assert stock == absent
    assert stock["max_total_tokens"] == 20480 and stock["tp_size"] == 1
    # Ours chooses its number of slots itself, because they cost memory.
    assert stock.pop("max_running_requests") == 256
    assert {k: v for k, v in ours.items() if not k.startswith("kv_compress")} == stock
    assert ours["kv_compress"] and ours["kv_compress_min_budget"] == 128
    assert ours["kv_compress_interval"] == 16
    assert "max_total_tokens" not in engine_arguments(args, Spec(STOCK, 0))
    assert sampling_params(load.command(OURS, 8))["custom_params"] == {
        "kv_compress": {"rate": 8}
    }
    assert "custom_params" not in sampling_params(load.command(STOCK, 0))


def test_rates_can_be_chosen() -> None:
    assert with_rates(LOADS["6000x500@20480"], "64,2,3").rates == (64, 2)
    assert with_rates(LOADS["6000x256@all"], "8").rates == (1,)


def test_chosen_systems() -> None:
    both = LOADS["6000x500@20480"]
    assert with_systems(both, "kvc").systems == ("kvc",)
    assert {run.spec.system for run in plan([with_systems(both, "stock")], 1)[0]} == {
        "stock"
    }


def test_what_no_load_has_is_refused() -> None:
    loads = [LOADS["6000x500@20480"], LOADS["6000x256@all"]]
    assert chosen(loads, "64,1", "kvc")[0].rates == (64, 1)
    assert chosen(loads, "", "") == loads
    with pytest.raises(SystemExit, match="no load has the rates 3, 1.25; there are"):
        chosen(loads, "64,3,1.25", "")
    with pytest.raises(SystemExit, match="no load has the systems ours; there are kvc"):
        chosen(loads, "", "stock,ours")


def test_deadline_uses_what_the_last_repeat_took(monkeypatch: Any) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    load = LOADS["6000x500@20480"]
    run = Run(load, spec_of(load, OURS), 8, 0)
    clock = Clock(100)
    assert clock.expected(run) == load.seconds[8] and clock.fits(run)
    now[0] += 60
    assert not clock.fits(run)
    clock.learn(run, 10)
    assert clock.fits(run)
    assert Clock(0).fits(run), "no deadline"


def test_answers_are_checked() -> None:
    load = Load("x", 2, 2000, 64, 0, (8,))
    run = Run(load, spec_of(load, OURS), 8, 0)
    stock = Run(load, spec_of(load, STOCK), 0, 0)
    good = {"lengths": [64, 64], "compressed": 2, "passes": 4}
    plain = {"lengths": [64, 64], "compressed": 0}
    assert check(run, good, True) == ""
    assert check(stock, plain, False) == ""
    assert "plugin loaded" in check(stock, plain, True)
    assert "plugin loaded" in check(run, good, False)
    assert "0 outputs carry" in check(run, {**plain, "passes": 0}, True)
    assert "2 outputs carry" in check(stock, good, False)
    assert "nothing was compressed" in check(run, {**good, "passes": 0}, True)
    assert "another length" in check(run, {**good, "lengths": [64, 3]}, True)
    assert "too long" in check(stock, {"failed": "too long"}, False)


def test_summary_of_outputs() -> None:
    ours = {
        "logical_tokens": 100,
        "resident_tokens": 20,
        "peak_resident_tokens": 40,
        "passes": 2,
        "deferred_passes": 0,
    }
    info = [
        {"completion_tokens": 5, "kv_compress": ours},
        {"completion_tokens": 5, "kv_compress": {**ours, "resident_tokens": 40}},
    ]
    found = summarize([[1] * 95] * 2, info)
    assert (found["resident_tokens"], found["passes"]) == (30, 4)
    assert (found["input_tokens"], found["compressed"]) == (190, 2)
    assert "replicas" not in found, "one rank only"
    shared = [{"completion_tokens": 5, "dp_rank": rank} for rank in (1, 0, 1)]
    assert summarize([[1]] * 3, shared)["replicas"] == [1, 2]
    aborted = {"type": "abort", "message": "too long"}
    found = summarize([[1]], [{"completion_tokens": 0, "finish_reason": aborted}])
    assert found["failed"] == "too long"


def test_latencies_start_when_all_requests_have() -> None:
    early = [Seen(0.0, 1), Seen(5.0, 2), Seen(5.01, 3), Seen(5.02, 4)]
    late = [Seen(5.0, 1), Seen(5.01, 2), Seen(5.03, 4)]
    found = token_gaps([early, late])
    assert found["itl_gaps"] == 4, "the gap of 5 s began before the last first token"
    assert found["itl_median_ms"] == pytest.approx(10)
    assert found["itl_max_ms"] == pytest.approx(20)
    assert found["itl_gaps_of_several"] == 1
    assert "failed" in token_gaps([[Seen(0.0, 1)]])


def test_commands_of_a_child(tmp_path: Path) -> None:
    child = Child([sys.executable, "-c", FAKE], tmp_path / "log", {})
    try:
        assert child.wait(20) == {"ready_s": 0.5, "plugin_loaded": False}
        child.ask({"op": "one"}, 20)
        position = child.position()
        answer = child.ask({"op": "two"}, 20)
        assert len(answer["padding"]) == 200_000, "longer than a pipe holds"
        assert child.read_log(position) == "served two\n"
        with pytest.raises(ChildError, match="out of memory"):
            child.ask({"op": "break"}, 20)
        with pytest.raises(ChildError, match="no answer to late"):
            child.ask({"op": "late"}, 0.1)
        with pytest.raises(ChildError, match="(?s)died at die.*a traceback"):
            child.ask({"op": "die"}, 20)
        with pytest.raises(ChildError):
            child.ask({"op": "more"}, 20)
    finally:
        child.close()
    assert child.process.returncode == 3


def test_an_answer_that_came_while_the_parent_was_stopped(tmp_path: Path) -> None:
    """As by a script that starts several benches and lets one of them go on."""
    code = f"""
import sys, time
from pathlib import Path
from bench.serving.child import Child
child = Child([sys.executable, "-c", {SLOW!r}], Path({str(tmp_path / "log")!r}), {{}})
print("waits", flush=True)
print(child.wait(2))
child.close()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout
    assert parent.stdout.readline() == "waits\n"
    parent.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    parent.send_signal(signal.SIGCONT)
    assert parent.communicate(timeout=20)[0] == "{'ready_s': 1}\n"


def test_child_that_does_not_quit_is_ended(tmp_path: Path) -> None:
    code = "import time; time.sleep(600)"
    child = Child([sys.executable, "-c", code], tmp_path / "log", {})
    child.close(timeout=0.2)
    assert child.process.returncode == -9


def test_ports_differ_and_are_nobodys() -> None:
    """Nor does the system give them to whoever asks for any."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", free_ports(1)[0]))
        taken = {it.getsockname()[1] for it in (one, other)}
        found = free_ports(50)
        assert len(set(found)) == 50
        assert not taken & set(found)
        assert max(found) < one.getsockname()[1]


def test_every_command_is_json() -> None:
    for load in LOADS.values():
        for system in load.systems:
            json.dumps(load.command(system, (load.rates or (0,))[0]))
