"""Caches of different lengths decoded together, and one prefill for several presses.

On a tiny model with random weights and presses made for it; the references decode a
prompt alone, with nothing but transformers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bench.quality import forced
from bench.quality.hf_decoding import (
    Decoding,
    Prefilled,
    equal_shapes,
    joined,
    packed,
)
from bench.quality.kvpress_decoding import think
from bench.quality.kvpress_prefill import SEED, prefill
from bench.quality.tasks.sample import Sample

VOCAB, LAYERS, KV_HEADS = 64, 2, 2
STEPS = 5
LENGTHS = (9, 23, 14)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2 * KV_HEADS,
        num_key_value_heads=KV_HEADS,
        eos_token_id=VOCAB - 1,
        bos_token_id=None,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model()


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal, but for the order of sums."""
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def prompt(tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(VOCAB, (tokens,), generator=generator).tolist()


class Shrinking:
    """Keeps the keys of least norm; the first layer keeps more than the second."""

    def __init__(self, discard: float) -> None:
        self.discard = discard

    def post_init_from_model(self, model: Any) -> None:
        self.layers = model.config.num_hidden_layers

    def places(self, module: Any, keys: torch.Tensor) -> torch.Tensor:
        share = (1 - self.discard) * (1 - module.layer_idx / 2 / self.layers)
        count = max(1, int(keys.shape[2] * share))
        return (-keys.norm(dim=-1)).topk(count).indices

    def compress(
        self, module: Any, hidden: Any, keys: Any, values: Any, *_: Any
    ) -> tuple[Any, Any]:
        places = self.places(module, keys)[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, places), values.gather(2, places)


class Masking(Shrinking):
    """The same keys, as AdaKV does it: the others are masked."""

    def compress(
        self, module: Any, hidden: Any, keys: Any, values: Any, *_: Any
    ) -> tuple[Any, Any]:
        hidden = torch.ones(keys.shape[:3], dtype=torch.bool)
        hidden.scatter_(2, self.places(module, keys), False)
        module.masked_key_indices = hidden.nonzero(as_tuple=True)
        return keys, values


class Drawing(Shrinking):
    def places(self, module: Any, keys: torch.Tensor) -> torch.Tensor:
        return torch.rand(keys.shape[:3]).topk(self.kept(keys.shape[2])).indices

    def kept(self, tokens: int) -> int:
        return int(tokens * (1 - self.discard))


def alone(model: Any, row: Prefilled, tokens: list[int]) -> torch.Tensor:
    """Logits after each token, [tokens, vocab]."""
    cache, found = DynamicCache(), []
    for layer, (keys, values) in enumerate(zip(row.keys, row.values, strict=True)):
        cache.update(keys[None], values[None], layer)
    for step, token in enumerate(tokens):
        logits = model(
            input_ids=torch.tensor([[token]]),
            past_key_values=cache,
            position_ids=torch.tensor([[row.tokens + step]]),
        ).logits
        found.append(logits[0, -1])
    return torch.stack(found)


def together(
    model: Any, rows: list[Prefilled], columns: list[list[int]]
) -> list[torch.Tensor]:
    """Logits of each prompt after each of its tokens, [tokens, vocab]."""
    steps = []
    with Decoding(model, rows, STEPS) as state:
        for tokens in zip(*columns, strict=True):
            state.step(tokens)
            steps.append(state.logits)
    return list(torch.stack(steps, 1))


@pytest.fixture
def said() -> list[list[int]]:
    return [prompt(100 + n)[:STEPS] for n in LENGTHS]


@torch.inference_mode()
def test_prompts_of_all_lengths_decode_as_alone(
    model: Any, said: list[list[int]]
) -> None:
    presses = {"half": Shrinking(0.5), "most": Shrinking(0.8), "whole": None}
    found = [prefill(model, [prompt(n)], presses) for n in LENGTHS]
    for label in presses:
        rows = [one[label][0] for one in found]
        assert len({keys.shape[1] for row in rows for keys in row.keys}) > 2
        for one, row, tokens in zip(
            together(model, rows, said), rows, said, strict=True
        ):
            close(one, alone(model, row, tokens))
        # What is whole is decoded as if it had never been compressed.
        if label == "whole":
            ids = torch.tensor([prompt(LENGTHS[0]) + said[0]])
            truth = model(input_ids=ids).logits[0, -STEPS:]
            close(alone(model, rows[0], said[0]), truth)


@torch.inference_mode()
def test_rows_of_several_methods_decode_as_alone(model: Any) -> None:
    presses = {
        "masked": Masking(0.5),
        "whole": None,
        "half": Shrinking(0.5),
        "most": Shrinking(0.8),
    }
    # As many tokens are masked as the other method leaves out.
    alike = {"masked": "half"}
    rows: list[Prefilled] = []
    expected: list[Prefilled] = []
    for n in LENGTHS:
        found = {k: one[0] for k, one in prefill(model, [prompt(n)], presses).items()}
        rows += found.values()
        expected += [found[alike.get(label, label)] for label in found]
    assert {row.size for row in rows[:4]} == {
        (9, True),
        (9, False),
        (4, False),
        (1, False),
    }
    said = [prompt(100 + place)[:STEPS] for place in range(len(rows))]
    truth = [
        alone(model, row, tokens) for row, tokens in zip(expected, said, strict=True)
    ]
    for one, other in zip(together(model, rows, said), truth, strict=True):
        close(one, other)
    # Tokens that are known can be read at once, in one piece or several.
    for piece in (STEPS, 2):
        with Decoding(model, rows, STEPS) as state:
            read = [
                state.read([tokens[at : at + piece] for tokens in said])
                for at in range(0, STEPS, piece)
            ]
        for one, other in zip(torch.cat(read, 1), truth, strict=True):
            close(one, other)


@torch.inference_mode()
def test_masked_keys_count_for_nothing(model: Any, said: list[list[int]]) -> None:
    presses = {"masked": Masking(0.5), "shrunk": Shrinking(0.5)}
    # The first two share a prefill.
    contexts = [[prompt(9), prompt(9)[::-1]], [prompt(23)]]
    rows: dict[str, list[Prefilled]] = {"masked": [], "shrunk": []}
    for some in contexts:
        for label, made in prefill(model, some, presses).items():
            rows[label] += made
    assert [row.keys[0].shape[1] for row in rows["masked"]] == [9, 9, 23]
    for one, row, tokens in zip(
        together(model, rows["masked"], said), rows["shrunk"], said, strict=True
    ):
        close(one, alone(model, row, tokens))
    # Nothing of it stays behind.
    whole = prefill(model, [prompt(14)], {"whole": None})["whole"][0]
    before = alone(model, whole, said[0])
    together(model, rows["masked"], said)
    close(alone(model, whole, said[0]), before)


@torch.inference_mode()
def test_one_prefill_keeps_what_several_keep(model: Any) -> None:
    contexts = [prompt(14), prompt(14)[::-1]]
    presses = {"half": Shrinking(0.5), "most": Shrinking(0.8), "whole": None}
    at_once = prefill(model, contexts, presses)
    for label, press in presses.items():
        for place, context in enumerate(contexts):
            (single,) = prefill(model, [context], {label: press})[label]
            row = at_once[label][place]
            assert row.tokens == 14
            close(row.logits, single.logits)
            for name in ("keys", "values"):
                for a, b in zip(getattr(row, name), getattr(single, name), strict=True):
                    close(a, b)


@torch.inference_mode()
def test_every_ratio_draws_its_own_numbers(model: Any) -> None:
    # Neither the other ratios nor one that draws nothing put it out of step.
    presses = {"half": Drawing(0.5), "most": Drawing(0.75), "whole": None}
    found = {k: rows[0] for k, rows in prefill(model, [prompt(16)], presses).items()}
    for label in ("half", "most"):
        press = presses[label]
        assert press
        torch.manual_seed(SEED)
        for layer in range(LAYERS):
            scores = torch.rand(1, KV_HEADS, 16)[0]
            places = scores.topk(press.kept(16)).indices[..., None]
            whole = found["whole"].keys[layer]
            kept = whole.gather(1, places.expand(-1, -1, whole.shape[2]))
            close(found[label].keys[layer], kept)


def test_prompts_of_equal_shape_share_a_prefill() -> None:
    shapes = [("ask", 10), ("think", 10), ("ask", 10), ("ask", 12)]
    assert equal_shapes(shapes) == [[0, 2], [1], [3]]
    assert equal_shapes(shapes, most=10) == [[0], [2], [1], [3]]


def test_groups_wait_together_up_to_what_is_kept() -> None:
    held = [10, 20, 12, 40, 5, 1]
    assert joined(held, most=46) == [[0, 1, 2], [3, 4, 5]]
    assert joined(held, most=42) == [[0, 1, 2], [3], [4, 5]]
    assert joined(held, most=30) == [[0, 1], [2], [3], [4, 5]]
    assert joined([], most=30) == []


def test_rows_are_packed_up_to_their_padding() -> None:
    lengths = [10, 10, 10, 12, 40, 41]
    assert packed(lengths, rows=4, most=1000) == [[0, 1, 2, 3], [4, 5]]
    assert packed(lengths, rows=3, most=1000) == [[0, 1, 2], [3, 4, 5]]
    # Four rows of 12 tokens are 48, as many as they would be with their padding.
    assert packed(lengths, rows=9, most=48) == [[0, 1, 2, 3], [4], [5]]
    assert packed(lengths, rows=9, most=47) == [[0, 1, 2], [3], [4], [5]]
    assert packed([], rows=9, most=47) == []


@torch.inference_mode()
def test_a_dictated_token_is_in_the_reference_however_unlikely(model: Any) -> None:
    rows = [prefill(model, [prompt(n)], {"whole": None})["whole"][0] for n in LENGTHS]
    truth = [row.logits.log_softmax(-1) for row in rows]
    least, most = int(truth[0].argmin()), int(truth[1].argmax())
    targets = ((least, 3), (most,), (least, 5, 7))
    samples = [Sample("t", "g", 0, 0, 0, "", (), 9, "x", targets=t) for t in targets]
    made = think(model, rows, samples, None)
    for place, (one, tokens) in enumerate(zip(made, targets, strict=True)):
        reference = one.reference
        assert reference
        assert len(reference.ids) == len(reference.logprobs) == len(tokens)
        for at, token in enumerate(tokens):
            values = dict(zip(reference.ids[at], reference.logprobs[at], strict=True))
            assert len(values) == forced.TOP
            assert values[token] == pytest.approx(one.logprobs[at])
        assert one.logprobs[0] == pytest.approx(float(truth[place][tokens[0]]))
    assert made[0].reference.ids[0][-1] == least
    # What is listed already stays in its place.
    assert made[1].reference.ids[0][0] == most
