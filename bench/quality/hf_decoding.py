"""Decoding with Hugging Face transformers over caches of any lengths."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

PREFILL_TOKENS = 65_536
"""Most tokens of prompts of equal length that are prefilled at once."""
DECODE_PROMPTS = 32
"""Most prompts of different lengths that are decoded at once: a step's launches cost
the same for one of them."""
DECODE_TOKENS = 131_072
"""Most tokens of the prompts that are decoded at once, each padded to the longest."""


@functools.cache
def load(model: str) -> Any:
    """The model, once per process."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    gpu = torch.cuda.is_available()
    return (
        AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.bfloat16 if gpu else torch.float32,
            attn_implementation="sdpa",
        )
        .to("cuda" if gpu else "cpu")
        .eval()
    )


def attention_layers(model: Any) -> list[Any]:
    """The modules of attention, a layer each."""
    return [layer.self_attn for layer in model.get_decoder().layers]


@dataclass(frozen=True)
class Prefilled:
    """A prompt that was read, and what is left of its cache.

    Attributes
    ----------
    tokens : int
        The prompt's length, which is the position of what follows.
    logits : [vocab] fp32
        Of what follows.
    keys, values : sequence of [kv_heads, kept, head_dim]
        A layer each; `kept` may differ between layers.
    masked : sequence of None or (heads, places)
        A layer each: keys that are in the cache and that no query may see, for
        attention that knows kvpress' ``masked_key_indices``.
    """

    tokens: int
    logits: Any
    keys: Sequence[Any]
    values: Sequence[Any]
    masked: Sequence[tuple[Any, Any] | None]


class Decoding:
    """Prompts that are decoded together, one token a step; their caches are copied.

    Shorter caches are padded on the left, in each layer to the longest of that layer.
    To be used as a context: meanwhile the model's attention sees these caches.

    Parameters
    ----------
    model
        Of transformers, with ``sdpa``.
    prompts : sequence of Prefilled
    steps : int
        Most steps that will be made.

    Attributes
    ----------
    logits : [prompts, vocab] fp32
        Of what follows.
    """

    def __init__(self, model: Any, prompts: Sequence[Prefilled], steps: int) -> None:
        import torch
        from transformers import DynamicCache

        self._model, self._attention = model, attention_layers(model)
        self._cache = DynamicCache()
        self._hooks: list[Any] = []
        tokens = [[prompt.tokens] for prompt in prompts]
        self._positions = torch.tensor(tokens, device=model.device)
        self.logits = torch.stack([prompt.logits for prompt in prompts])
        # Layers of the same lengths share a mask.
        masks: dict[tuple[int, ...], Any] = {}
        self._masks, self._hidden = [], []
        for layer in range(len(self._attention)):
            rows = [prompt.keys[layer] for prompt in prompts]
            lengths = tuple(keys.shape[1] for keys in rows)
            values = [prompt.values[layer] for prompt in prompts]
            self._cache.update(_padded(rows), _padded(values), layer)
            if lengths not in masks:
                masks[lengths] = _mask(lengths, steps, model.device)
            self._masks.append(masks[lengths])
            hidden = [prompt.masked[layer] for prompt in prompts]
            self._hidden.append(_hidden(hidden, lengths))

    def __enter__(self) -> Decoding:
        """Let the model's attention see these caches."""
        for module, hidden in zip(self._attention, self._hidden, strict=True):
            module.masked_key_indices = hidden
            hook = module.register_forward_pre_hook(self._see, with_kwargs=True)
            self._hooks.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the model back as it was."""
        for module in self._attention:
            module.masked_key_indices = None
        while self._hooks:
            self._hooks.pop().remove()

    def step(self, tokens: Sequence[int]) -> None:
        """Feed a token of each prompt."""
        import torch

        ids = torch.tensor(tokens, device=self._model.device)[:, None]
        self.logits = (
            self._model(
                input_ids=ids,
                past_key_values=self._cache,
                position_ids=self._positions,
            )
            .logits[:, -1]
            .float()
        )
        self._positions = self._positions + 1

    def _see(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # transformers makes one mask for all layers.
        mask = self._masks[module.layer_idx]
        if mask is not None:
            mask = mask[..., : self._cache.get_seq_length(module.layer_idx) + 1]
        return args, kwargs | {"attention_mask": mask}


def _padded(rows: Sequence[Any]) -> Any:
    """Rows [kv_heads, n, head_dim] as one tensor, zeros before the shorter ones."""
    longest = max(row.shape[1] for row in rows)
    heads, _, size = rows[0].shape
    whole = rows[0].new_zeros(len(rows), heads, longest, size)
    for place, row in enumerate(rows):
        whole[place, :, longest - row.shape[1] :] = row
    return whole


def _mask(lengths: Sequence[int], steps: int, device: Any) -> Any:
    """What may be seen, [rows, 1, 1, longest + steps]; None if that is everything."""
    import torch

    longest = max(lengths)
    if min(lengths) == longest:
        return None
    padding = torch.tensor([longest - n for n in lengths], device=device)
    columns = torch.arange(longest + steps, device=device)
    return (columns >= padding[:, None])[:, None, None]


def _hidden(
    rows: Sequence[tuple[Any, Any] | None], lengths: Sequence[int]
) -> tuple[Any, Any, Any] | None:
    """Keys (batch, heads, places) that no query may see, in the padded batch."""
    import torch

    longest = max(lengths)
    parts = [
        (torch.full_like(row[0], place), row[0], row[1] + longest - length)
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True))
        if row is not None
    ]
    if not parts:
        return None
    batch, heads, places = (torch.cat(part) for part in zip(*parts, strict=True))
    return batch, heads, places


def equal_shapes(
    shapes: Sequence[tuple[Hashable, int]], most: int = PREFILL_TOKENS
) -> list[list[int]]:
    """Places of equal (kind, prompt tokens), which share a prefill.

    Parameters
    ----------
    shapes : sequence of (kind, prompt tokens)
    most : int
        Most tokens in one of them.
    """
    groups: dict[tuple[Hashable, int], list[int]] = {}
    for place, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(place)
    batches = []
    for (_, tokens), places in groups.items():
        size = max(1, most // max(1, tokens))
        batches += [places[i : i + size] for i in range(0, len(places), size)]
    return batches


def joined(
    groups: Sequence[tuple[int, int]],
    prompts: int = DECODE_PROMPTS,
    most: int = DECODE_TOKENS,
) -> list[list[int]]:
    """Places of neighbouring groups that are decoded together; none is split.

    Parameters
    ----------
    groups : sequence of (number of prompts, tokens of each)
    prompts, most : int
        Most prompts, and most tokens with the padding to the longest, where a batch
        has more than one group.
    """
    batches: list[list[int]] = []
    count = longest = 0
    for place, (size, tokens) in enumerate(groups):
        count, longest = count + size, max(longest, tokens)
        if place and count <= prompts and count * longest <= most:
            batches[-1].append(place)
        else:
            batches.append([place])
            count, longest = size, tokens
    return batches
