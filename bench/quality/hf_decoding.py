"""Decoding with Hugging Face transformers over caches of any lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.quality.hf_attention import NAME, register, visible

PREFILL_TOKENS = 65_536
"""Most tokens of prompts of equal length that are prefilled at once."""
HELD_TOKENS = 524_288
"""Most tokens that all methods and settings together keep of prompts that wait for
their decoding. With `DECODE_TOKENS`, 28 GiB on a model of 28 KiB a token."""
DECODE_ROWS = 512
"""Most rows that are decoded at once: a step's launches cost the same for one."""
DECODE_TOKENS = 524_288
"""Most tokens of the rows that are decoded at once, each padded to the longest."""


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
        A layer each: keys that are in the cache and that no query may see, kvpress'
        ``masked_key_indices``.
    """

    tokens: int
    logits: Any
    keys: Sequence[Any]
    values: Sequence[Any]
    masked: Sequence[tuple[Any, Any] | None]

    @property
    def size(self) -> tuple[int, bool]:
        """Most tokens in a layer, and whether keys among them are masked."""
        longest = max(keys.shape[1] for keys in self.keys)
        return longest, any(one is not None for one in self.masked)


class Decoding:
    """Prompts that are decoded together; their caches are copied.

    Shorter caches are padded on the left, in each layer to the longest of that layer.
    To be used as a context: meanwhile the model's attention sees these caches.

    Parameters
    ----------
    model
        Of transformers, one configuration for all layers.
    prompts : sequence of Prefilled
    steps : int
        Most tokens that will be fed of each.

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
        # Layers of the same lengths in which nothing is hidden share a mask.
        masks: dict[tuple[int, ...], Any] = {}
        self._masks = []
        for layer in range(len(self._attention)):
            rows = [prompt.keys[layer] for prompt in prompts]
            lengths = tuple(keys.shape[1] for keys in rows)
            values = [prompt.values[layer] for prompt in prompts]
            self._cache.update(_padded(rows), _padded(values), layer)
            hidden = [prompt.masked[layer] for prompt in prompts]
            plain = all(one is None for one in hidden)
            key = lengths if plain else (*lengths, layer)
            if key not in masks:
                heads = rows[0].shape[0]
                masks[key] = visible(lengths, steps, hidden, heads, model.device)
            self._masks.append(masks[key])

    def __enter__(self) -> Decoding:
        """Let the model's attention see these caches."""
        register()
        self._config = self._attention[0].config
        self._before = self._config._attn_implementation
        self._config._attn_implementation = NAME
        for module in self._attention:
            hook = module.register_forward_pre_hook(self._see, with_kwargs=True)
            self._hooks.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the model back as it was."""
        self._config._attn_implementation = self._before
        while self._hooks:
            self._hooks.pop().remove()

    def step(self, tokens: Sequence[int]) -> None:
        """Feed a token of each prompt."""
        self.logits = self.read([[token] for token in tokens])[:, -1]

    def read(self, tokens: Sequence[Sequence[int]]) -> Any:
        """Feed tokens of each prompt, equally many; what follows each of them.

        Returns
        -------
        [prompts, tokens, vocab] fp32
        """
        import torch

        ids = torch.tensor(tokens, device=self._model.device)
        places = self._positions + torch.arange(ids.shape[1], device=ids.device)
        logits = self._model(
            input_ids=ids, past_key_values=self._cache, position_ids=places
        ).logits.float()
        self._positions = self._positions + ids.shape[1]
        return logits

    def _see(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # transformers would make one mask for all layers.
        before = self._cache.get_seq_length(module.layer_idx)
        new = kwargs["hidden_states"].shape[1]
        mask = self._masks[module.layer_idx]
        if mask is not None:
            mask = mask[..., : before + new]
        if new > 1:
            causal = self._positions.new_ones(new, before + new).tril(before) > 0
            mask = causal[None, None] if mask is None else mask & causal
        return args, kwargs | {"attention_mask": mask}


def _padded(rows: Sequence[Any]) -> Any:
    """Rows [kv_heads, n, head_dim] as one tensor, zeros before the shorter ones."""
    longest = max(row.shape[1] for row in rows)
    heads, _, size = rows[0].shape
    whole = rows[0].new_zeros(len(rows), heads, longest, size)
    for place, row in enumerate(rows):
        whole[place, :, longest - row.shape[1] :] = row
    return whole


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


def joined(held: Sequence[int], most: int = HELD_TOKENS) -> list[list[int]]:
    """Places of neighbouring groups that wait for their decoding together.

    Parameters
    ----------
    held : sequence of int
        Tokens that are kept of each group.
    most : int
        Most of them, where a batch has more than one group.
    """
    return _neighbours(held, lambda some: sum(some) <= most)


def packed(
    lengths: Sequence[int], rows: int = DECODE_ROWS, most: int = DECODE_TOKENS
) -> list[list[int]]:
    """Places of neighbouring rows that are decoded together.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each row's cache; sorted, they need the least padding.
    rows, most : int
        Most rows, and most tokens with the padding to the longest.
    """
    return _neighbours(
        lengths, lambda some: len(some) <= rows and len(some) * max(some) <= most
    )


def _neighbours(
    sizes: Sequence[int], fit: Callable[[Sequence[int]], bool]
) -> list[list[int]]:
    """Places of neighbours, as many together as fit; one is always alone."""
    batches: list[list[int]] = []
    for place in range(len(sizes)):
        start = batches[-1][0] if batches else place
        if batches and fit(sizes[start : place + 1]):
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches
