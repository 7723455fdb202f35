"""The scout chooses as the server does, and pools in the direction that it says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from bench.quality.scouts.simulate import _likelihoods, table
from bench.quality.scouts.simulate_choice import (
    CANDIDATES,
    SINKS,
    Candidate,
    Observer,
    keep,
)
from sglang_kvc.config.pages import floor_tokens

LAYERS, HEADS, N, BUDGET = 2, 3, 200, 64


def scores() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(LAYERS * HEADS, N) * torch.arange(1, 7)[:, None]


@pytest.mark.parametrize("allocation", ["joint", "layer", "head"])
def test_every_group_keeps_its_budget_and_what_is_forced(allocation: str) -> None:
    stays = keep(scores(), LAYERS, BUDGET, Candidate(allocation=allocation))
    fold = floor_tokens(N)
    kept = stays[:, :fold].sum(1)
    shape = {"joint": (1, -1), "layer": (LAYERS, -1), "head": (LAYERS * HEADS, 1)}
    groups = kept.view(shape[allocation])
    assert (groups.float().mean(1) == BUDGET).all()
    assert stays[:, :SINKS].all() and stays[:, N - Candidate().protected :].all()
    # Rows are worth more the later they come.
    assert allocation == "head" or kept[-1] > kept[0]


def test_a_floor_is_kept_by_every_head() -> None:
    lean = keep(scores(), LAYERS, 96, Candidate())[:, : floor_tokens(N)].sum(1)
    fed = keep(scores(), LAYERS, 96, Candidate(floor=0.9))[:, : floor_tokens(N)].sum(1)
    assert lean.min() < 80 <= fed.min()
    assert lean.sum() == fed.sum() == 96 * LAYERS * HEADS


def test_a_share_is_kept_by_every_layer() -> None:
    def by_layer(candidate: Candidate) -> list[int]:
        kept = keep(scores(), LAYERS, 96, candidate)[:, : floor_tokens(N)]
        return [int(n) for n in kept.unflatten(0, (LAYERS, HEADS)).sum((1, 2))]

    half = by_layer(Candidate(layer_share=0.9))
    # Five of six pages a head.
    assert by_layer(Candidate(layer_share=0))[0] < half[0] == 80 * HEADS < half[1]
    assert sum(half) == 96 * LAYERS * HEADS
    assert by_layer(Candidate(layer_share=1)) == by_layer(Candidate(allocation="layer"))


def test_more_tokens_may_be_protected() -> None:
    stays = keep(scores(), LAYERS, 96, Candidate(protected=80))
    assert stays[:, N - 80 :].all()
    assert not keep(scores(), LAYERS, 96, Candidate())[:, N - 80 :].all()


def test_likelihood_begins_with_what_sees_the_compressed_cache() -> None:
    targets = (3, 1, 2)
    logits = torch.tensor([[[0, 2, 0, 0], [0, 0, 1, 0]]]).float()
    sample = SimpleNamespace(targets=targets)
    (value,) = _likelihoods(logits, sample)  # type: ignore[arg-type]
    probs = logits[0].softmax(-1)
    assert value == pytest.approx((probs[0, 1] * probs[1, 2]).sqrt().item())


@torch.inference_mode()
def test_what_is_not_visible_counts_for_nothing() -> None:
    """Several new tokens over a cache with holes, as attention with a mask sees it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    observer = Observer()
    AttentionInterface.register("kv_simulate_test", observer)
    ids = torch.randint(32, (1, 12))
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    hidden = [2, 5, 6]
    # One layer: nothing that follows a hole was computed from it.
    mask[9:, hidden] = False
    bias = torch.zeros(1, 1, 12, 12).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = model(ids, attention_mask=bias).logits[0, 9:]
    model.set_attn_implementation("kv_simulate_test")
    out = model(ids[:, :9], use_cache=True)
    observer.visible = torch.ones(1, 1, 2, 12, dtype=torch.bool)
    observer.visible[..., hidden] = False
    found = model(ids[:, 9:], past_key_values=out.past_key_values).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_back_keeps_what_follows_a_match() -> None:
    observer = Observer()
    probs = torch.zeros(1, 1, 4, 20)
    probs[0, 0, :, 10] = 0.5
    observer.seen = [(probs, torch.ones(1, 20), torch.ones(1, 20))]
    candidate = Candidate(back=4, ahead=1, decay=0.5, gain=1, distinct=0)
    found = observer.scores(candidate)[0]
    assert found.nonzero().flatten().tolist() == [9, 10, 11, 12, 13, 14]
    assert found[9:15].tolist() == [0.5, 1, 0.5, 0.25, 0.125, 0.0625]


def test_what_is_unusual_may_stay_unasked() -> None:
    """With `distinct`, after what queries looked at comes what differs most."""
    observer = Observer()
    probs = torch.full((1, 1, 4, 20), 1e-6)
    probs[0, 0, :, 10] = 0.5
    distance = torch.full((1, 20), 0.1)
    distance[0, 3] = 1.0
    observer.seen = [(probs, torch.ones(1, 20), distance)]
    best = [
        observer.scores(Candidate(back=0, ahead=0, distinct=distinct))[0]
        .topk(2)
        .indices.tolist()
        for distinct in (0.1, 1000)
    ]
    assert best[0] == [10, 3]
    assert best[1][0] == 3


def test_names_differ_and_tables_show_means() -> None:
    names = [candidate.name for candidate in CANDIDATES]
    assert len(set(names)) == len(names)
    lines = [
        {"task": "a", "scores": {"full": 1.0, "plain": 0.0}},
        {"task": "a", "scores": {"full": 1.0, "plain": 1.0}},
    ]
    assert table(lines).splitlines()[-1].split()[-2:] == ["50", "50.0"]
