"""Long answers: what their tasks are made of, and what is said of them."""

from __future__ import annotations

from typing import Any

import pytest

from bench.quality.asking import Answer
from bench.quality.equal_memory import at, points
from bench.quality.long_answers import chrf, distinct, figures, names_of
from bench.quality.math_answers import is_equal, last_box, math_answer, numbered
from bench.quality.metrics import listed
from bench.quality.records import Cell, Key, pack
from bench.quality.report import long_table, share_table
from bench.quality.scoring import result
from bench.quality.stats import order
from bench.quality.systems import parse_setting
from bench.quality.tasks import TASKS, code, make_sample
from bench.quality.tasks.corpus import Corpus
from bench.quality.tasks.sample import LIKELIHOOD, Sample
from tests.unit.bench.quality_fixtures import WordTokenizer, make_data

LENGTH = 1500
ABOUT_TEXTS = (
    *("squality", "qmsum", "wiki_report", "fact_report", "essay_report"),
    *("squality_replay", "qmsum_replay", "listed_titles", "gsm8k_four", "math_long"),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(make_data(tmp_path_factory.mktemp("data")))


def build(corpus: Corpus, name: str, index: int = 0, seed: int = 0) -> Sample:
    return make_sample(TASKS[name], LENGTH, seed, index, WordTokenizer(), corpus)


def runs(sample: Sample) -> set[tuple[str, ...]]:
    """Runs of six words of what is read, without what is asked of all."""
    context = sample.prompt.removesuffix(sample.question)
    words = (context if sample.question != sample.prompt else sample.prompt).split()
    return {tuple(words[i : i + 6]) for i in range(10, len(words) - 6)}


@pytest.mark.parametrize("name", ABOUT_TEXTS)
def test_odd_and_even_seeds_share_no_text(corpus: Corpus, name: str) -> None:
    odd, even = (
        {run for index in range(5) for run in runs(build(corpus, name, index, seed))}
        for seed in (1, 0)
    )
    # Problems are all that those of the chain read, in words of their own kind.
    if TASKS[name].group != "chain":
        assert odd and even
        assert not odd & even
    answers = [
        {build(corpus, name, index, seed).answers for index in range(3)}
        for seed in (1, 0)
    ]
    if answers[0] != {()}:
        assert not answers[0] & answers[1]


def test_odd_and_even_seeds_share_no_module() -> None:
    for found in (code.purposes, code.defining):
        odd, even = found(1), found(0)
        assert len(odd) >= 15 and len(even) >= 15
        assert not _modules(odd) & _modules(even)
    assert len(code.purposes(0)) >= 50 <= len(code.purposes(1))


def _modules(found: Any) -> set[str]:
    """What stays of the sources without their docstrings: their last lines."""
    texts = (one.code if isinstance(one, code.Purpose) else one[0] for one in found)
    return {text[-2_000:] for text in texts}


def test_a_docstring_that_is_asked_for_is_not_there(corpus: Corpus) -> None:
    for index in (0, 30, 60):
        sample = build(corpus, "code_purpose", index)
        assert sample.answers[0].splitlines()[0] not in sample.prompt
        assert 5_000 < len(sample.prompt) < 48_500


def test_names_are_listed_in_their_order(corpus: Corpus) -> None:
    for index in (0, 40):
        sample = build(corpus, "code_names", index)
        places = [
            min(
                place
                for kind in ("def", "class")
                if (place := f"\n{sample.prompt}".find(f"\n{kind} {name}")) >= 0
            )
            for name in sample.answers
        ]
        assert places == sorted(places)


def test_all_texts_come_before_one_comes_again(corpus: Corpus) -> None:
    first = [build(corpus, "squality", index) for index in range(6)]
    contexts = [sample.prompt.removesuffix(sample.question) for sample in first]
    assert len(set(contexts[:3])) == 3
    assert contexts[3:] == contexts[:3]
    assert all("What is 0?" in sample.question for sample in first[:3])
    assert all("What is 1?" in sample.question for sample in first[3:])
    assert len(first[0].answers) == 4


def test_a_replay_is_of_the_same_prompt(corpus: Corpus) -> None:
    asked, replay = (build(corpus, name) for name in ("squality", "squality_replay"))
    assert replay.prompt == asked.prompt
    assert replay.mode == LIKELIHOOD and replay.from_full
    assert replay.max_new_tokens == 300 and not replay.answers


def test_facts_are_those_that_were_asked_for(corpus: Corpus) -> None:
    sample = build(corpus, "fact_report", index=2)
    assert sample.answers == ("K4x0", "K4x1", "K4x2")
    assert all(fact in sample.prompt for fact in sample.answers)


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("ab", "ab", 1.0),
        ("a b", "ab", 1.0),
        ("xy", "ab", 0.0),
        ("", "ab", 0.0),
        # 1 to 3 characters: 2/3, 1/2 and 0 of both sides.
        ("abc", "abd", 7 / 18),
        # Precision 1; recall 2/3 and 1/2; no three characters.
        ("ab", "abc", 5 * (7 / 12) / (4 + 7 / 12)),
    ],
)
def test_chrf_by_hand(text: str, reference: str, expected: float) -> None:
    assert chrf(text, reference) == pytest.approx(expected)


PROMPT = (
    "On Monday the ship left. Then Anna Berg met the captain, Otto, in 1912, with 30 "
    "men. The Ship was old. Later Otto sold it."
)


