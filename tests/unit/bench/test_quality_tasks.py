"""bench.quality's tasks: prompts of the right length that can be answered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.quality.metrics import SCORERS
from bench.quality.tasks import GROUPS, OWN_LENGTH, RULER, TASKS, make_sample, resolve
from bench.quality.tasks.corpus import Corpus, detokenize, half
from bench.quality.tasks.fit import largest_fitting
from bench.quality.tasks.sample import (
    CONVERSATION,
    DICTATED,
    LIKELIHOOD,
    TURNS,
    Sample,
    encode,
    encode_parts,
    encode_said,
    encode_turns,
)
from tests.unit.bench.quality_fixtures import WordTokenizer, make_data

LENGTH = 3000
SHORT = 60
"""No unit of filler in the made-up data is longer, but for paragraphs."""
PARAGRAPH = 900
FEW = ("wiki_report", "wiki_replay", "listed_titles")
"""Made of few articles, which in the made-up data are short."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(make_data(tmp_path_factory.mktemp("data")))


def build(corpus: Corpus, name: str, length: int = LENGTH, **more: int) -> Sample:
    at = {"seed": 0, "index": 0, **more}
    return make_sample(
        TASKS[name], length, at["seed"], at["index"], WordTokenizer(), corpus
    )


def test_the_registry_has_what_ruler_has() -> None:
    assert sum(task.ruler for task in TASKS.values()) == 13
    assert [t.name for t in resolve(["qa", "essays", "qa_documents"])] == [
        "qa_paragraphs",
        "qa_documents",
        "essays",
    ]
    assert len(resolve([RULER])) == 13
    assert len(resolve(["all"])) == len(TASKS) >= 25
    assert len(GROUPS) == 16
    with pytest.raises(ValueError, match="unknown task 'nonsense'"):
        resolve(["nonsense"])


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_deterministic_and_differ(corpus: Corpus, name: str) -> None:
    first, again = build(corpus, name), build(corpus, name)
    assert first == again
    assert first.group == TASKS[name].group
    other = build(corpus, name, index=1)
    assert (first.prompt, first.tokens) != (other.prompt, other.tokens)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_have_their_length(corpus: Corpus, name: str) -> None:
    if not TASKS[name].fits:
        assert build(corpus, name).length == OWN_LENGTH
        return
    for length in (1500,) if name in FEW else (LENGTH, 4096):
        sample = build(corpus, name, length)
        tokens = len(encode(WordTokenizer(), sample)) + len(sample.targets)
        by_paragraphs = name in ("topics", "labels") or "qa" in name
        slack = PARAGRAPH if by_paragraphs else SHORT
        if "uuid" in name or "kv" in name:
            slack = 2 * SHORT
        assert length - slack <= tokens <= length


@pytest.mark.parametrize("name", TASKS)
def test_a_perfect_answer_scores_one_and_an_empty_one_nothing(
    corpus: Corpus, name: str
) -> None:
    sample = build(corpus, name)
    if sample.mode == LIKELIHOOD or sample.from_full:
        assert not sample.answers
        return
    scorer = SCORERS[sample.scorer]
    good = {
        "boxed": f"\\boxed{{{sample.answers[0]}}}",
        "math": f"\\boxed{{{sample.answers[0]}}}",
        "rouge_l": sample.answers[0],
        "listed": "\n".join(sample.answers),
        "numbered": "\n".join(
            f"Answer {k}: {answer}" for k, answer in enumerate(sample.answers, 1)
        ),
    }.get(sample.scorer, " ".join(sample.answers))
    assert scorer(good, sample.answers) == 1
    assert scorer("", sample.answers) == 0


@pytest.mark.parametrize(
    "name", [n for n, t in TASKS.items() if t.ruler and n != "common_words"]
)
def test_answers_stand_in_the_context(corpus: Corpus, name: str) -> None:
    sample = build(corpus, name)
    context = sample.prompt.removesuffix(sample.question)
    for answer in sample.answers:
        assert answer in context
        assert answer not in sample.question


def test_needles_lie_at_all_depths(corpus: Corpus) -> None:
    places = []
    for index in range(12):
        sample = build(corpus, "needle_numbers", index=index)
        places.append(sample.prompt.index(sample.answers[0]) / len(sample.prompt))
    assert min(places) < 0.3
    assert max(places) > 0.7


def test_counts_are_what_the_answers_say(corpus: Corpus) -> None:
    sample = build(corpus, "frequent_words")
    words = sample.prompt.split()
    counts = [words.count(answer) for answer in sample.answers]
    assert counts == sorted(counts, reverse=True)
    sample = build(corpus, "common_words")
    listed = sample.prompt.split("\n")[-2].split()
    assert {listed.count(answer) for answer in sample.answers} == {10}


def test_seeds_of_other_parity_share_nothing(corpus: Corpus) -> None:
    assert not set(half(range(9), 0)) & set(half(range(9), 1))
    for name in ("qa_paragraphs", "kv_retrieval", "gsm8k", "math500"):
        questions = [
            {build(corpus, name, seed=seed, index=i).question for i in range(3)}
            for seed in (0, 1)
        ]
        assert not questions[0] & questions[1]


def test_no_question_comes_twice(corpus: Corpus) -> None:
    asked = [build(corpus, "qa_documents", index=i).question for i in range(20)]
    assert len(set(asked)) == 20


def test_gold_numbers_of_problems(corpus: Corpus) -> None:
    sample = build(corpus, "gsm8k", index=2)
    number = int(sample.question.split("is ")[1].split(" ")[0])
    assert sample.answers == (str(number + 1000),)
    assert "<<" not in sample.prompt
    assert sample.prompt.count("The answer is") == 5


