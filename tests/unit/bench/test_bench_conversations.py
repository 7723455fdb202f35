"""bench.serving.conversations: the load, a stub of a server, the figures, the table."""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bench.common.server import Server
from bench.serving.conversations.__main__ import Comparison
from bench.serving.conversations.args import parse_arguments
from bench.serving.conversations.drive import Drive, Turn
from bench.serving.conversations.figures import (
    counters,
    host_cache_gb,
    most_turns_per_s,
    summarize,
    wrong_side,
)
from bench.serving.conversations.load import LONGEST_THOUGHT, Load, Shape
from bench.serving.conversations.plot import draw
from bench.serving.conversations.systems import parse_system, parse_systems
from bench.serving.conversations.table import comparable, failed, format_table
from bench.serving.conversations.vocabulary import write_tokenizer
from sglang_kvc.config import series

SHAPE = Shape(
    sessions=4, turns=4, first=30, user=6, answer=5, think=0.0, forks=0.5, seed=3
)
VOCAB = 1000

# The load -----------------------------------------------------------------------------


def test_load_follows_from_its_seed() -> None:
    one, other = (
        Load(Shape(**{**vars(SHAPE), "seed": seed}), VOCAB) for seed in (3, 4)
    )
    assert one.said(2, 0, 1) == Load(SHAPE, VOCAB).said(2, 0, 1)
    assert one.said(2, 0, 1) != other.said(2, 0, 1)
    said = [one.said(s, b, t) for s in range(4) for b in (0, 1) for t in (3, 4)]
    assert len({tuple(words) for words in said}) == len(said)


def test_load_has_the_lengths_and_forks_asked_for() -> None:
    load = Load(SHAPE, VOCAB)
    assert len(load.said(0, 0, 1)) == 36
    assert len(load.said(0, 0, 2)) == 6
    assert sum(map(load.forks, range(4))) == SHAPE.forked == 2
    assert SHAPE.length == 30 + 4 * 11
    assert SHAPE.all_turns == 4 * 4 + 2 * 2
    # One turn has no middle to fork at.
    assert Shape(**{**vars(SHAPE), "turns": 1}).all_turns == 4


def test_thoughts_have_their_mean_and_an_end() -> None:
    load = Load(Shape(**{**vars(SHAPE), "think": 2.0}), VOCAB)
    drawn = [load.thought(s, 0, t) for s in range(100) for t in range(1, 6)]
    assert 1.6 < sum(drawn) / len(drawn) < 2.3
    assert max(drawn) <= 2.0 * LONGEST_THOUGHT


def test_systems_are_named() -> None:
    four, host, small = parse_systems("sessions-4,stock-host, ours-2.5-fp8")
    assert four.flags(2, 64) == [
        "--kv-compress-rate",
        "4",
        "--kv-compress-min-budget",
        "64",
        "--kv-compress-sessions",
    ]
    assert host.flags(1.5, 64) == [
        "--enable-hierarchical-cache",
        "--hicache-ratio",
        "1.5",
    ]
    assert host.stock
    assert not small.stock
    assert (small.rate, small.pool(100), host.pool(100)) == (2.5, 200, 100)
    assert "--kv-compress-sessions" not in small.flags(2)
    ours = parse_system("sessions-4-fp8-host")
    assert (ours.stock, ours.pool(100)) == (False, 200)
    assert ours.flags(1.5)[-3:] == [
        "--kv-compress-sessions",
        "--kv-compress-sessions-host",
        "1.5",
    ]