def test_figures_by_hand() -> None:
    assert names_of(PROMPT) == {"Monday", "Anna", "Berg", "Otto"}
    gold = ["Anna Berg met Otto in 1912.", "Otto had 30 men."]
    text = "In 1912 the captain Otto met Carl and 31 men."
    found = figures(text, gold, PROMPT)
    assert found["names"] == pytest.approx(1 / 3)
    assert found["numbers"] == pytest.approx(1 / 2)
    # Otto and 1912 of Otto, Carl, 1912, 31.
    assert found["supported"] == pytest.approx(1 / 2)
    assert found["chrf"] == max(chrf(text, one) for one in gold)
    assert found["distinct4"] == 1
    nothing = figures("", ["no names"], "nor here")
    assert nothing["names"] is nothing["supported"] is nothing["distinct4"] is None


def test_what_repeats_itself_is_not_distinct() -> None:
    assert distinct("a b c d a b c d") == pytest.approx(4 / 5)
    assert distinct("a b c d e") == 1
    assert distinct("a b c") is None


def test_lists_whatever_their_marks() -> None:
    gold = ("parse", "Reader", "main")
    assert listed("1. `parse`\n2. `Reader`\n3. `main`", gold) == 1
    assert listed("- parse\n* reader:\n\n- main()", gold) == 1
    assert listed("parse\nreader", gold) == pytest.approx(4 / 5)
    assert listed("parse\nreader\nmain\nparse\nother", gold) == pytest.approx(6 / 7)
    assert listed("", gold) == 0


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("\\frac{1}{2}", "\\dfrac{1}{2}"),
        ("1/2", "\\frac12"),
        ("0.5", "\\frac{1}{2}"),
        ("\\text{even}", "even"),
        ("x = 12", "12"),
        ("12{,}000".replace("{,}", ","), "12000"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\left(3,\\frac{\\pi}{2}\\right)"),
        ("90^\\circ", "90"),
        ("\\$18.90", "18.9"),
        ("10\\%", "10"),
        ("5.", "5"),
        ("\\frac{a+b}{c}", "(a+b)/c"),
    ],
)
def test_equal_ways_of_writing(given: str, answer: str) -> None:
    assert is_equal(given, answer)
    assert math_answer(f"so \\boxed{{7}}, no: \\boxed{{{given}}} it is", (answer,))


@pytest.mark.parametrize(
    ("given", "answer"), [("1/2", "2"), ("(1,2)", "12"), ("x+1", "x-1"), ("", "0")]
)
def test_other_answers(given: str, answer: str) -> None:
    assert not is_equal(given, answer)


def test_an_answer_without_a_box_is_its_last_number() -> None:
    assert math_answer("First 3, then 1,204.", ("1204",)) == 1
    assert math_answer("no number", ("1204",)) == 0
    assert last_box("\\boxed{a{b}} and \\boxed{c{d") == "c{d"


def test_several_problems_are_scored_one_by_one() -> None:
    text = "Answer 1: 4\n... Answer 1: $5\n**Answer 2:** 1,000.\nAnswer 10: 7"
    assert numbered(text, ("5", "1000", "7", "8")) == 1 / 2


def test_records_of_long_answers(corpus: Corpus) -> None:
    sample = build(corpus, "squality")
    record = result(sample, Answer("Too short.", 900, 3, 120, 118.5))
    assert record["mean_resident"] == 118.5
    assert {"chrf", "names", "numbers", "supported", "distinct4"} <= record.keys()
    short = result(build(corpus, "needle_numbers"), Answer("", 900, 3, 120, 118.5))
    assert "chrf" not in short and short["mean_resident"] == 118.5
    assert pack([record, short])["chrf"][1] is None


def test_settings_with_an_answer_of_their_own() -> None:
    share = parse_setting("8+512")
    assert share.option == {"rate": 8, "answer": 512}
    assert parse_setting("b256+256").option == {"budget": 256, "answer": 256}
    assert (share.label, parse_setting("b256+256").label) == ("8+512", "b256+256")
    assert parse_setting("8").option == {"rate": 8}
    for wrong in ("8+", "8+x", "+512", "8+-5"):
        with pytest.raises(ValueError, match="is no setting"):
            parse_setting(wrong)
    words = ["b512", "8+512", "1", "b256+256", "8", "16", "8+128"]
    ordered = ["1", "8", "8+128", "8+512", "16", "b512", "b256+256"]
    assert sorted(words, key=order) == ordered


def test_shares_are_compared_at_equal_memory() -> None:
    def cell(setting: str, score: float, mean: float) -> tuple[Key, Cell]:
        key = Key("m", "ours", setting, "squality", 0, 0)
        sample = {"score": score, "output_tokens": 9, "mean_resident": mean}
        return key, Cell(key, "long", {0: sample, 1: sample})

    cells = dict(
        [
            cell("1", 1, 4000),
            cell("4", 0.8, 1000),
            cell("16", 0.4, 250),
            cell("16+512", 0.7, 500),
            cell("2+512", 1, 5000),
        ]
    )
    assert at(points(cells, "ours", "long"), 500) == pytest.approx(60)
    rows = share_table(cells).splitlines()[2:]
    assert rows == ["| ours | 2+512 |  |", "| ours | 16+512 | +10.0 (500) |"]


def test_lengths_are_compared_with_the_full_caches() -> None:
    def cell(setting: str, tokens: list[int], chrf: float) -> tuple[Key, Cell]:
        key = Key("m", "ours", setting, "squality", 0, 0)
        samples = {
            i: {"score": 1, "output_tokens": n, "chrf": chrf, "mean_resident": 10 * n}
            for i, n in enumerate(tokens)
        }
        return key, Cell(key, "long", samples)

    cells = dict([cell("1", [200, 100], 0.5), cell("8", [100, 125], 0.25)])
    rows = [line.split("|") for line in long_table(cells).splitlines()]
    assert [row[3:6] for row in rows[2:]] == [
        [" 1500 ", " 100 ", " 50.0 "],
        [" 1125 ", " 75 ", " 25.0 "],
    ]
    assert not long_table({})
