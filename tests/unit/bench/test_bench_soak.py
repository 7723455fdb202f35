"""bench.soak without a server: the load, the verdicts, the figures, a stub of HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bench.common.client import Answer, Client, Outcome, judge
from bench.common.job import EITHER, OK, REFUSED, Job
from bench.common.percentiles import percentile
from bench.common.server import count_log, has_tokenizer, server_command
from bench.soak.args import parse_arguments, set_device_defaults
from bench.soak.hostile import HOSTILE
from bench.soak.itl import Other, Phase, format_phases, other_bodies, summarize
from bench.soak.limits import Limits, surely_fits
from bench.soak.load import Load
from bench.soak.report import (
    Tally,
    format_soak,
    growth_per_thousand,
    settled_after,
)
from bench.soak.shape import Shape

LIMITS = Limits(
    pool=65_536,
    chunk=8192,
    context=100_000,
    vocab=50_000,
    text=True,
    structured=True,
    folds=True,
    priority=True,
)
SHAPE = Shape(requests=400, max_len=4000, max_output=100, aborts=40, leaves=20)
BARE = Limits(4096, 512, 4090, 512, False, False, True, False)


# The load -----------------------------------------------------------------------------


def load(limits: Limits = LIMITS, **changes: Any) -> Load:
    """The load of `SHAPE` with other numbers."""
    return Load(Shape(**{**vars(SHAPE), **changes}), limits)


def test_load_follows_from_its_seed() -> None:
    """Also request by request, in any order."""
    one, two, other = load(), load(), load(seed=1)
    jobs = [one.job(i) for i in range(50)]
    assert jobs == [two.job(i) for i in reversed(range(50))][::-1]
    assert jobs != [other.job(i) for i in range(50)]
    assert one.canary(3) == two.canary(3)


def test_load_has_every_kind() -> None:
    made = load()
    jobs = [made.job(i) for i in range(SHAPE.requests)]
    kinds = {job.kind for job in jobs}
    assert {"generate", "generate stream", "chat", "chat stream"} <= kinds
    assert {"completions", "abort", "leave", "beyond the pool"} <= kinds
    assert {"structured json", "structured regex"} <= kinds
    assert any("n>1" in kind for kind in kinds)
    assert sum(job.act == "abort" for job in jobs) == SHAPE.aborts
    assert sum(job.act == "leave" for job in jobs) == SHAPE.leaves
    assert all((job.expect == REFUSED) == ("hostile" in job.kind) for job in jobs)


def test_no_id_is_the_beginning_of_another() -> None:
    """SGLang aborts all that begin with the one given."""
    made = load()
    jobs = [made.job(i) for i in range(SHAPE.requests)]
    rids = [job.rid for job in jobs] + [made.canary(i).rid for i in range(50)]
    rids += [json.loads(job.encoded())["rid"] for job in jobs]
    assert len({len(rid) for rid in rids if rid.startswith("soak")}) == 1
    assert len(set(rids)) == SHAPE.requests + 50


def test_prompts_share_prefixes_and_stay_in_their_bounds() -> None:
    prompts, small = [], load(BARE, max_len=2000)
    for index in range(SHAPE.requests):
        job = small.job(index)
        if job.expect != REFUSED and job.kind != "beyond the pool":
            prompts.append(json.loads(job.encoded())["input_ids"])
    assert all(1 <= len(ids) <= 2000 for ids in prompts)
    assert all(0 <= token < BARE.vocab for ids in prompts for token in ids)
    starts = [tuple(ids[:32]) for ids in prompts if len(ids) >= 32]
    assert len(set(starts)) < 0.9 * len(starts)
    lengths = sorted(map(len, prompts))
    assert lengths[0] < 4
    assert lengths[len(lengths) // 2] < 200 < 1200 < lengths[-1]


def test_what_a_bare_server_cannot_do_is_left_out() -> None:
    bare = load(BARE, without=frozenset({"budget 2**63"}))
    kinds = {bare.job(i).kind for i in range(SHAPE.requests)}
    assert not any(kind.startswith(("chat", "completions", "struct")) for kind in kinds)
    said = " ".join(bare.left_out())
    assert "OpenAI" in said and "priorities" in said and "budget 2**63" in said
    assert "hostile: budget 2**63" not in kinds


@pytest.mark.parametrize(
    ("length", "output", "option", "fits"),
    [
        (1000, 100, None, True),
        (1000, 100, {"enabled": False}, True),
        (3900, 100, {"enabled": False}, False),
        (3000, 100, {"rate": 1.01}, False),
        (3000, 500, {"budget": 3000}, False),
        (4000, 500, {"rate": 8}, False),
    ],
)
def test_what_surely_fits(
    length: int, output: int, option: dict[str, Any] | None, fits: bool
) -> None:
    assert surely_fits(BARE, length, output, option) == fits


def test_prompt_beyond_the_pool_fits_if_it_is_folded() -> None:
    option = {"rate": 64}
    assert surely_fits(LIMITS, 90_000, 10, option)
    whole = Limits(**{**vars(LIMITS), "folds": False})
    assert not surely_fits(whole, 90_000, 10, option)


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.kind)
def test_hostile_requests_are_json_and_their_kinds_unique(hostile: Any) -> None:
    params: dict[str, Any] = {"max_new_tokens": 8}
    body = {"input_ids": [1, 2], "sampling_params": params}
    good = json.dumps(body)
    assert json.dumps(json.loads(hostile.spoil(body, BARE))) != good
    assert [h.kind for h in HOSTILE].count(hostile.kind) == 1
    # --without separates them with commas.
    assert "," not in hostile.kind


# Verdicts -----------------------------------------------------------------------------


def job(**values: Any) -> Job:
    """A request for three tokens."""
    base = {"index": 0, "kind": "generate", "path": "/generate", "body": {}}
    return Job(**{**base, "output": 3, "exact": True, **values})


def answer(finish: Any = None, tokens: int = 3, **values: Any) -> Answer:
    """A native answer, as the client has read it."""
    made = Answer(status=200)
    finish = {"type": "length"} if finish is None else finish
    info = {"finish_reason": finish, "completion_tokens": tokens, "prompt_tokens": 5}
    made.absorb({"text": "", "meta_info": info})
    for name, value in values.items():
        setattr(made, name, value)
    return made


def refusal(message: str = "no", status: int = 400) -> Answer:
    """HTTP 400."""
    made = Answer(status=status)
    made.absorb({"error": {"message": message}})
    return made


ABORTED = {"type": "abort", "message": "Aborted", "status_code": None}
ABORTED_400 = {"type": "abort", "message": "bad", "status_code": 400}


@pytest.mark.parametrize(
    ("asked", "came", "result"),
    [
        ({}, answer(), "ok"),
        ({}, answer(tokens=2), "unexpected"),
        ({"exact": False}, answer(tokens=2), "ok"),
        ({}, refusal(), "unexpected"),
        ({"expect": EITHER}, refusal(), "refused"),
        ({"expect": REFUSED}, refusal(), "refused"),
        ({"expect": REFUSED}, answer(), "unexpected"),
        ({"expect": REFUSED}, refusal(status=500), "unexpected"),
        ({"expect": REFUSED}, refusal(status=422), "unexpected"),
        ({"expect": REFUSED}, answer(ABORTED_400), "refused"),
        ({"expect": REFUSED, "short": True}, refusal("x" * 10_000), "unexpected"),
        ({"expect": REFUSED, "short": True}, refusal("x" * 500), "refused"),
        ({}, answer(ABORTED), "unexpected"),
        ({"act": "abort"}, answer(ABORTED, tokens=1), "aborted"),
        ({"act": "abort"}, refusal("Request abort: by id"), "aborted"),
        ({"act": "abort"}, refusal("too long"), "unexpected"),
        ({"act": "abort"}, answer(), "too late to cut"),
        ({"act": "leave"}, answer(left=True), "left"),
        ({"act": "leave"}, answer(), "too late to cut"),
        ({}, answer(timed_out=True), "stalled"),
        ({}, answer(problem="ClientOSError"), "unexpected"),
        ({"n": 2}, answer(), "unexpected"),
        ({}, Answer(status=200), "unexpected"),
        ({"pattern": "regex"}, answer({"type": "stop"}), "unexpected"),
        ({"pattern": "json"}, answer({"type": "stop"}, texts={0: "{}"}), "ok"),
        ({"pattern": "json"}, answer({"type": "stop"}, texts={0: "{"}), "unexpected"),
    ],
)
def test_verdict(asked: dict[str, Any], came: Answer, result: str) -> None:
    assert judge(job(**asked), came).result == result


def test_answers_of_all_shapes() -> None:
    """Lists of native answers, error events, and choices of OpenAI streams."""
    several = Answer(status=200)
    info = {"finish_reason": {"type": "length"}, "completion_tokens": 3}
    several.absorb([{"text": "a", "meta_info": info}] * 2)
    assert len(several.finishes) == 2
    assert several.tokens("completion_tokens") == 6
    event = Answer(status=200)
    event.absorb({"error": {"message": "no", "code": 400}})
    assert (event.status, event.message) == (400, "no")
    chat = Answer(status=200)
    chat.absorb({"choices": [{"index": 0, "delta": {"content": "a"}}]})
    chat.absorb({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    chat.absorb({"choices": [], "usage": {"completion_tokens": 4}})
    assert (chat.texts[0], chat.finishes[0]) == ("a", "stop")
    assert chat.tokens("completion_tokens") == 4
    openai = Answer(status=400)
    openai.absorb({"object": "error", "message": "no", "code": 400})
    assert (openai.status, openai.message) == (400, "no")


# Figures ------------------------------------------------------------------------------


def test_percentile() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3], 0.99) == 3
    assert percentile([4, 1, 3, 2], 0.5) == 2.5
    assert percentile(range(101), 0.99) == 99
    assert percentile([1, 2], 1.0) == 2


def test_growth_of_memory() -> None:
    """Of a line behind the first samples: 10 MiB on 1,000 are 1 % per 1,000."""
    samples = [(0, 500.0), (1000, 1000.0), (2000, 1010.0), (3000, 1020.0)]
    assert growth_per_thousand(samples, 1000) == pytest.approx(1.0)
    assert growth_per_thousand(samples[:2], 1000) is None
    assert growth_per_thousand([(0, 0.0), (10, 0.0)], 0) is None
    flat = [(0, 10.0), (1000, 100.0), (2000, 101.0), (3000, 99.0), (4000, 100.0)]
    assert abs(growth_per_thousand(flat, 1000) or 9) < 0.5
    assert (settled_after(10_000), settled_after(600)) == (1000, 200)


def make_tally() -> Tally:
    """A served stream, a refusal, an abort and a failure."""
    tally = Tally()
    report = {"enabled": True, "passes": 2, "logical_tokens": 40}
    report["resident_tokens"] = 10
    served = answer(begin=1.0, times=[1.5, 1.6, 1.8])
    served.infos[0] |= {"kv_compress": report, "num_retractions": 1}
    for one, what in (
        (job(stream=True), served),
        (job(kind="hostile: rate zero", expect=REFUSED), refusal()),
        (job(act="abort", kind="abort"), answer(ABORTED)),
        (job(rid="soak-7"), refusal("boom", status=500)),
    ):
        tally.add(judge(one, what))
    tally.add_canary(judge(job(stream=True), served), "quiet")
    return tally


def test_tally() -> None:
    values = make_tally().record()
    assert values["requests"] == 4
    assert values["results"] == {"ok": 1, "refused": 1, "aborted": 1, "unexpected": 1}
    assert values["refused"] == {"400 rate zero": 1}
    assert (values["tokens_in"], values["tokens_out"]) == (15, 9)
    assert (values["passes"], values["retractions"]) == (4, 2)
    assert (values["logical"], values["resident"]) == (80, 20)
    quiet = values["latencies"]["canary, quiet"]
    assert quiet["first_p50_ms"] == 500
    assert (quiet["gap_p50_ms"], quiet["gap_max_ms"]) == (150, 200)
    assert values["failed"] == 1
    assert "boom" in values["failures"][0]["detail"]


def test_table() -> None:
    values = make_tally().record()
    memory = {"start": 1.0, "settled": 2.0, "end": 2.5, "growth": 0.25}
    values |= {"memory": {"scheduler": memory}, "left_out": ["JSON"], "flushed": True}
    table = format_soak(values)
    for text in ("400 rate zero", "scheduler", "0.25", "left out: JSON", "yes"):
        assert text in table
    assert "1 UNEXPECTED" in table and "soak-7" in table and "boom" in table
    assert "nothing unexpected" in format_soak({**values, "failed": 0})


def test_a_death_of_the_server_is_named_first() -> None:
    tally = make_tally()
    tally.fail("the server died", "in flight: generate", first=True)
    tally.fail("generate", "connection 7 lost", "soak-1")
    tally.fail("generate", "connection 8 lost", "soak-2")
    first, *_, last = tally.record()["failures"]
    assert first["kind"] == "the server died"
    # Those that differ in numbers only are told once.
    assert (last["times"], last["rid"]) == (2, "soak-1")


def test_log() -> None:
    line = "KV cache pool is full. Retract requests. #retracted_reqs: 2, #new_tokens"
    found = count_log(f"{line}\n{line}\nTraceback (most recent call last):\n")
    assert found == {"retracted_by_log": 4, "tracebacks_in_log": 1}


# Arguments ----------------------------------------------------------------------------


def test_arguments() -> None:
    words = ["--tiny", "--requests", "100", "--without", "a, b", "--", "--page", "1"]
    args = parse_arguments(None, words)
    assert args.extra == ["--page", "1"]
    assert (args.aborts, args.leaves, args.without) == (10, 5, {"a", "b"})
    set_device_defaults(args, gpu=False)
    assert args.concurrency == 12
    with pytest.raises(SystemExit):
        parse_arguments(None, ["--requests", "10", "--aborts", "9"])


def test_server_command(tmp_path: Any) -> None:
    """A model without a tokenizer is served without; flags of the user come last."""
    assert not has_tokenizer(tmp_path)
    made = server_command(
        str(tmp_path), 1, True, pool=64, priority=True, extra=["--x", "1"]
    )
    assert "--skip-tokenizer-init" in made and "--kv-compress" in made
    assert "--enable-priority-scheduling" in made
    assert made[made.index("--max-total-tokens") + 1] == "64"
    assert made[-2:] == ["--x", "1"]
    (tmp_path / "tokenizer.json").touch()
    made = server_command(str(tmp_path), 1, True)
    assert "--skip-tokenizer-init" not in made


# A stub server ------------------------------------------------------------------------

Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]
JSON = "HTTP/1.1 {} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(**info: Any) -> bytes:
    """An event of a native stream, as a chunk of HTTP."""
    finish = info.pop("finish", None)
    meta = {"finish_reason": finish, "completion_tokens": 1, **info}
    line = b"data: " + json.dumps({"meta_info": meta}).encode() + b"\n\n"
    return f"{len(line):x}\r\n".encode() + line + b"\r\n"


def plain(status: int, body: str) -> Handler:
    """Answer with a body."""

    async def handle(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(JSON.format(status, len(body), body).encode())

    return handle


def stream(*parts: bytes, hang: bool = False) -> Handler:
    """Answer with chunks, then close the connection or hang."""

    async def handle(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + b"".join(parts))
        await writer.drain()
        if hang:
            await asyncio.sleep(30)

    return handle


async def send(handler: Handler, one: Job, stall: float = 0.3) -> tuple[Outcome, list]:
    """Send a request to a server that handles it like this; what it was sent."""
    seen = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            seen.append(head.split(b" ")[1].decode())
            if seen[-1] == "/abort_request":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            else:
                await handler(head, writer)
            await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with Client(f"http://127.0.0.1:{port}", stall) as client:
            return await client.send(one), seen
    finally:
        server.close()


GOOD = json.dumps(
    {"meta_info": {"finish_reason": {"type": "length"}, "completion_tokens": 3}}
)
END = event(finish={"type": "length"}, completion_tokens=3) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("handler", "asked", "result"),
    [
        (plain(200, GOOD), {}, "ok"),
        (plain(400, '{"error": {"message": "no"}}'), {"expect": REFUSED}, "refused"),
        (plain(500, "Internal Server Error"), {}, "unexpected"),
        (plain(200, "<html>"), {}, "unexpected"),
        (stream(event(), event(), END), {"stream": True}, "ok"),
        (stream(event()), {"stream": True}, "unexpected"),
        (stream(event(), b"0\r\n\r\n"), {"stream": True}, "unexpected"),
        (stream(hang=True), {"stream": True}, "stalled"),
        (stream(event(), hang=True), {"stream": True}, "stalled"),
        (stream(hang=True), {}, "stalled"),
    ],
)
def test_client(handler: Handler, asked: dict[str, Any], result: str) -> None:
    outcome, _ = asyncio.run(send(handler, job(**asked)))
    assert outcome.result == result, outcome.detail


@pytest.mark.parametrize("when", [{"after_events": 2}, {"after_seconds": 0.1}])
def test_client_leaves(when: dict[str, Any]) -> None:
    handler = stream(event(), event(), hang=True)
    leaving = job(stream=True, act="leave", **when)
    outcome, _ = asyncio.run(send(handler, leaving, stall=5))
    assert outcome.result == "left"


def test_client_aborts_by_id() -> None:
    async def handle(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + event() + event())
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.write(event(finish=ABORTED) + b"0\r\n\r\n")

    aborting = job(stream=True, act="abort", after_events=2, rid="soak-1")
    outcome, seen = asyncio.run(send(handle, aborting, stall=5))
    assert outcome.result == "aborted"
    assert seen == ["/generate", "/abort_request"]
    assert len(outcome.answer.gaps) == 2


def test_client_says_that_nobody_is_there() -> None:
    async def ask() -> Outcome:
        async with Client("http://127.0.0.1:9", 1) as client:
            return await client.send(job())

    outcome = asyncio.run(ask())
    assert outcome.result == "unexpected"
    assert "Connect" in outcome.detail


# One hostile client beside streams ----------------------------------------------------


def test_other_client() -> None:
    """Hostile: three refused requests, then one at rate 1.01; polite: the same ones."""
    hostile = other_bodies(Other("hostile", BARE, (10, 20)))
    polite = other_bodies(Other("polite", BARE, (10, 20)))
    sent = [next(hostile) for _ in range(8)]
    assert [kind for kind, _ in sent].count("rate 1.01") == 2
    wanted = [json.loads(next(polite)[1]) for _ in range(2)]
    found = [json.loads(body) for kind, body in sent if kind == "rate 1.01"]
    assert [b["input_ids"] for b in found] == [b["input_ids"] for b in wanted]
    assert "custom_params" not in wanted[0]["sampling_params"]
    refused = other_bodies(Other("refused only", BARE, (10, 20)))
    assert "rate 1.01" not in {next(refused)[0] for _ in range(50)}


def test_phases() -> None:
    words = ["--hostile-itl", "--stream-len", "5", "9", "--stream-tokens", "3"]
    args = parse_arguments(None, words)
    set_device_defaults(args, gpu=False)
    phase = Phase(args, BARE, "")
    assert phase.job(1, 2) == phase.job(1, 2) != phase.job(2, 2)
    times = [0.5, 0.6, 0.8, 9.0]
    phase.outcomes = [Outcome(phase.job(0, 0), answer(begin=0.1, times=times), OK)]
    # What comes after the phase's time does not count.
    row = summarize(phase, begin=0.0, seconds=2.0)
    assert (row["gaps"], row["max_ms"], row["first_token_ms"]) == (2, 200, 400)
    slow = {**row, "p99_ms": 2 * row["p99_ms"], "sent": {"400 rate zero": 7}}
    phases = {"alone": row, "hostile": slow, "polite": row, "alone again": row}
    table = format_phases({"phases": phases, "failed": 0, "failures": []})
    assert "2.000" in table and "1.000" in table and "400 rate zero" in table


def test_stock_is_sent_nothing_that_only_we_know() -> None:
    """Same requests otherwise: neither our options nor wrong ones."""
    ours, stock = load(), load(stock=True)
    jobs = [stock.job(i) for i in range(SHAPE.requests)]
    assert not any(b"kv_compress" in job.encoded() for job in jobs)
    assert not any(job.kind.startswith("hostile") for job in jobs)
    assert sum(job.act == "abort" for job in jobs) == SHAPE.aborts
    assert any(b"kv_compress" in ours.job(i).encoded() for i in range(20))


def test_stock_server_has_no_flag_of_ours() -> None:
    ours = server_command("m", 1, True, pool=1000)
    stock = server_command("m", 1, True, pool=1000, stock=True)
    assert [w for w in ours if w not in stock] == ["--kv-compress"]
