"""`tools.advise`: the file, the statistics, the table and the sentence; no server."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_kvc.tools.advise import __main__ as command
from sglang_kvc.tools.advise import forced, plot
from sglang_kvc.tools.advise.advice import MIN_PROMPTS, advise
from sglang_kvc.tools.advise.asking import FULL, Asker, Run
from sglang_kvc.tools.advise.bootstrap import Estimate, retention
from sglang_kvc.tools.advise.prompts import Prompt, PromptsError, read_prompts
from sglang_kvc.tools.advise.report import table
from sglang_kvc.tools.advise.scores import (
    contains,
    exact,
    leading,
    likelihood,
    rouge_l,
)
from sglang_kvc.tools.advise.server import ServerError
from sglang_kvc.tools.advise.speed import measure
from sglang_kvc.tools.advise.summary import Row, main_score, rows_of

# The file -----------------------------------------------------------------------------


def test_prompts_are_read_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "Hello"}]
    lines = [
        {"prompt": "a"},
        {"messages": chat, "reference": "x"},
        {"prompt": "b", "reference": ["y", "z"]},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_prompts(path) == [
        Prompt(1, "a"),
        Prompt(3, None, chat, ("x",)),
        Prompt(5, "b", None, ("y", "z")),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "must be an object .*got list"),
        ('{"promt": "a"}', "unknown key 'promt'; valid: messages, prompt, reference"),
        ("{}", 'give "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', "one of them"),
        ('{"prompt": ""}', "not empty"),
        ('{"prompt": 3}', "must be a text"),
        ('{"messages": []}', '"role" and "content"'),
        ('{"messages": [{"role": "user"}]}', '"role" and "content"'),
        ('{"prompt": "a", "reference": []}', '"reference" must be'),
        ('{"prompt": "a", "reference": ["b", 1]}', '"reference" must be'),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(PromptsError, match=message) as error:
        read_prompts(path)
    assert f"{path}, line 2: " in str(error.value)


def test_no_file_and_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match="cannot read"):
        read_prompts(tmp_path / "missing")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(PromptsError, match="no prompts"):
        read_prompts(tmp_path / "empty")


# Scores of one answer -----------------------------------------------------------------


def test_scores() -> None:
    assert contains("It was the Red Fox.", ["red fox", "x"]) == 1
    assert contains("It was a redfox", ["red fox"]) == 0
    assert exact("The red fox!", ["red fox"]) == 1
    assert exact("The red fox ran", ["red fox"]) == 0
    # "red ran" of "red fox ran far" and "red dog ran": 2 * 2 / (4 + 3).
    assert rouge_l("red fox ran far", ["red dog ran", "q"]) == pytest.approx(4 / 7)
    assert rouge_l("", ["x"]) == 0
    assert leading([1, 2, 3, 9], [1, 2, 4, 9]) == 0.5
    assert leading([1, 2], [1, 2, 3, 4]) == 0.5
    assert leading([1, 2, 3], [1, 2]) == 1
    assert leading([], []) == 1
    assert likelihood([math.log(0.5), math.log(0.125)]) == pytest.approx(0.25)


# Intervals ----------------------------------------------------------------------------


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Drawn scores, of which 80 % are kept: 95 % of the intervals have it."""
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        full = draw.uniform(0.5, 1, 30)
        found = retention(full * draw.uniform(0.6, 1, 30), full)
        assert found is not None
        hits += found.low <= 80 <= found.high
    assert 53 <= hits < 60


def test_retention_is_of_pairs() -> None:
    """What varies in both alike is no uncertainty, and the same draws come again."""
    full = np.random.default_rng(2).uniform(0, 1, 30)
    found = retention(0.9 * full, full)
    assert found is not None
    assert (found.low, found.value, found.high) == pytest.approx((90, 90, 90))
    assert found.count == 30
    noisy = np.random.default_rng(3).uniform(0, 1, 30)
    assert retention(noisy, full) == retention(noisy, full)
    assert retention([], []) is None
    assert retention([1.0], [0.0]) is None