def test_a_decoded_text_follows_its_prompt(corpus: Corpus) -> None:
    sample = build(corpus, "essays")
    assert len(sample.tokens) + len(sample.targets) == LENGTH
    assert encode(WordTokenizer(), sample) == list(sample.tokens)
    with pytest.raises(ValueError, match="under 512"):
        build(corpus, "essays", 400)


def test_later_questions_split_the_prompt(corpus: Corpus) -> None:
    sample = build(corpus, "later_needle")
    assert sample.mode == DICTATED
    tokenizer = WordTokenizer()
    context, question = encode_parts(tokenizer, sample)
    assert context + question == encode(tokenizer, sample)
    assert sample.answers[0] in tokenizer.decode(context)
    assert tokenizer.decode(question).startswith(sample.question)
    assert tokenizer.decode(question).endswith(sample.prefix)


def test_turns_repeat_the_context(corpus: Corpus) -> None:
    sample = build(corpus, "turn_qa")
    assert sample.mode == TURNS
    tokenizer = WordTokenizer()
    first, second = encode_turns(tokenizer, sample, "Yes.")
    text = tokenizer.decode(first)
    shared = text.removesuffix("[assistant]")
    assert tokenizer.decode(second).startswith(f"{shared}[assistant]Yes.<end>[user]")
    assert sample.question not in text


SESSIONS = [name for name, task in TASKS.items() if task.group == "sessions"]


@pytest.mark.parametrize("name", SESSIONS)
def test_a_conversation_grows_by_turns(corpus: Corpus, name: str) -> None:
    """Each prompt is what was read and replied before, and a question."""
    tokenizer, lengths = WordTokenizer(), set()
    for index in range(5):
        sample = build(corpus, name, index=index)
        assert sample.mode == CONVERSATION
        pieces = encode_said(tokenizer, sample)
        assert len(pieces) == 2 * len(sample.said) + 1
        text = "".join(map(tokenizer.decode, pieces))
        assert encode(tokenizer, sample) == [i for piece in pieces for i in piece]
        assert text.endswith(sample.prompt + "<end>[assistant]" + sample.prefix)
        for (user, reply), read, said in zip(
            sample.said, pieces[::2], pieces[1::2], strict=False
        ):
            assert tokenizer.decode(said) == reply
            assert user in tokenizer.decode(read)
            # What a turn leaves reaches further than its prompt.
            assert len(said) > 32
        lengths.add(len(sample.said))
    asked_last = name in ("session_facts", "session_instruction")
    assert lengths == ({5} if asked_last else {1, 2, 3, 4, 5})


def test_what_a_conversation_is_asked_was_told_in_the_right_turns(
    corpus: Corpus,
) -> None:
    """In the document of turn 1 alone, or a fact in every turn; never in a reply."""
    for name in SESSIONS:
        sample = build(corpus, name, index=4)
        users, replies = zip(*sample.said, strict=True)
        for number, answer in enumerate(sample.answers):
            told = [answer in user for user in users]
            place = number if name == "session_facts" else 0
            assert told.index(True) == place
            assert sum(told) == 1
            assert name == "session_qa" or not any(answer in it for it in replies)
    several = build(corpus, "session_several", index=4)
    assert len(several.answers) == 4
    assert len(build(corpus, "session_facts").answers) == 5


def test_a_rule_is_used_in_the_last_turn_only(corpus: Corpus) -> None:
    sample = build(corpus, "session_instruction")
    trigger = sample.prompt.removeprefix("I say ").rstrip(".")
    assert trigger in sample.said[0][0]
    assert not any(trigger in user for user, _ in sample.said[1:])


def test_a_template_that_changes_the_history_is_refused(corpus: Corpus) -> None:
    class Forgetful(WordTokenizer):
        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return super().apply_chat_template(messages[-1:])

    sample = build(corpus, "session_needle", index=1)
    with pytest.raises(ValueError, match="changes what was said"):
        encode_said(Forgetful(), sample)


def test_samples_are_checked(corpus: Corpus) -> None:
    sample = build(corpus, "needle_noise")
    with pytest.raises(ValueError, match="mode must be one of"):
        replace(sample, mode="shout")
    with pytest.raises(ValueError, match="not the prompt's end"):
        replace(sample, question="Why?")


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--data"):
        _ = Corpus(tmp_path).essay_words


@pytest.mark.parametrize("per_unit", [1, 7, 40])
def test_fitting_needs_few_guesses(per_unit: int) -> None:
    calls: list[int] = []

    def size(units: int) -> Any:
        calls.append(units)
        return 30 + per_unit * units

    units = largest_fitting(size, 2000, 10_000)
    assert 30 + per_unit * units <= 2000 < 30 + per_unit * (units + 1) + 4
    assert len(calls) < 8
    with pytest.raises(ValueError, match="too few"):
        largest_fitting(size, 10, 10)


def test_a_summary_is_compared_with_the_opening_that_it_cannot_see(
    corpus: Corpus,
) -> None:
    """First in its first turn, last in the second; other articles fill the rest."""
    own = corpus.wiki_texts[0]
    assert len(own.lead) == 1 and len(own.body) == 3
    for index, place in ((0, "first"), (15, "last")):
        sample = build(corpus, "summary_lead", index=index)
        assert sample.answers == (own.lead[0],)
        assert own.lead[0] not in sample.prompt
        articles = sample.prompt.split("# Article")[1:]
        assert len(articles) > 2
        assert all(text in articles[-(place == "last")] for text in own.body)
        assert place in sample.question


def test_wikitext_is_written_as_usual() -> None:
    raw = "The <unk> cost 1 @,@ 000 dollars ( about half ) , it 's said ."
    assert detokenize(raw) == "The cost 1,000 dollars (about half), it's said."
