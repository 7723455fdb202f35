"""A prompt is read once and compressed by every method and ratio that is asked for.

A method of kvpress compresses a layer's cache after that layer's attention over all of
the prompt, and nothing that is computed later in the prefill reads that cache. So a
prefill is the same whatever is kept of it, and one prefill serves all methods and
ratios: here the model's own cache stays whole, and what each keeps is set aside.
Methods that want to see the prompt repeated get a second reading, behind the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from bench.quality.hf_decoding import Prefilled, attention_layers

Label = TypeVar("Label")
SEED = 0
"""Of the methods that draw numbers, for every prefill."""


class Kept:
    """What one press keeps of prompts of equal length; an entry a layer.

    Parameters
    ----------
    press
        A ``kvpress.BasePress`` whose hook does no more than to ``compress``; None
        keeps everything.
    """

    def __init__(self, press: Any) -> None:
        self.press = press
        # Whether it chooses when the prompt is read once more.
        self.again = bool(getattr(press, "reads_again", False))
        self.keys: list[Any] = []
        self.values: list[Any] = []
        self.masked: list[Any] = []

    def compress(
        self,
        module: Any,
        kwargs: dict[str, Any],
        keys: Any,
        values: Any,
        attentions: Any,
    ) -> None:
        """Set aside what is kept of a layer's keys and values."""
        # A method for which heads keep different numbers leaves the cache as it is.
        module.masked_key_indices = None
        if self.press is not None:
            hidden = kwargs["hidden_states"]
            keys, values = self.press.compress(
                module, hidden, keys, values, attentions, kwargs
            )
        self.keys.append(keys)
        self.values.append(values)
        self.masked.append(_split(module.masked_key_indices, keys))
        module.masked_key_indices = None

    def row(self, place: int, tokens: int, logits: Any) -> Prefilled:
        """One of the prompts."""
        return Prefilled(
            tokens,
            logits,
            [keys[place] for keys in self.keys],
            [values[place] for values in self.values],
            [rows[place] for rows in self.masked],
        )


def prefill(
    model: Any, contexts: Sequence[Sequence[int]], presses: Mapping[Label, Any]
) -> dict[Label, list[Prefilled]]:
    """Prompts of equal length, compressed after the whole of them.

    Parameters
    ----------
    model
        Of transformers.
    contexts : sequence of sequence of int
        Tokens of each prompt.
    presses : mapping of any label to press
        As `Kept` wants them.

    Returns
    -------
    dict of label to list of Prefilled
        A prompt each. What a press leaves whole is one tensor for all.
    """
    import torch
    from transformers import DynamicCache

    ids = torch.tensor(contexts, device=model.device)
    cache = DynamicCache()
    kept = {label: Kept(press) for label, press in presses.items()}
    reading = {label: one for label, one in kept.items() if not one.again}
    random = _generator(model.device)

    def compress(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        del args
        layer = cache.layers[module.layer_idx]
        for label, one in reading.items():
            # Every press draws the numbers that it would draw alone.
            random.set_state(states[label])
            one.compress(module, kwargs, layer.keys, layer.values, output[1])
            states[label] = random.get_state()

    modules = attention_layers(model)
    for one in kept.values():
        if one.press is not None:
            one.press.post_init_from_model(model)
    hooks = []
    try:
        for module in modules:
            # Expected Attention rotates by the positions to come.
            module.rotary_emb = model.get_decoder().rotary_emb
            hooks.append(module.register_forward_hook(compress, with_kwargs=True))
        torch.manual_seed(SEED)
        states = dict.fromkeys(kept, random.get_state())
        with torch.inference_mode():
            logits = model(
                input_ids=ids, past_key_values=cache, logits_to_keep=1
            ).logits
            if reading := {label: one for label, one in kept.items() if one.again}:
                model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    final = logits[:, -1].float()
    tokens = len(contexts[0])
    return {
        label: [one.row(i, tokens, final[i]) for i in range(len(contexts))]
        for label, one in kept.items()
    }


def _generator(device: Any) -> Any:
    """Where a device's random numbers come from."""
    import torch

    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _split(indices: tuple[Any, Any, Any] | None, keys: Any) -> list[Any]:
    """Masked (heads, places) of each row of keys [rows, kv_heads, n, head_dim]."""
    if indices is None:
        return [None] * len(keys)
    batch, heads, places = (part.to(keys.device) for part in indices)
    rows = [batch == row for row in range(len(keys))]
    return [(heads[row], places[row]) for row in rows]