# The sentence -------------------------------------------------------------------------


def row(rate: float, low: float, high: float, count: int = 20, **more: Any) -> Row:
    kept = {"rouge_l": Estimate((low + high) / 2, low, high, count)}
    values = {"resident": 1000 / rate, "logical": 1000.0, **more}
    return Row(rate, kept, {"rouge_l": 0.4}, 0.5, -0.7, **values)


WHOLE = row(FULL, 100, 100)


def test_the_highest_rate_within_the_tolerance() -> None:
    rows = [WHOLE, row(2, 99, 101), row(8, 96, 100), row(16, 85, 97)]
    assert advise(rows, "rouge_l", 5) == (
        "Rate 8 keeps 98 % [96, 100] of the full cache's score (rouge-l) on these 20 "
        "prompts; rate 16 loses 9 points [3, 15]. Advice: 8."
    )
    assert advise(rows, "rouge_l", 15).endswith(
        "(rouge-l) on these 20 prompts. Advice: 16."
    )
    assert "Advice: 2." in advise(rows, "rouge_l", 2)


def test_a_gain_is_no_loss() -> None:
    rows = [WHOLE, row(2, 99, 101), row(4, 90, 120)]
    assert "rate 4 gains 5 points [-10, 20]. Advice: 2." in advise(rows, "rouge_l", 5)


def test_what_it_cannot_tell() -> None:
    wide = advise([WHOLE, row(2, 80, 110)], "rouge_l", 5)
    assert "Cannot tell: the interval allows a loss of more than 5 %" in wide
    few = advise([WHOLE, row(2, 99, 101, MIN_PROMPTS - 1)], "rouge_l")
    assert few.startswith(f"Cannot tell from {MIN_PROMPTS - 1} prompts")
    nothing = advise([WHOLE, row(2, 100, 100, resident=1000.0)], "rouge_l")
    assert "nothing was evicted" in nothing
    zero = Row(2, {"rouge_l": None}, {"rouge_l": 0.0}, 0, -1, 500, 1000)
    assert "scores 0 (rouge-l)" in advise([WHOLE, zero], "rouge_l")
    assert "Give --rates" in advise([WHOLE], "rouge_l")


def test_a_loss_that_is_certain() -> None:
    said = advise([WHOLE, row(2, 60, 80), row(4, 40, 60)], "rouge_l", 5)
    assert said.endswith("more than 5 % are lost. Advice: do not compress.")


def test_rates_that_the_smallest_budget_makes_equal() -> None:
    rows = [WHOLE, row(8, 99, 101), row(16, 99, 101, resident=120.0)]
    said = advise(rows, "rouge_l", 5)
    assert "Advice: 16. It keeps as many tokens as rate 8 here" in said


# Asking -------------------------------------------------------------------------------


def dictated(tokens: list[int], logprob: float, late: bool) -> dict[str, Any]:
    """What a server sends that was given an answer, every token as likely."""
    top = [[-0.3, 0, None], [-0.3 - forced.SHIFT + logprob, -1, None]]
    kv = {"deferred_passes": int(late)}
    tops = [[[top[0][0], token, None], top[1]] for token in tokens]
    meta = {"kv_compress": kv, "output_top_logprobs": tops}
    return {"output_ids": tokens, "meta_info": meta}


