"""`rkv`: keeps what it says, and nothing changes where it keeps everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from bench.quality import rkv
from bench.quality.hf_decoding import Prefilled
from bench.quality.kvpress_decoding import generate
from bench.quality.kvpress_prefill import prefill
from bench.quality.systems import Setting
from bench.quality.tasks.sample import Sample
from tests.unit.bench.quality_fixtures import WordTokenizer
from tests.unit.bench.test_quality_kvpress_decoding import prompt, tiny_model

NEW = 150
LENGTHS = (40, 23)


class Numbers(WordTokenizer):
    """Says tokens as numbers."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model()


def sample(new: int = NEW) -> Sample:
    return Sample("gsm8k", "reasoning", 0, 0, 0, "", (), new, "last_number")


def read(model: Any) -> list[Prefilled]:
    return [prefill(model, [prompt(n)], {"all": None})["all"][0] for n in LENGTHS]


def test_nothing_changes_where_everything_is_kept(model: LlamaForCausalLM) -> None:
    rows, samples = read(model), [sample(), sample(20)]
    ours = rkv.generate(model, Numbers(), set(), rows, [Setting(rate=1)] * 2, samples)
    theirs = generate(model, Numbers(), set(), rows, [[], []], samples)
    assert [(one.text, one.tokens) for one in ours] == theirs
    means = [n + (one.tokens + 1) / 2 for n, one in zip(LENGTHS, ours, strict=True)]
    assert [one.mean_resident for one in ours] == means


def test_a_budget_bounds_what_is_held(model: LlamaForCausalLM) -> None:
    settings = [Setting(budget=24), Setting(rate=4)]
    found = rkv.generate(
        model, Numbers(), set(), read(model), settings, [sample(), sample()]
    )
    assert [one.tokens for one in found] == [NEW, NEW]
    # Whole for the first eight steps, then the budget and half of an interval.
    assert 24 < found[0].mean_resident <= 24 + rkv.INTERVAL
    assert found[1].mean_resident <= (LENGTHS[1] + NEW) / 4 + rkv.INTERVAL
    whole = rkv.generate(
        model, Numbers(), set(), read(model), [Setting(rate=1)] * 2, [sample()] * 2
    )
    assert found[0].text != whole[0].text


def test_an_answer_ends_where_it_ends(model: LlamaForCausalLM) -> None:
    rows = read(model)[:1]
    (whole,) = rkv.generate(
        model, Numbers(), set(), rows, [Setting(rate=1)], [sample(12)]
    )
    third = int(whole.text.split()[2])
    (found,) = rkv.generate(
        model, Numbers(), {third}, rows, [Setting(rate=1)], [sample(12)]
    )
    first = whole.text.split().index(str(third))
    assert found.tokens == first
    assert found.text.split() == whole.text.split()[:first]


def test_queries_are_those_that_attend(model: LlamaForCausalLM) -> None:
    """Unsmoothed, importance is what transformers says of the same tokens."""
    ids = prompt(30)
    (row,) = prefill(model, [ids[: -rkv.OBSERVED]], {"all": None})["all"]
    seen = []
    with torch.inference_mode(), rkv.Observing(model, [row], rkv.OBSERVED) as state:
        for token in ids[-rkv.OBSERVED :]:
            state.step([token])
            seen.append(state.queries)
            state.queries = [None] * len(state.queries)
        (held,) = state.rows([row])
    model.set_attn_implementation("eager")
    out = model(torch.tensor([ids]), output_attentions=True)
    model.set_attn_implementation("sdpa")
    assert held.tokens == 30
    for layer, attention in enumerate(out.attentions):
        queries = torch.cat([one[layer] for one in seen], 2)[0]
        paid = attention[0, :, -rkv.OBSERVED :].unflatten(0, (2, -1)).mean((1, 2))
        pooled = torch.nn.functional.max_pool1d(
            paid[None], rkv.POOLED, stride=1, padding=rkv.POOLED // 2
        )[0]
        own = rkv.importance(queries, held.keys[layer])
        torch.testing.assert_close(own, pooled, atol=1e-4, rtol=1e-3)


def test_the_oldest_of_many_likes_are_redundant() -> None:
    """Six equal keys, two others; of each five likes the four newest do not count."""
    keys = torch.eye(4)[[0, 0, 0, 1, 0, 0, 2, 0]][None]
    found = rkv.redundancy(keys)
    # The first one is left by all others, the second one by the first.
    likes = torch.tensor([5.0, 1, 0, 0, 0, 0, 0, 0]) / 8
    torch.testing.assert_close(found[0].log().diff(), likes.diff())


def test_compression_keeps_the_newest_and_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 60, 8, generator=generator)
    queries = torch.randn(4, rkv.OBSERVED, 8, generator=generator)
    row = Prefilled(60, torch.zeros(3), [keys], [keys + 1], [None])
    left = rkv.compress(row, [queries], 20)
    score = rkv.MIX * rkv.importance(queries, keys)
    score = score - (1 - rkv.MIX) * rkv.redundancy(keys)
    for head in range(2):
        older = score[head, : -rkv.OBSERVED].topk(20 - rkv.OBSERVED).indices
        expected = sorted([*older.tolist(), *range(60 - rkv.OBSERVED, 60)])
        assert torch.equal(left.keys[0][head], keys[head, expected])
        assert torch.equal(left.values[0][head], keys[head, expected] + 1)
    assert left.tokens == 60
    assert rkv.compress(row, [queries], 60).keys[0] is keys
