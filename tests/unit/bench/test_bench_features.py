"""bench.features without a server: adapters, what is read, verdicts, the record."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.common.server import Server
from bench.features import __main__ as command
from bench.features import end_checks, lora_checks, parser_checks, structured_checks
from bench.features.adapters import MODULES, RANK, STRENGTH, lora_flags, write_adapter
from bench.features.args import parse_arguments
from bench.features.asking import Asker, Reply, Sizes, custom, read_stream
from bench.features.compressed import expect_compressed
from bench.features.verdicts import (
    LONGEST,
    Check,
    MissedError,
    Verdict,
    expect,
    judge_all,
    summary,
)

CONFIG = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
}
OUTPUT = 32
SIZES = Sizes(short=100, middle=200, beyond=600, output=4)
KV = {"enabled": True, "passes": 1, "resident_tokens": 250.0, "logical_tokens": 1000}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


# Adapters -----------------------------------------------------------------------------


def test_an_adapter_has_pefts_names_and_shapes(tmp_path: Path, model: Path) -> None:
    place = write_adapter(tmp_path, model, "one")
    about = json.loads((place / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"]) == ("LORA", RANK)
    assert set(about["target_modules"]) == set(MODULES)
    written = load_file(place / "adapter_model.safetensors")
    assert len(written) == 2 * len(MODULES) * CONFIG["num_hidden_layers"]
    layer = "base_model.model.model.layers.1.self_attn."
    outputs = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 24}
    for name, count in outputs.items():
        inputs = 32 if name == "o_proj" else 24
        assert written[f"{layer}{name}.lora_A.weight"].shape == (RANK, inputs)
        assert written[f"{layer}{name}.lora_B.weight"].shape == (count, RANK)


def test_an_adapter_changes_something_and_two_are_not_alike(
    tmp_path: Path, model: Path
) -> None:
    files = [write_adapter(tmp_path, model, name) for name in lora_checks.NAMES]
    one, two = (load_file(place / "adapter_model.safetensors") for place in files)
    for name, weight in one.items():
        assert weight.abs().max() > 0.01
        assert (weight != two[name]).any()


def test_an_adapter_may_be_stronger(tmp_path: Path, model: Path) -> None:
    weak, strong = (
        load_file(
            write_adapter(tmp_path / str(by), model, "one", by)
            / "adapter_model.safetensors"
        )
        for by in (STRENGTH, 2 * STRENGTH)
    )
    for name, weight in weak.items():
        times = 2 if "lora_B" in name else 1
        assert torch.equal(strong[name], times * weight)
    assert parse_arguments("", []).lora_strength == STRENGTH
    assert parse_arguments("", ["--lora-strength", "4"]).lora_strength == 4


def test_flags_name_every_adapter() -> None:
    flags = lora_flags({"one": Path("/a/one"), "two": Path("/a/two")}, gpu=True)
    assert flags[-3:] == ["--lora-paths", "one=/a/one", "two=/a/two"]
    assert flags[flags.index("--max-loras-per-batch") + 1] == "3"
    assert flags[flags.index("--max-lora-rank") + 1] == str(RANK)
    assert flags[flags.index("--lora-backend") + 1] == "csgmv"


# Asking -------------------------------------------------------------------------------


def test_lengths_follow_the_pool_and_the_context() -> None:
    sizes = Sizes.of(6144, 32768)
    assert (sizes.short, sizes.middle, sizes.beyond) == (1536, 2764, 9216)
    assert Sizes.of(6144, 8000).beyond < 8000 - 2 * sizes.output


def asker(said: Any, stock: bool = False) -> tuple[Asker, list[Any]]:
    """One whose server always says the same, and what it was asked."""
    asked: list[Any] = []

    class Played(Server):
        def get(self, path: str, timeout: float = 60, post: bytes | None = None) -> Any:
            asked.append((path, json.loads(post or b"{}")))
            return said

    played = Played("http://nowhere")
    return Asker(played, SIZES, seed=0, wait=1, stock=stock), asked


NATIVE = {
    "text": "words",
    "output_ids": [1, 2, 3, 4],
    "meta_info": {
        "cached_tokens": 96,
        "prompt_tokens": 100,
        "kv_compress": KV,
        "finish_reason": {"type": "length"},
    },
}


def test_a_native_question_says_its_rate_and_its_adapter() -> None:
    one, asked = asker(NATIVE)
    reply = one.generate("hello", adapter="two", regex="a+")
    path, body = asked[0]
    assert (path, body["lora_path"]) == ("/generate", "two")
    assert body["sampling_params"]["custom_params"] == {"kv_compress": {"rate": 4}}
    assert body["sampling_params"]["regex"] == "a+"
    assert (reply.ids, reply.cached, reply.kv) == ([1, 2, 3, 4], 96, KV)
    one.generate("hello", rate=None)
    assert "lora_path" not in asked[1][1]
    assert custom(None) == {"kv_compress": {"enabled": False}}


def test_stock_sglang_is_asked_for_nothing_of_ours() -> None:
    one, asked = asker(NATIVE, stock=True)
    one.generate("hello", adapter="two")
    one.generate("hello", rate=None)
    with pytest.raises(MissedError, match="no summary"):
        parser_checks.tool_call(
            asker(stream_of(LAMP, finish="tool_calls"), stock=True)[0], "required", True
        )
    chat, asked_chat = asker({"choices": []}, stock=True)
    chat.chat("hello")
    for _, body in [*asked, *asked_chat]:
        assert "kv_compress" not in json.dumps(body)
        assert "custom_params" not in json.dumps(body)
    assert asked[0][1]["lora_path"] == "two"


def test_prompts_are_never_the_same() -> None:
    one, _ = asker(NATIVE)
    assert len({one.text(30) for _ in range(20)}) == 20


def stream_of(*deltas: dict[str, Any], finish: str) -> str:
    events: list[dict[str, Any]] = [{"choices": [{"delta": d}]} for d in deltas]
    events.append({"choices": [{"delta": {}, "finish_reason": finish}]})
    usage = {"usage": {"prompt_tokens": 1000}, "metadata": {"kv_compress": [KV]}}
    events.append({"choices": [], **usage})
    return "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"


def call(**function: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": function}]}


LAMP = call(name="set_lamp", arguments='{"colour": "red", "bright": false}')


def test_a_streamed_call_is_joined_and_judged() -> None:
    parts = '{"colour": "green",', ' "bright": true}'
    said = stream_of(
        call(name="set_lamp", arguments=""),
        *(call(arguments=part) for part in parts),
        finish="tool_calls",
    )
    reply = read_stream(said)
    assert reply.tools == [("set_lamp", "".join(parts))]
    assert (reply.finish, reply.prompt, reply.kv) == ("tool_calls", 1000, KV)
    one, asked = asker(said)
    assert "set_lamp" in parser_checks.tool_call(one, "required", stream=True)
    assert asked[0][1]["stream"] and asked[0][1]["tool_choice"] == "required"


def test_an_error_in_a_stream_is_told() -> None:
    with pytest.raises(ValueError, match="no room"):
        read_stream('data: {"error": {"message": "no room"}}\n\n')


# What is judged -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, True),
        ({"passes": 0}, False),
        ({"enabled": False}, False),
        ({"resident_tokens": 600.0}, False),
    ],
)
def test_what_counts_as_compressed(change: dict[str, Any], passes: bool) -> None:
    reply = Reply(kv={**KV, **change})
    one, _ = asker(NATIVE)
    if passes:
        assert "250 of 1000" in expect_compressed(one, reply, 4)
        return
    with pytest.raises(MissedError, match="kept after a pass"):
        expect_compressed(one, reply, 4)


def test_an_answer_without_a_summary_is_not_compressed() -> None:
    with pytest.raises(MissedError, match="a summary"):
        expect_compressed(asker(NATIVE)[0], Reply(), 4)
    stock, _ = asker(NATIVE, stock=True)
    assert expect_compressed(stock, Reply(), 4) == "not compressed"
    with pytest.raises(MissedError, match="no summary"):
        expect_compressed(stock, Reply(kv=KV), 4)


def test_what_obeys_the_schema() -> None:
    good = {"colour": "red", "good": False, "tags": ["one", "one"]}
    assert structured_checks.obeys(good)
    for wrong in ({"colour": "pink"}, {"good": 1}, {"tags": ["one"]}, {"more": 1}):
        assert not structured_checks.obeys({**good, **wrong})
    assert not structured_checks.obeys([good])


@pytest.mark.parametrize(
    ("delta", "passes"),
    [
        ({"reasoning_content": "some thought", "content": "YES."}, True),
        ({"content": "<think>some thought</think>YES."}, False),
        ({"reasoning_content": "<think>some thought</think>YES."}, False),
    ],
)
def test_thought_and_content_have_to_be_apart(
    delta: dict[str, Any], passes: bool
) -> None:
    one, _ = asker(stream_of(delta, finish="stop"))
    if passes:
        assert "some thought" in parser_checks.reasoning(one, stream=True)
        return
    with pytest.raises(MissedError, match="apart"):
        parser_checks.reasoning(one, stream=True)


def reply_of(*ids: int, **fields: Any) -> Reply:
    """An answer, and at each token the two likeliest."""
    tops = [frozenset((token, 100 + token)) for token in ids]
    return Reply(ids=list(ids), tops=tops, kv=KV, **fields)


class Works:
    """Plays a server with adapters: answers of their own, prefixes by work.

    Parameters
    ----------
    shared : whether all take one another's prefixes.
    swapped : whether two of a batch get each other's answer.
    """

    stock = False

    def __init__(self, shared: bool = False, swapped: bool = False) -> None:
        self.sizes, self.shared, self.swapped = SIZES, shared, swapped
        self.seen: set[str | None] = set()

    def text(self, tokens: int) -> str:
        return "words"

    def generate(self, text: str, adapter: str | None, **_: Any) -> Reply:
        found = adapter in self.seen or (self.shared and bool(self.seen))
        self.seen.add(adapter)
        return reply_of(
            lora_checks.WORKS.index(adapter), 5, 6, 7, cached=96 if found else 0
        )

    def generate_all(self, questions: list[dict[str, Any]]) -> list[Reply]:
        works = [one["adapter"] for one in questions]
        if self.swapped:
            works[1], works[2] = works[2], works[1]
        return [self.generate("", work) for work in works]


def test_a_prefix_of_another_adapter_is_seen() -> None:
    assert "[96, 96, 96]" in lora_checks.prefixes(Works(), 4)  # type: ignore[arg-type]
    with pytest.raises(MissedError, match="somebody else's"):
        lora_checks.prefixes(Works(shared=True), None)  # type: ignore[arg-type]


def test_an_adapter_that_changes_nothing_is_seen() -> None:
    same = Reply(ids=[1], tops=[frozenset(range(lora_checks.TOPS))])
    other = Reply(ids=[1], tops=[frozenset(range(10, 10 + lora_checks.TOPS))])
    lora_checks.expect_differ({None: same, "one": other})
    with pytest.raises(MissedError, match="share at most half"):
        lora_checks.expect_differ({None: same, "one": same})


def test_a_batch_whose_answers_are_swapped_is_seen() -> None:
    assert "one [4, 4, 4, 4]" in lora_checks.mixed(Works())  # type: ignore[arg-type]
    with pytest.raises(MissedError, match="each its own answer"):
        lora_checks.mixed(Works(swapped=True))  # type: ignore[arg-type]


OWN = "likely tokens shared: model: own 8/8, one 0/2, two 0/2; one: own 8/8, model 0/2"
SWAPPED = "one: own 0/2 8/8 8/8 8/8, model 0/2 0/2 0/2 0/2, two 8/8 0/2 0/2 0/2"


def test_verdicts_say_how_near_answers_came() -> None:
    assert OWN in lora_checks.prefixes(Works(), None)  # type: ignore[arg-type]
    passed = lora_checks.mixed(Works())  # type: ignore[arg-type]
    assert "model: own 8/8 8/8 8/8 8/8, one 0/2" in passed
    assert "alone 96 to 96 tokens cached" in passed
    with pytest.raises(MissedError) as failed:
        lora_checks.mixed(Works(swapped=True))  # type: ignore[arg-type]
    assert SWAPPED in str(failed.value)
    assert "one [0, 4, 4, 4]" in str(failed.value)


def test_the_longest_verdict_is_not_cut() -> None:
    """Four prompts to three works, 32 steps, and every answer strange."""
    tops = [frozenset(range(lora_checks.TOPS))] * OUTPUT
    answer = Reply(ids=[1] * OUTPUT, tops=tops, kv=KV)
    alike: lora_checks.Answers = dict.fromkeys(lora_checks.WORKS, answer)
    said = lora_checks.shared([alike] * 4, [alike] * 4)
    assert said.count("640/640") == 36
    assert len(said) < LONGEST - 600, "room for what was expected and what came"


def test_whose_answer_it_is() -> None:
    answers = {None: reply_of(1, 2, 3), "one": reply_of(4, 2, 3)}
    assert lora_checks.nearest(reply_of(4, 2, 3), answers) == "one"
    assert lora_checks.nearest(reply_of(1, 7, 7), answers) is None
    # Another first token, but the likely ones are the same.
    flipped = reply_of(104, 9)
    flipped.tops[0] = answers["one"].tops[0]
    assert lora_checks.nearest(flipped, answers) == "one"


# Verdicts and the record --------------------------------------------------------------


def test_a_check_that_breaks_does_not_hide_the_others() -> None:
    def missed(_: Asker) -> str:
        expect(False, "seven", 8)
        return ""

    def broken(_: Asker) -> str:
        raise KeyError("meta_info")

    one, _ = asker(NATIVE)
    found = judge_all(
        [Check("a", missed), Check("b", broken), Check("c", lambda _: "x\ny")], one
    )
    assert [verdict.passed for verdict in found] == [False, False, True]
    assert found[0].line() == "FAILED  a: expected seven, came 8"
    assert "KeyError" in found[1].said
    assert found[2].line() == "passed  c: x y"
    said = summary(found)
    assert (said["checks"], said["failed"]) == (3, ["a", "b"])


def test_the_record_is_json_and_the_servers_arguments_are_in_it() -> None:
    args = parse_arguments("", ["--lora", "--", "--tp-size", "2"])
    verdicts = [Verdict("a", True, "fine", 0.1)]
    record = command.record_of(args, Path("/models/m"), SIZES, verdicts)
    read = json.loads(json.dumps(record))
    assert (read["bench"], read["model"], read["failed"]) == ("features", "m", [])
    assert read["settings"]["lora"] and read["settings"]["extra"] == ["--tp-size", "2"]
    assert read["verdicts"][0]["name"] == "a"


def test_stock_makes_the_same_checks_less_what_it_cannot() -> None:
    ours = [check.name for check in command.chosen(True, "")]
    stock = [check.name for check in command.chosen(True, "", stock=True)]
    left = [name for name in ours if name not in stock]
    assert left == [f"adapter {n}, a prompt beyond the pool" for n in lora_checks.NAMES]
    assert [name for name in ours if name in stock] == stock, "the same prompts"


@pytest.mark.parametrize("stock", [False, True])
def test_stock_is_started_without_our_plugin_and_our_flags(
    stock: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def start(words: list[str], log: Path, *rest: Any) -> Server:
        started.extend((words, rest[-1]))
        return Server("http://nowhere")

    monkeypatch.setattr(Server, "start", start)
    args = parse_arguments("", ["--lora", *(["--stock"] if stock else [])])
    with ExitStack() as stack:
        command.open_server(args, model, True, stack)
    words, environ = started
    assert any(word.startswith("--kv-compress") for word in words) is not stock
    assert "--enable-lora" in words and "--tool-call-parser" in words
    assert environ == ({"SGLANG_PLUGINS": "none"} if stock else {})


def test_stock_takes_no_flag_of_ours() -> None:
    flag = ["--", "--kv-compress-sessions"]
    assert parse_arguments("", flag).extra == flag[1:]
    with pytest.raises(SystemExit):
        parse_arguments("", ["--stock", *flag])
    assert parse_arguments("", ["--stock", "--", "--tp-size", "2"]).stock


def test_names_differ_and_the_last_checks_are_always_made() -> None:
    names = [check.name for check in command.chosen(True, "")]
    assert len(set(names)) == len(names)
    without = {check.name for check in command.chosen(False, "")}
    assert set(names) - without == {check.name for check in lora_checks.CHECKS}
    assert [c.name for c in command.chosen(True, "regex")] == [
        "regex",
        *(check.name for check in end_checks.CHECKS),
    ]