@pytest.mark.parametrize(
    "name", ["stock-4", "ours", "ours-x", "ours-4-host", "sessions-0", "other-4", ""]
)
def test_what_names_no_system_is_refused(name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no system"):
        parse_system(name)


def test_arguments_size_the_pool_and_pass_on_the_rest() -> None:
    args = parse_arguments(None, ["--first", "100", "--turns", "2", "--", "--x", "1"])
    assert args.pool == 16 * args.shape.length == 16 * (100 + 2 * 500)
    assert args.extra == ["--x", "1"]
    assert [one.name for one in args.systems][:2] == ["stock", "stock-fp8"]
    with pytest.raises(SystemExit):
        parse_arguments(None, ["--turns", "0"])


# A stub server ------------------------------------------------------------------------

# A client must not send its next request over a connection that is about to end.
END = "Connection: close\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + END.encode()


class Stub:
    """Answers completions as SGLang does, and notes the prompts.

    Attributes
    ----------
    prompts, answers : list of list of int
    refuse_after : requests that are served; all of them if None.
    slow : whether answers never come.
    """

    def __init__(self, refuse_after: int | None = None, slow: bool = False) -> None:
        self.prompts: list[list[int]] = []
        self.answers: list[list[int]] = []
        self.refuse_after, self.slow = refuse_after, slow

    async def serve(self, use: Callable[[str], Awaitable[Any]]) -> Any:
        """Listen while `use` runs with our URL."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            return await use(f"http://127.0.0.1:{port}")
        finally:
            server.close()

    async def _connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode().lower().splitlines()
            (length,) = [ln.split(":")[1] for ln in lines if "content-length" in ln]
            await self._answer(
                json.loads(await reader.readexactly(int(length))), writer
            )
            await writer.drain()
        finally:
            writer.close()

    async def _answer(self, body: dict[str, Any], writer: Any) -> None:
        if self.slow:
            await asyncio.sleep(60)
        prompt, count = body["prompt"], len(self.prompts)
        self.prompts.append(prompt)
        if self.refuse_after is not None and count >= self.refuse_after:
            text = json.dumps({"object": "error", "message": "no room", "code": 400})
            head = f"HTTP/1.1 400 X\r\nContent-Length: {len(text)}\r\n{END}"
            writer.write((head + text).encode())
            return
        assert body["stream"]
        assert body["ignore_eos"]
        ids = [2000 + 10 * count + at for at in range(body["max_tokens"])]
        self.answers.append(ids)
        writer.write(HEAD)
        for at, token in enumerate(ids):
            last = at == len(ids) - 1
            choice = {"index": 0, "text": "x", "token_ids": [token]}
            choice["finish_reason"] = "length" if last else None
            self._event(writer, {"choices": [choice]})
        known = max(
            (len(p) + 5 for p in self.prompts[:-1] if prompt[: len(p)] == p), default=0
        )
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        usage["prompt_tokens_details"] = {"cached_tokens": known}
        kv = {"resumed_tokens": known, "resident_tokens": 10, "logical_tokens": 40}
        ours = {"kv_compress": [{**kv, "passes": 1}]}
        self._event(writer, {"choices": [], "usage": usage, "metadata": ours})
        writer.write(b"0\r\n\r\n")

    @staticmethod
    def _event(writer: Any, event: dict[str, Any]) -> None:
        line = b"data: " + json.dumps(event).encode() + b"\n\n"
        writer.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")


def drive(stub: Stub, load: Load, seconds: float = 30) -> tuple[Drive, bool]:
    """The load on a stub; whether it was served whole."""

    async def use(url: str) -> tuple[Drive, bool]:
        one = Drive(Server(url), load, seconds=seconds, stall=20)
        return one, await one.run()

    return asyncio.run(stub.serve(use))


def test_a_turn_is_what_was_said_and_answered_before() -> None:
    stub, load = Stub(), Load(SHAPE, VOCAB)
    run, whole = drive(stub, load)
    assert whole
    assert len(run.turns) == SHAPE.all_turns
    answer_of = dict(zip(map(tuple, stub.prompts), stub.answers, strict=True))
    for session in range(SHAPE.sessions):
        for branch in range(1 + load.forks(session)):
            text: list[int] = []
            for turn in range(1, SHAPE.turns + 1):
                own = branch if turn > SHAPE.fork_after else 0
                text = text + load.said(session, own, turn)
                text = text + answer_of[tuple(text)]


def test_figures_of_a_run() -> None:
    run, _ = drive(Stub(), Load(SHAPE, VOCAB))
    values = summarize(run.turns, SHAPE.all_turns, run.begin)
    assert values["complete"]
    assert not values["errors"]
    assert values["turn_1"]["turns"] == SHAPE.sessions
    assert values["turn_1"]["computed_tokens"] == values["turn_1"]["new_tokens"] == 144
    # All but what is new was found.
    assert values["later"]["computed_over_new"] == values["computed_over_new"] == 1
    assert values["last_turn_hits"] == 1
    assert values["resumed_turns"] == SHAPE.all_turns - SHAPE.sessions
    assert values["turns_per_s"] == pytest.approx(len(run.turns) / values["seconds"])
    assert values["answer_tokens_per_s"] == pytest.approx(5 * values["turns_per_s"])
    assert values["most_turns_per_s"] > 0
    assert not wrong_side(values, stock=False)
    assert "stock" in wrong_side(values, stock=True)
    assert wrong_side({**values, "reported": 3}, stock=False)


@pytest.mark.parametrize(("served", "rate"), [(10, 0.9), (9, 0.9), (8, None)])
def test_the_last_turns_do_not_count_in_most(served: int, rate: float | None) -> None:
    """Nine of ten were answered after ten seconds."""
    ends = [1, 2, 3, 4, 5, 6, 7, 8, 10, 90][:served]
    turns = [Turn(it, 0, 1, 5.0, last=100.0 + end) for it, end in enumerate(ends)]
    found = most_turns_per_s(turns[::-1], 10, 100.0)
    assert found == (None if rate is None else pytest.approx(rate))


def test_a_refused_turn_ends_its_session_alone() -> None:
    run, whole = drive(Stub(refuse_after=5), Load(SHAPE, VOCAB))
    assert not whole
    values = summarize(run.turns, SHAPE.all_turns, run.begin)
    assert (values["turns"], values["errors"]) == (5, 4 + sum_of_forks(run))
    assert "no room" in values["first_errors"][0]
    assert "no room" in failed({"system": "stock", **values})


def sum_of_forks(run: Drive) -> int:
    """Second ways that had begun before all was refused."""
    return len({it.session for it in run.turns if it.branch})


def test_the_time_ends_a_run() -> None:
    run, whole = drive(Stub(slow=True), Load(SHAPE, VOCAB), seconds=0.5)
    assert not whole
    assert run.turns == []
    assert summarize(run.turns, 20, run.begin)["complete"] is False


class QuietServer:
    """A server whose process lives, or has died; without a process."""

    def __init__(self, url: str, dies: bool = False) -> None:
        self.url, self.dies, self.flushed = url, dies, 0

    def alive(self) -> bool:
        return not (self.dies and self.flushed)

    def log_text(self) -> str:
        return "max_total_num_tokens=640\n1.50 GB host memory\n"

    log_tail = log_text

    def wait_idle(self, limit: float) -> None:
        assert limit

    def flush(self) -> None:
        self.flushed += 1

    def get(self, path: str) -> str:
        assert path == "/metrics"
        return f"{series.HITS.name}{{}} 5\n"

    def memory(self) -> dict[str, float]:
        return {"sglang::scheduler": 7.4}


def measured(system: str, **quiet: Any) -> dict[str, Any]:
    """Record of a system on a stub that reports KV-Compress."""
    words = "--sessions 2 --turns 2 --first 30 --user 6 --answer 5 --think 0 --forks 0"
    args = parse_arguments(None, [*words.split(), "--device", "cpu"])
    one = Comparison.__new__(Comparison)
    one.args, one.model, one.load = args, Path("stub"), Load(args.shape, VOCAB)
    stub = Stub()
    ready = threading.Event()
    urls: list[str] = []

    async def listen() -> None:
        async def use(url: str) -> None:
            urls.append(url)
            ready.set()
            await asyncio.to_thread(done.wait)

        await stub.serve(use)

    done = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(listen()))
    thread.start()
    try:
        assert ready.wait(20)
        server: Any = QuietServer(urls[0], **quiet)
        return one._measure(parse_system(system), server)
    finally:
        done.set()
        thread.join()


def test_a_record_has_all_that_was_seen() -> None:
    record = measured("sessions-4")
    assert not failed(record)
    assert record["turns"] == record["asked"] == 4
    assert record["snapshot_hits"] == 0
    assert (record["pool_tokens"], record["host_cache_gb"]) == (640, 1.5)
    assert record["processes_mib"] == {"sglang::scheduler": 7}
    assert "sessions-4" in format_table([record])


def test_what_went_wrong_makes_a_record_red() -> None:
    """The wrong code, a server that died; figures so far are kept."""
    assert "of stock SGLang report" in failed(measured("stock"))
    dead = measured("sessions-4", dies=True)
    assert failed(dead).startswith("the server died")
    one = Comparison.__new__(Comparison)
    one.args, one.model, one.load = parse_arguments(None, []), Path("m"), Load(SHAPE, 9)
    assert failed(one._measure(parse_system("stock"), "it did not start")) == (
        "it did not start"
    )


# Figures ------------------------------------------------------------------------------


def test_hits_are_those_of_the_last_turn() -> None:
    def turn(session: int, number: int, cached: int) -> Turn:
        times = {"begin": 0.0, "first": 1.0, "last": 2.0}
        who = {"session": session, "branch": 0, "number": number}
        return Turn(**who, **times, prompt=100, cached=cached, new=20, answer=4)

    turns = [turn(0, 2, 80), turn(0, 3, 16), turn(1, 2, 0), turn(1, 3, 64)]
    values = summarize(turns, 4, 0.0)
    assert values["last_turn_hits"] == 0.5
    assert values["later"]["first_token_p99_s"] == 1.0
    assert values["stream_tokens_per_s"] == 3
    assert values["reported"] == 0


def test_logs_and_metrics_are_read() -> None:
    logs = (
        "Allocating 23.07 GB host memory for hierarchical KV cache.",
        "Allocating MHA hierarchical KV host pool: 100 tokens, 23.07 GB host memory.",
    )
    assert [host_cache_gb(log) for log in logs] == [23.07, 23.07]
    assert host_cache_gb("nothing") == 0
    text = f'{series.SNAPSHOTS.name}{{rank="0"}} 3.0\n{series.HITS.name}{{a="1"}} 7.0\n'
    assert counters(f"# HELP\n{text}other 1\n") == {"snapshots": 3, "snapshot_hits": 7}


def test_any_id_has_a_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = write_tokenizer(tmp_path / "words", 500)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 500
    assert tokenizer.decode([499, 3, 2]) == "t499 t3 t2"


# The table ----------------------------------------------------------------------------


def record(system: str, speed: float, commit: str = "aaa", **more: Any) -> Any:
    """A record of a run."""
    one = parse_system(system)
    part = {"first_token_p50_s": 1.0, "first_token_p99_s": 2.0}
    return {
        "system": system,
        "kind": one.kind,
        "rate": one.rate,
        "stock": one.stock,
        "commit": commit,
        "gpu": "H200",
        "versions": {"sglang": "0.5.23"},
        "model": "m",
        "shape": vars(SHAPE),
        "pool": 100,
        "pool_tokens": 100,
        "turns": 20,
        "complete": True,
        "turns_per_s": speed,
        "turn_1": part,
        "later": part,
        "computed_over_new": 1.5,
        "answer_tokens_per_s": 50.0,
        "last_turn_hits": 0.25,
        "errors": 0,
        **more,
    }


def test_table_joins_the_records_of_several_calls() -> None:
    old = record("stock", 2.0, commit="old")
    records = [
        old,
        record("sessions-4", 9.0, commit="old"),
        record("sessions-8", 1.0),
        record("ours-4", 5.0, snapshots=3),
        record("stock-fp8", 3.0, shape={}),
        record("sessions-8", 8.0),
    ]
    chosen = comparable(records)
    assert [one["system"] for one in chosen] == ["stock", "ours-4", "sessions-8"]
    table = format_table(chosen)
    rows = {line.split()[0]: line.split() for line in table.splitlines()[2:5]}
    assert rows["stock"][3:5] == ["2.000", "1.00"]
    assert rows["sessions-8"][3:5] == ["8.000", "4.00"]
    newer = record("stock", 4.0)
    assert comparable([newer, *records])[0] is newer
    assert format_table([]) == "no records"


def test_a_failed_run_has_no_figures() -> None:
    dead = {**record("stock", 2.0), "error": "the server died:\nlog\nOut of memory"}
    assert "the server died: ... Out of memory" in format_table([dead])
    cut = record("ours-4", 2.0, complete=False)
    assert "20 cut" in format_table([cut])


def test_plot_is_drawn_of_what_succeeded(tmp_path: Path) -> None:
    records = [record("stock", 2.0), record("sessions-4", 9.0)]
    (path,) = draw([*records, record("ours-4", 1.0, error="x")], tmp_path, "x.jsonl")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert draw([record("stock", 2.0, error="x")], tmp_path, "x.jsonl") == []
