"""`lost`: what a request would hold, step by step, and what it does not find."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.quality.scouts.lost import binned, parser
from bench.quality.scouts.lost_course import HeldTokens, Step, choose_later
from bench.quality.scouts.lost_report import curve, draw, table
from bench.quality.scouts.simulate_choice import SINKS
from bench.quality.systems import parse_setting
from tests.engine.oracle.choice import Rule, choose

LAYERS, HEADS = 3, 2
TOTAL = LAYERS * HEADS
PROMPT, STEPS = 600, 300


def scores_of(length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(TOTAL, length, generator=generator) ** 4


@pytest.mark.parametrize("allocation", ["joint", "layer", "head"])
@pytest.mark.parametrize("protected", [32, 100])
def test_the_choice_is_the_oracles(allocation: str, protected: int) -> None:
    """Twice, so that heads hold unequally many the second time."""
    groups = {"joint": 1, "layer": LAYERS, "head": TOTAL}[allocation]
    held = torch.ones(TOTAL, 500, dtype=torch.bool)
    budget = 256
    for length in (500, 600):
        held = torch.cat([held, held.new_ones(TOTAL, length - held.shape[1])], 1)
        fold, scores = length // 16 * 16, scores_of(length, length)
        competing = [row.nonzero().flatten().tolist() for row in held[:, :fold]]
        rule = Rule(budget, LAYERS, allocation, 0, 0, SINKS, protected)
        expected = choose(scores, competing, rule)
        evict = sum(map(len, competing)) // 16 - budget // 16 * TOTAL
        held = choose_later(
            scores,
            held,
            fold=fold,
            protected=length - protected,
            evict=evict,
            groups=groups,
        )
        kept = [row.nonzero().flatten().tolist() for row in held[:, :fold]]
        assert kept == expected.kept
        assert held[:, fold:].all()


def follow(word: str) -> tuple[HeldTokens, list[Step]]:
    """An answer whose queries look at everything alike."""
    course = HeldTokens(parse_setting(word), scores_of(PROMPT), LAYERS)
    steps = []
    for length in range(PROMPT + 1, PROMPT + STEPS + 1):
        probs = torch.full((TOTAL, 2, length), 1 / length)
        steps.append(course.decode(probs, torch.ones(TOTAL, length)))
        assert steps[-1].prompt + steps[-1].answer <= course.state.resident(length) + 64
    return course, steps


@pytest.mark.parametrize("word", ["4", "b128", "4+96", "b128+400"])
def test_as_much_is_held_as_a_server_holds(word: str) -> None:
    course, steps = follow(word)
    held = course.held.sum().item() / TOTAL
    assert held == course.state.resident(PROMPT + STEPS)
    for at, step in enumerate(steps, 1):
        # Everything is looked at alike: what is lost are the tokens that are not there.
        all_behind = PROMPT + at - SINKS
        assert step.to_answer == pytest.approx(at / all_behind, rel=1e-4)
        lost = PROMPT - step.prompt
        assert step.evicted_prompt == pytest.approx(lost / all_behind, rel=1e-3)
        lost = at - step.answer
        assert step.evicted_answer == pytest.approx(lost / all_behind, abs=1e-5)


def test_an_answer_with_a_share_of_its_own_is_whole() -> None:
    course, steps = follow("b128+400")
    assert course.state.passes == 1
    assert all(step.evicted_answer == 0 for step in steps)
    assert len({step.prompt for step in steps}) == 1
    plain, lost = follow("b128")
    assert plain.state.passes > 3
    assert lost[-1].evicted_answer > 0 and lost[-1].prompt < steps[-1].prompt


def test_a_setting_without_passes_loses_nothing() -> None:
    course, steps = follow("b2048")
    assert not course.state.passes
    assert all(step.evicted_prompt == step.evicted_answer == 0 for step in steps)


def lines() -> list[dict[str, object]]:
    short = [Step(0.2, 0.0, 0.1, 100, 16)] * 32
    long = [*short, *[Step(0.4, 0.2, 0.5, 80, 20)] * 40]
    return [
        {"task": "a", "setting": setting, "index": i, **binned(steps)}
        for setting in ("8", "8+64")
        for i, steps in enumerate((short, long))
    ]


def test_steps_are_binned_and_answers_are_as_long_as_they_are() -> None:
    own = [line for line in lines() if line["setting"] == "8"]
    assert own[1]["evicted_prompt"] == [0.2, 0.4, 0.4]
    assert curve(own, "evicted_prompt") == [0.2, 0.4, 0.4]
    rows = table(lines()).splitlines()[2:]
    assert rows == [
        "| a | 8 | 2 | 0 to 64 | 30.0 | 10.0 | 30.0 | 90 | 18 |",
        "| a | 8 | 2 | 64 to 128 | 40.0 | 20.0 | 50.0 | 80 | 20 |",
        "| a | 8+64 | 2 | 0 to 64 | 30.0 | 10.0 | 30.0 | 90 | 18 |",
        "| a | 8+64 | 2 | 64 to 128 | 40.0 | 20.0 | 50.0 | 80 | 20 |",
    ]


def test_a_plot_a_task(tmp_path: Path) -> None:
    (path,) = draw(lines(), tmp_path / "plots")
    assert path.name == "lost_a.png" and path.stat().st_size > 1000


def test_long_tasks_can_be_asked() -> None:
    words = [
        "--model",
        "m",
        "--tasks",
        "squality",
        "math_long",
        "gsm8k_steps",
        "--out",
        "x",
    ]
    args = parser().parse_args([*words, "--settings", "8+512"])
    assert args.settings == ["8+512"] and args.seed % 2 == 1
    with pytest.raises(SystemExit):
        parser().parse_args(["--model", "m", "--tasks", "later_qa", "--out", "x"])