class Fake:
    """A server whose answers lose a token for each doubling of the rate.

    It answers in whatever order; under load some passes are late, and keep more.
    """

    def __init__(self, late: bool = False, refuses: str = "") -> None:
        self.late, self.refuses = late, refuses
        self.bodies: list[dict[str, Any]] = []
        self.running, self.lock = 0, threading.Lock()

    def tokens_of(self, prompt: Prompt) -> list[int]:
        assert prompt.prompt
        return [ord(letter) for letter in prompt.prompt]

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.running += 1
            self.bodies.append(body)
            crowded = self.running > 1
        try:
            return self.answer(body, crowded)
        finally:
            with self.lock:
                self.running -= 1

    def answer(self, body: dict[str, Any], crowded: bool) -> dict[str, Any]:
        time.sleep(random.random() / 500)
        ids, params = body["input_ids"], body["sampling_params"]
        kv = params["custom_params"]["kv_compress"]
        if self.refuses and chr(ids[0]) == self.refuses:
            raise ServerError("HTTP 400: too long")
        rate = kv.get("rate", 1)
        late = self.late and crowded and rate > 1
        if (given := params["custom_params"].get(forced.KEY)) is not None:
            return dictated(given, -rate, late)
        good = 6 - int(math.log2(1 if late else rate))
        tokens = [ids[0] + i if i < good else 0 for i in range(6)]
        top = [
            [[-1.0, token, None], [-2.0, ids[0] + i, None]]
            for i, token in enumerate(tokens)
        ]
        return {
            "text": " ".join(map(str, tokens)),
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": {"type": "length"},
                "kv_compress": {
                    "logical_tokens": 100,
                    "resident_tokens": 100 // rate,
                    "deferred_passes": int(late),
                },
                "output_token_logprobs": [[-1.0, token, None] for token in tokens],
                "output_top_logprobs": top,
            },
        }


PROMPTS = [Prompt(n, chr(97 + n) * 9, None, (f"{97 + n} {98 + n}",)) for n in range(12)]


def ask(fake: Fake, concurrency: int, rates: tuple[float, ...] = (2, 8)) -> Run:
    asker = Asker(fake, concurrency=concurrency, max_new_tokens=6, dictates=False)  # type: ignore[arg-type]
    return asker.run(PROMPTS, rates)


def test_numbers_do_not_depend_on_the_concurrency() -> None:
    alone = ask(Fake(late=True), 1)
    for _ in range(3):
        crowd = ask(Fake(late=True), 6)
        assert crowd.answers == alone.answers
        assert rows_of(crowd, {}) == rows_of(alone, {})
    by_rate = {row.rate: row for row in rows_of(alone, {})}
    assert by_rate[FULL].equal == 1
    assert by_rate[8].means["agreement"] == pytest.approx(0.5)
    assert by_rate[8].resident == 12
    # Up to the first other token, without the one before any eviction.
    assert [len(answer.logprobs) for answer in alone.answers[8]] == [3] * 12
    assert by_rate[8].logprob == pytest.approx((-1 - 1 - 2) / 3)
    assert by_rate[8].kept["likelihood"].value == pytest.approx(  # type: ignore[union-attr]
        100 * math.exp(-4 / 3) / math.exp(-1)
    )
    assert main_score("auto", PROMPTS) == "contains"
    assert by_rate[8].means["contains"] == 1


@pytest.mark.parametrize("concurrency", [1, 6])
def test_answers_are_dictated_where_the_server_lets(
    monkeypatch: pytest.MonkeyPatch, concurrency: int
) -> None:
    monkeypatch.setattr(forced, "processor", lambda: "it")
    fake = Fake(late=True)
    asker = Asker(fake, concurrency=concurrency, max_new_tokens=6, dictates=True)  # type: ignore[arg-type]
    run = asker.run(PROMPTS, (2, 8))
    assert run.dictated
    # Whole answers but for the token before any eviction, the full cache's beside them.
    for answer in run.answers[8]:
        assert answer.logprobs == pytest.approx([-8] * 5)
    assert {tuple(a.full_logprobs) for a in run.answers[8]} == {(-1,) * 5}
    assert {a.deferred for answers in run.answers.values() for a in answers} == {0}
    giving = [b for b in fake.bodies if "custom_logit_processor" in b]
    assert {b["sampling_params"]["max_new_tokens"] for b in giving} == {6}
    assert all(b["sampling_params"]["ignore_eos"] for b in giving)


def test_a_refused_prompt_is_left_out_everywhere() -> None:
    run = ask(Fake(refuses="c"), 4)
    assert run.left_out == ["line 2: HTTP 400: too long"]
    assert {len(answers) for answers in run.answers.values()} == {11}
    assert all(a.line != 2 for answers in run.answers.values() for a in answers)


