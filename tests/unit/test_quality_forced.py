"""bench.quality.forced: dictated tokens and what comes back about them."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.quality import forced

VOCAB = 50


def request(prompt: int, computed: int) -> Any:
    return SimpleNamespace(origin_input_ids=[0] * prompt, kv_committed_len=computed)


def dictate(
    logits: Any, job: dict[str, Any], at: int, prompt: int = 100
) -> tuple[Any, Any]:
    """Row after the processor, and its log-probabilities as SGLang takes them."""
    param = {forced.KEY: job, "__req__": request(prompt, prompt + at)}
    out = forced.Dictator()(logits.clone()[None], [param])
    return out[0], out.log_softmax(-1)[0]


def meta_of(rows: list[Any], job: dict[str, Any], top: int = 0) -> dict[str, Any]:
    """``meta_info`` as SGLang makes it from such rows."""
    meta: dict[str, Any] = {"output_token_ids_logprobs": [], "output_top_logprobs": []}
    for row in rows:
        values = [(row[c].item(), c, None) for c in job["channels"]]
        meta["output_token_ids_logprobs"].append(values)
        if top:
            best = row.topk(top)
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            meta["output_top_logprobs"].append([(v, i, None) for v, i in pairs])
    return meta


@pytest.fixture
def logits() -> Any:
    return 3 * torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))


def test_the_dictated_token_is_the_greedy_choice(logits: Any) -> None:
    job = forced.job([7, 8, 9])
    assert job["channels"] == [0, 1, 2]
    for at, token in enumerate(job["tokens"]):
        row, _ = dictate(logits[at], job, at)
        assert row.argmax() == token


@pytest.mark.parametrize("at", [-40, 3, 10])
def test_before_and_after_the_dictation_nothing_changes(logits: Any, at: int) -> None:
    row, _ = dictate(logits[0], forced.job([7, 8, 9]), at)
    assert torch.equal(row, logits[0])


def test_log_probabilities_come_back(logits: Any) -> None:
    job = forced.job([7, 8, 9])
    rows = [dictate(logits[at], job, at)[1] for at in range(3)]
    thoughts = forced.read(meta_of(rows, job), job)
    truth = logits.log_softmax(-1)
    expected = [truth[at, token].item() for at, token in enumerate([7, 8, 9])]
    assert thoughts.logprobs == pytest.approx(expected, abs=1e-5)
    best = truth.argmax(-1).tolist()
    assert thoughts.agree == [float(b == t) for b, t in zip(best, [7, 8, 9])]  # noqa: B905
    assert thoughts.divergence == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_distribution_becomes_a_reference(logits: Any) -> None:
    """KL to itself is 0; to another it is the true one when all tokens are listed."""
    job = forced.job([7, 8, 9])
    rows = [dictate(logits[at], job, at)[1] for at in range(3)]
    full = forced.read(meta_of(rows, job, top=VOCAB), job, keep=True)
    reference = full.reference
    assert reference is not None
    assert all(len(ids) == forced.TOP for ids in reference.ids)
    assert all(token in ids for token, ids in zip([7, 8, 9], reference.ids))  # noqa: B905

    same = forced.job([7, 8, 9], reference)
    rows = [dictate(logits[at], same, at)[1] for at in range(3)]
    thoughts = forced.read(meta_of(rows, same), same)
    # The channels are listed as if they had no probability.
    assert thoughts.divergence == pytest.approx([0, 0, 0], abs=5e-3)
    assert thoughts.agree == [1, 1, 1]

    other = logits.flip(0)
    rows = [dictate(other[at], same, at)[1] for at in range(3)]
    thoughts = forced.read(meta_of(rows, same), same)
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1).tolist()
    assert all(
        lump <= truth + 1e-2
        for lump, truth in zip(thoughts.divergence, exact)  # noqa: B905
    )
    assert thoughts.divergence == pytest.approx(exact, rel=0.2, abs=5e-3)


def test_channels_are_tokens_that_are_not_dictated() -> None:
    assert forced.unused_ids([0, 2, 3]) == [1, 4, 5]


def test_a_cut_off_dictation_is_an_error(logits: Any) -> None:
    job = forced.job([7, 8, 9])
    rows = [dictate(logits[0], job, 0)[1]]
    with pytest.raises(RuntimeError, match="1 of 3 dictated tokens"):
        forced.read(meta_of(rows, job), job)


def test_likelihood_is_the_inverse_of_perplexity() -> None:
    assert forced.likelihood([math.log(0.5), math.log(0.125)]) == pytest.approx(0.25)
    assert forced.likelihood([]) == 0


def test_sglang_can_load_the_processor() -> None:
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    text = forced.processor()
    assert json.loads(text)["callable"]
    assert isinstance(CustomLogitProcessor.from_str(text), forced.Dictator)


def test_requests_of_a_batch_do_not_mix() -> None:
    """Rows with long, short and no references, and one that does not dictate."""
    logits = 3 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    tokens = [7, 8, 9]
    references = [
        forced.Reference([ids] * 3, [logprobs] * 3)
        for ids, logprobs in (([7, 8, 9, 30], [-1.0, -2.0, -1.5, -3.0]), ([9], [-0.5]))
    ]
    jobs = [forced.job(tokens, reference) for reference in (*references, None)]
    places = [2, 1, 0]
    alone = [
        dictate(row, job, at)[0]
        for row, job, at in zip(logits, jobs, places, strict=False)
    ]
    params = [
        {forced.KEY: job, "__req__": request(100, 100 + at)}
        for job, at in zip([*jobs, jobs[0]], [*places, 3], strict=True)
    ]
    together = forced.Dictator()(logits.clone(), params)
    torch.testing.assert_close(together, torch.stack([*alone, logits[3]]))
