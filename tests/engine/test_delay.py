"""A first pass that has waited for its answer keeps what the oracle keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_kvc.config.pages import ceil_tokens, floor_tokens
from tests.engine import warm
from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.oracle import TIE, Oracle, Step, check_few_differ
from tests.engine.texts import prompt
from tests.engine.tracer import PassTracer, shares

PROMPT = 333
INTERVAL = 16
LATER = 2
"""Passes behind the first."""


@pytest.mark.parametrize("kv", [{"budget": 80}, {"rate": 4, "answer": 32}], ids=str)
@pytest.mark.parametrize("delay", [16, 32, 70])
def test_kept_positions_equal_the_oracle(
    fresh: InProcessScheduler, model_path: str, delay: int, kv: dict[str, int]
) -> None:
    """With fewer decoded tokens than queries, with as many, and with tokens to lose."""
    runtime = fresh.allocator.get_kvcache().runtime
    ids, answer = prompt(model_path, 11_000, PROMPT), kv.get("answer", 0)
    most = delay + answer + (LATER + 1) * INTERVAL
    asked = {**kv, "delay": delay, "report_tokens": True}
    with PassTracer(runtime) as tracer:
        out = fresh.serve([Request("x", ids, most, kv=asked)])["x"]
    ((slot, passes),) = tracer.kept.items()
    lengths = tracer.lengths[slot]
    assert lengths[0] == PROMPT + delay
    assert len(lengths) >= LATER
    assert lengths[-1] - lengths[-2] == INTERVAL or len(lengths) == LATER

    steps = []
    for length in lengths:
        grown = floor_tokens(length) - floor_tokens(PROMPT)
        others = max(PROMPT, length - answer)
        budget = kv.get("budget", max(-(-others // kv.get("rate", 1)), 64))
        protected = max(min(length - PROMPT, answer), runtime.options.protected)
        steps.append(
            Step(
                length,
                budget=ceil_tokens(budget) + min(grown, answer),
                protected=protected,
                first=length == lengths[0],
            )
        )
    oracle = Oracle(model_path, runtime.options)
    differing = oracle.request(ids, slot=slot).replay(out.ids, steps, passes, 0, TIE)
    total = sum(step.budget for step in steps) * oracle.layers * oracle.heads
    check_few_differ(differing, total)
    assert out.kv[-1]["prompt_token_shares"] == shares(passes[-1], PROMPT)
    # Of what was decoded some competes: what is neither protected nor the answer's.
    competing = set(range(PROMPT, floor_tokens(lengths[0] - steps[0].protected)))
    lost = any(competing - set(positions) for positions in passes[0])
    assert lost == bool(competing)


def test_until_then_nothing_is_missing(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """What it says is what the full cache says; what is kept then is another choice."""
    ids, delay = prompt(model_path, 12_000, PROMPT), 24

    def said(kv: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """The output, and the log-probability of the first token at each step."""
        out = fresh.serve([Request("x", ids, 60, kv=kv, top_logprobs=1)])["x"]
        return out, torch.tensor([step[0][0] for step in out.top_logprobs])

    asked = {"budget": 64, "report_tokens": True}
    late, told_late = said({**asked, "delay": delay})
    early, told_early = said(asked)
    _, told_whole = said({"enabled": False})
    # The step that carries the pass has still attended to all.
    apart = (told_late - told_whole).abs()
    assert apart[: delay + 1].max() < 1e-4 < 1e-3 < apart[delay + 1]
    assert (told_early - told_whole).abs()[1] > 1e-3
    told = late.kv[-1]
    assert 0 < told["passes"] < early.kv[-1]["passes"]
    assert told["peak_resident_tokens"] == PROMPT + delay
    mean = sum(range(PROMPT + 1, PROMPT + delay + 1)) / 60
    assert told["mean_resident_tokens"] > mean
    # Compared to one that has seen the prompt only, over the same tokens.
    asked = {"budget": 64, "report_tokens": True}
    other = fresh.serve([Request("o", ids, 1, kv=asked)])["o"].kv[-1]
    assert other["prompt_token_shares"] != told["prompt_token_shares"]


def test_an_answer_that_ends_before_keeps_everything(
    fresh: InProcessScheduler, model_path: str
) -> None:
    ids = prompt(model_path, 13_000, PROMPT)
    whole = fresh.serve([Request("w", ids, 40, kv={"enabled": False})])["w"].ids
    end = next(i for i in range(5, 40) if whole[i] not in whole[:i])
    stop = [whole[end]]
    kv = {"budget": 64, "delay": 40}
    out = fresh.serve([Request("x", ids, 60, kv=kv, stop=stop, ignore_eos=False)])["x"]
    assert out.ids == whole[: end + 1]
    told = out.kv[-1]
    assert told["passes"] == 0
    assert told["resident_tokens"] == told["logical_tokens"]
    assert told["budget_tokens"] == 64


@pytest.mark.parametrize(
    ("kv", "most"),
    [({"budget": 1 << 20}, 60), ({"rate": 1}, 60), ({"budget": PROMPT + 99}, 60)],
    ids=str,
)
def test_with_a_budget_of_all_tokens_nothing_changes(
    fresh: InProcessScheduler, model_path: str, kv: dict[str, int], most: int
) -> None:
    ids = prompt(model_path, 14_000, PROMPT)
    whole = fresh.serve([Request("w", ids, most, kv={"enabled": False})])["w"]
    out = fresh.serve([Request("x", ids, most, kv={**kv, "delay": 32})])["x"]
    assert out.ids == whole.ids
    assert out.kv[-1]["passes"] == 0


def test_an_answer_too_short_to_wait_for_does_not_wait(
    fresh: InProcessScheduler, model_path: str
) -> None:
    ids, kv = prompt(model_path, 15_000, PROMPT), {"budget": 64, "delay": 32}
    runtime = fresh.allocator.get_kvcache().runtime
    for most, first in ((32, PROMPT), (33, PROMPT + 32)):
        with PassTracer(runtime) as tracer:
            fresh.serve([Request("x", ids, most, kv=kv)])
        (lengths,) = tracer.lengths.values()
        assert lengths[0] == first


def test_a_crowd_that_does_not_fit_whole_is_answered(tmp_path: Path) -> None:
    """Strict checks and audits are on; see `delayed_crowd`."""
    target = tmp_path / "report.json"
    log = warm.run("tests.engine.delayed_crowd", target, log=tmp_path / "log")
    assert target.exists(), log
    report: dict[str, Any] = json.loads(target.read_text())
    assert "traceback" not in report, report["traceback"]
    late, plain = report["delay"], report["plain"]
    for counts in (late, plain):
        assert counts["answered"] == counts["requests"]
        # The first passes, and later ones: all were compressed.
        assert counts["fewest_passes"] >= 1
    # Prompts are whole for a while, so fewer run at a time; but they do run together.
    assert 1 < late["most_running"] < plain["most_running"]
    assert late["most_waiting_to_pass"] > 1
    assert late["audits"] > 40
