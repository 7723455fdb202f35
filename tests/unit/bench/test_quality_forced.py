"""bench.quality.forced: dictated tokens and what is noted about them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.quality import forced
from tests.doubles import request_fields

VOCAB = 50
TOKENS = [7, 8, 9]


def param(job: dict[str, Any], at: int, prompt: int = 100) -> dict[str, Any]:
    # As the installed release has it: the field has moved once.
    fields = request_fields(committed=prompt + at)
    request = SimpleNamespace(origin_input_ids=[0] * prompt, **fields)
    return {forced.KEY: job, "__req__": request}


def dictate(logits: Any, job: dict[str, Any]) -> forced.Thoughts:
    """What is noted while all of a job's tokens are dictated."""
    for at in range(len(job["tokens"])):
        forced.Dictator()(logits[at][None].clone(), [param(job, at)])
    return forced.read(job)


@pytest.fixture
def logits() -> Any:
    return 3 * torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))


def test_the_dictated_token_is_the_greedy_choice(logits: Any) -> None:
    job = forced.job(TOKENS)
    for at, token in enumerate(TOKENS):
        row = forced.Dictator()(logits[at][None].clone(), [param(job, at)])[0]
        assert row.argmax() == token
        others = [i for i in range(VOCAB) if i != token]
        assert torch.equal(row[others], logits[at, others])


@pytest.mark.parametrize("at", [-40, 3, 10])
def test_before_and_after_the_dictation_nothing_changes(logits: Any, at: int) -> None:
    row = forced.Dictator()(logits[:1].clone(), [param(forced.job(TOKENS), at)])[0]
    assert torch.equal(row, logits[0])


def test_log_probabilities_are_noted(logits: Any, tmp_path: Path) -> None:
    thoughts = dictate(logits, forced.job(TOKENS, out=tmp_path / "0.json"))
    truth = logits.log_softmax(-1)
    expected = [truth[at, token].item() for at, token in enumerate(TOKENS)]
    assert thoughts.logprobs == pytest.approx(expected, abs=1e-5)
    best = truth.argmax(-1).tolist()
    agree = [float(b == t) for b, t in zip(best, TOKENS, strict=True)]
    assert thoughts.agree == agree
    assert thoughts.divergence == [0, 0, 0]
    assert not list(tmp_path.glob("*.part"))
    assert not forced._notes


def test_one_rank_of_an_engine_writes(
    logits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    job = forced.job(TOKENS, out=tmp_path / "0.json")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    for at, token in enumerate(TOKENS):
        row = forced.Dictator()(logits[at][None].clone(), [param(job, at)])[0]
        assert row.argmax() == token, "every rank dictates"
    assert not list(tmp_path.iterdir())
    assert not forced._notes
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    assert len(dictate(logits, job).logprobs) == len(TOKENS)


def test_a_distribution_becomes_a_reference(logits: Any, tmp_path: Path) -> None:
    """KL to itself is 0; to another it is nearly the true one with most listed."""
    logits[0, TOKENS[0]] = -9.0  # listed however unlikely it is
    full = dictate(logits, forced.job(TOKENS, out=tmp_path / "full.json"))
    reference = full.reference
    assert reference is not None
    assert all(len(ids) == forced.TOP for ids in reference.ids)
    for ids, values, token, own in zip(
        reference.ids, reference.logprobs, TOKENS, full.logprobs, strict=True
    ):
        assert values[ids.index(token)] == pytest.approx(own)

    job = forced.job(TOKENS, reference, tmp_path / "same.json")
    thoughts = dictate(logits, job)
    assert thoughts.divergence == pytest.approx([0, 0, 0], abs=1e-5)
    assert thoughts.agree == [1, 1, 1]
    assert thoughts.reference is None

    other = logits.flip(0)
    job = forced.job(TOKENS, reference, tmp_path / "other.json")
    thoughts = dictate(other, job)
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1).tolist()
    pairs = zip(thoughts.divergence, exact, strict=True)
    assert all(lump <= truth + 1e-5 for lump, truth in pairs)
    assert thoughts.divergence == pytest.approx(exact, rel=0.2, abs=5e-3)


def test_a_cut_off_dictation_is_an_error(logits: Any, tmp_path: Path) -> None:
    job = forced.job(TOKENS, out=tmp_path / "0.json")
    forced.Dictator()(logits[:1].clone(), [param(job, 0)])
    with pytest.raises(RuntimeError, match="0 of 3 dictated tokens"):
        forced.read(job)
    # One that lacks a token in the middle is written, and found to be short.
    forced.Dictator()(logits[:1].clone(), [param(job, 2)])
    with pytest.raises(RuntimeError, match="2 of 3 dictated tokens"):
        forced.read(job)


def test_requests_of_a_batch_do_not_mix(tmp_path: Path) -> None:
    """Rows with long, short and no references, unnoted ones and one that is done."""
    logits = 3 * torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(2))
    references = [
        forced.Reference([ids] * 3, [logprobs] * 3)
        for ids, logprobs in (([7, 8, 9, 30], [-1.0, -2.0, -1.5, -3.0]), ([9], [-0.5]))
    ]
    places = [2, 1, 0]
    jobs = [
        forced.job(TOKENS, reference, tmp_path / f"{number}.json")
        for number, reference in enumerate((*references, None))
    ]
    alone = [
        forced.observe(row[None].log_softmax(-1), [job], [at])[0]
        for row, job, at in zip(logits, jobs, places, strict=False)
    ]
    params = [param(job, at) for job, at in zip(jobs, places, strict=True)]
    params += [param(forced.job(TOKENS), 1), param(jobs[2], 3)]
    together = forced.Dictator()(logits.clone(), params)
    assert together.argmax(1)[:4].tolist() == [9, 8, 7, 8]
    assert torch.equal(together[4], logits[4])
    notes = [forced._notes.pop(jobs[i]["out"])[places[i]][0] for i in (1, 2)]
    torch.testing.assert_close(torch.stack(notes), torch.stack(alone[1:]))
    written = json.loads((tmp_path / "0.json").read_text())
    values = [written[name] for name in ("logprobs", "agree", "divergence")]
    assert sum(values, []) == pytest.approx(alone[0].tolist())


def test_likelihood_is_the_inverse_of_perplexity() -> None:
    assert forced.likelihood([math.log(0.5), math.log(0.125)]) == pytest.approx(0.25)
    assert forced.likelihood([]) == 0


def test_sglang_can_load_the_processor() -> None:
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    text = forced.processor()
    assert json.loads(text)["callable"]
    assert isinstance(CustomLogitProcessor.from_str(text), forced.Dictator)
