"""What a repeated context reads again, against the model's own attention weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.quality import kvpress_repeat
from bench.quality.kvpress_prefill import prefill
from bench.quality.kvpress_repeat import Repetition
from tests.unit.bench.test_quality_kvpress_decoding import (
    KV_HEADS,
    LAYERS,
    Shrinking,
    close,
    prompt,
    tiny_model,
)

COUNT = 14


@pytest.fixture(scope="module")
def model() -> Any:
    one = tiny_model()
    one.set_attn_implementation("eager")
    return one


@torch.inference_mode()
def weights(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """Largest weight of each key while the ids are repeated, by layer."""
    found = model(torch.tensor([ids + ids]), output_attentions=True).attentions
    count = len(ids)
    return [
        one[0, :, count:, :count].amax(1).view(KV_HEADS, -1, count).amax(1)
        for one in found
    ]


@pytest.mark.parametrize("queries", [5, 256])
def test_the_keys_that_are_read_again_are_kept(
    model: Any, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvpress_repeat, "QUERIES", queries)
    ids = prompt(COUNT)
    found = prefill(model, [ids], {"some": Repetition(0.5), "whole": None})
    (some,), (whole,) = found["some"], found["whole"]
    assert some.tokens == COUNT
    close(some.logits, whole.logits)
    for layer, best in enumerate(weights(model, ids)):
        places = best.topk(COUNT // 2).indices.sort().values[..., None]
        assert whole.keys[layer].shape[1] == COUNT
        for name in ("keys", "values"):
            all_of_it = getattr(whole, name)[layer]
            kept = all_of_it.gather(1, places.expand(-1, -1, all_of_it.shape[2]))
            close(getattr(some, name)[layer], kept)


def test_other_methods_do_not_notice(model: Any) -> None:
    """They choose at the first reading, of several prompts as of one."""
    contexts = [prompt(COUNT), prompt(COUNT)[::-1]]
    presses = {"again": Repetition(0.75), "half": Shrinking(0.5)}
    both = prefill(model, contexts, presses)
    alone = prefill(model, contexts, {"half": presses["half"]})
    for one, other in zip(both["half"], alone["half"], strict=True):
        for layer in range(LAYERS):
            close(one.keys[layer], other.keys[layer])
    for place, context in enumerate(contexts):
        (single,) = prefill(model, [context], {"again": presses["again"]})["again"]
        for layer in range(LAYERS):
            close(both["again"][place].keys[layer], single.keys[layer])
            assert single.keys[layer].shape[1] == round(COUNT / 4)
