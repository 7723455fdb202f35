"""Greedy decoding with Hugging Face transformers over a cache of any length."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

BATCH_TOKENS = 65_536
"""Most prompt tokens in one batch of prompts of equal length."""


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


class Decoding:
    """Prompts that are decoded together, one token a step."""

    def __init__(self, model: Any, cache: Any, position: int, logits: Any) -> None:
        self._model, self._cache, self._position = model, cache, position
        self.logits = logits

    def step(self, tokens: Any) -> None:
        """Feed a token of each prompt, at the positions that follow the prompt's."""
        import torch

        place = torch.full_like(tokens[:, None], self._position)
        self.logits = (
            self._model(
                input_ids=tokens[:, None],
                past_key_values=self._cache,
                position_ids=place,
            )
            .logits[:, -1]
            .float()
        )
        self._position += 1


def equal_shapes(
    shapes: Sequence[tuple[bool, int, int]], most: int = BATCH_TOKENS
) -> list[list[int]]:
    """Places of equal (likelihood, context, what follows), at most so many tokens."""
    groups: dict[tuple[bool, int, int], list[int]] = {}
    for place, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(place)
    batches = []
    for (_, tokens, _), places in groups.items():
        size = max(1, most // max(1, tokens))
        batches += [places[i : i + size] for i in range(0, len(places), size)]
    return batches