def test_no_prompt_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(refuses="c")
    asker = Asker(fake, concurrency=1, max_new_tokens=6, dictates=False)  # type: ignore[arg-type]
    with pytest.raises(ServerError, match="no prompt was served: line 2: HTTP 400"):
        asker.run(PROMPTS[2:3], [2])


def test_speed_rounds_share_no_prefix_and_decode_as_much() -> None:
    run, fake = ask(Fake(), 4), Fake()
    speeds = measure(fake, run, (2, 8), 4)  # type: ignore[arg-type]
    assert list(speeds) == [FULL, 2, 8]
    assert all(speed > 0 for speed in speeds.values())
    timed = fake.bodies[1:]
    assert len(timed) == 36
    keys = [body["extra_key"] for body in timed]
    assert [len(set(keys[i : i + 12])) for i in (0, 12, 24)] == [1, 1, 1]
    assert len(set(keys)) == 3
    params = [body["sampling_params"] for body in timed]
    assert {(p["max_new_tokens"], p["ignore_eos"]) for p in params} == {(6, True)}


# Given answers ------------------------------------------------------------------------


def test_the_dictator_tells_what_the_model_thought() -> None:
    torch = pytest.importorskip("torch")
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 4
    before = logits.log_softmax(-1)

    class Req:
        origin_input_ids = (1, 2, 3)

        def __init__(self, at: int) -> None:
            # Both generations of SGLang.
            self.kv_committed_len = 3 + at
            self.kv = self

    given = [7, 49, 11]
    params = [{forced.KEY: given, "__req__": Req(at)} for at in (0, 1, -2)]
    after = forced.Dictator()(logits.clone(), params)
    # The third is in the middle of its prompt.
    assert torch.equal(after[2], logits[2])
    assert after.argmax(-1).tolist()[:2] == [7, 49]
    tops = []
    for place in range(2):
        best = after[place].log_softmax(-1).topk(2)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        tops.append([[value, token, None] for value, token in pairs])
    output = {"output_ids": [7, 49], "meta_info": {"output_top_logprobs": tops}}
    found = forced.logprobs_of(output, [7, 49])
    assert found == pytest.approx([before[0, 7].item(), before[1, 49].item()], abs=1e-4)
    with pytest.raises(ServerError, match="did not follow"):
        forced.logprobs_of(output, [7, 48])


# What is shown ------------------------------------------------------------------------


def test_the_table() -> None:
    text = table(rows_of(ask(Fake(), 4), {FULL: 10.0, 2.0: 12.34}), dictated=False)
    lines = text.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1, "columns stand below each other"
    assert lines[0].split()[:3] == ["rate", "tokens", "kept"]
    assert lines[1].split()[0] == "full"
    assert lines[2].split()[-1] == "12.3"
    assert lines[3].split()[-1] == "-"
    assert "up to the first other token" in text
    assert "contains 100.0" in text


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.draw(rows_of(ask(Fake(), 4), {}), 5, "fake", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    (tmp_path / "p").write_text('{"prompt": "a"}\n')
    words = ["--prompts", str(tmp_path / "p"), "--plot", str(tmp_path / "a.png")]
    assert command.main(words) == 1
    assert "sglang_kvc[plot]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rates", "2,x"], "rates of at least 1 with commas"),
        (["--rates", "0.5"], "rates of at least 1"),
        (["--concurrency", "0"], "must be a number above 0"),
        (["--tolerance", "101"], "must be from 0 to 100"),
    ],
)
def test_a_wrong_argument(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["--prompts", "p", *words])
    assert message in capsys.readouterr().err


def test_errors_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p"
    path.write_text('{"prompt": "a"}\n')
    assert command.main(["--prompts", str(path), "--score", "exact"]) == 1
    assert 'needs a "reference" in every line; line 1' in capsys.readouterr().err
    nobody = ["--url", "http://127.0.0.1:9", "--prompts", str(path)]
    assert command.main(nobody) == 1
    assert "Is the server running there?" in capsys.readouterr().err
