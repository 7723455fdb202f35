"""Hugging Face attention with masks: nothing is removed, evicted KVs are not seen."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, AutoModelForCausalLM


class MaskedModel:
    """A model whose heads each see what their own mask leaves them.

    Parameters
    ----------
    model_path : Hugging Face folder.
    ranks : among which the heads are divided; if there are more of them than KV heads,
        each head is that of several, with a part of its queries.

    Attributes
    ----------
    layers, heads : number of layers, and of KV heads in each, copies included.
    """

    def __init__(self, model_path: str, ranks: int = 1) -> None:
        AttentionInterface.register("kv_oracle", self._attend)
        self._model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, attn_implementation="kv_oracle"
        ).eval()
        config = self._model.config
        if getattr(config, "use_qk_norm", None) is False:
            # A switch of SGLang's MiniMax-M2 that transformers' does not know.
            for layer in self._model.model.layers:
                layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
        self.copies = max(ranks // config.num_key_value_heads, 1)
        self.layers = config.num_hidden_layers
        self.heads = config.num_key_value_heads * self.copies
        self.ranks = ranks
        self._running: MaskedTokens | None = None

    def run(self, tokens: MaskedTokens, ids: list[int], **inputs: Any) -> Any:
        """Hugging Face's output for `ids` behind `tokens`, which attend."""
        self._running = tokens
        with torch.no_grad():
            return self._model(torch.tensor([ids]), use_cache=True, **inputs)

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        del attention_mask, kwargs
        assert self._running is not None
        layer = module.layer_idx
        own = (kv[0].repeat_interleave(self.copies, 0) for kv in (key, value))
        out = self._running.attend(layer, query[0], *own, scaling)
        return out[None].transpose(1, 2), None

    def heads_of(self, rank: int) -> list[int]:
        """Rows of a rank's heads among all, in layer-major order."""
        own = self.heads // self.ranks
        return [
            layer * self.heads + head
            for layer in range(self.layers)
            for head in range(rank * own, (rank + 1) * own)
        ]


class MaskedTokens:
    """The tokens of one request, and what each head sees of them.

    Parameters
    ----------
    model : runs them.
    window : the last tokens of a forward that observe.
    power : of the attention that they pay.

    Attributes
    ----------
    length : how many there are.
    visible : [L * H, length] bool, in layer-major order.
    paid : by position of the query, and in the order of the layers: [H, n], what it, as
        it is remembered, paid to each position.
    keys, values : by layer, [H, length, head_dim].
    stored : keys and values that take the place of the model's, by layer: those of a
        server whose cache rounds them.
    made : those of the model, by layer.
    rounds : whether queries are remembered as a server does it.
    """

    def __init__(self, model: MaskedModel, window: int, power: int) -> None:
        self.model, self.window, self.power = model, window, power
        self.length = 0
        self.visible = torch.ones(model.layers * model.heads, 0, dtype=torch.bool)
        self.paid: dict[int, list[torch.Tensor]] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rounds = True
        self._cache: Any = None
        self._probing = 0

    def extend(self, ids: list[int]) -> torch.Tensor:
        """Run more tokens, causally, over everything that is visible; their logits."""
        self.length += len(ids)
        self.visible = pad(self.visible, (0, len(ids)), value=True)
        out = self.model.run(self, ids, past_key_values=self._cache)
        self._cache = out.past_key_values
        logits: torch.Tensor = out.logits[0]
        return logits

    def probe(self, ids: list[int], first: int) -> None:
        """Let `ids`, at positions `first` and on, observe in the place of the oldest
        of the last w tokens: each sees what that token sees. They leave nothing else.
        """
        places = torch.arange(first, first + len(ids))[None]
        self._probing = len(ids)
        self.model.run(self, ids, position_ids=places, past_key_values=self._cache)
        self._probing = 0
        self._cache.crop(self.length)

    def crop(self, length: int) -> None:
        """Forget all tokens from `length` on; what is masked before stays so."""
        self._cache.crop(length)
        self.length, self.visible = length, self.visible[:, :length]

    def keep_only(self, kept: list[list[int]], fold: int) -> None:
        """Mask everything below `fold` that is not in `kept` (per head)."""
        self.visible[:, :fold] = False
        for h, positions in enumerate(kept):
            self.visible[h, positions] = True

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """What a layer's heads read, [heads, new, head_dim]."""
        (heads, n, _), new = key.shape, query.shape[1]
        group = len(query) // heads
        kept = n - self._probing
        self.made[layer] = (key, value)
        if layer in self.stored:
            key, value = (part[:, :n] for part in self.stored[layer])
        self.keys[layer], self.values[layer] = key[:, :kept], value[:, :kept]
        keys = key.repeat_interleave(group, 0).transpose(1, 2)
        remembered = in_bytes(query) if self.rounds else query
        logits, coarse = (q * scaling @ keys for q in (query, remembered))
        own = self.visible[layer * heads : (layer + 1) * heads]
        visible = pad(own, (0, self._probing), value=True).repeat_interleave(group, 0)

        def masked(logits: torch.Tensor, last_seen: torch.Tensor) -> torch.Tensor:
            mask = visible[:, None] & (torch.arange(n) <= last_seen[:, None])
            return logits.masked_fill(~mask, float("-inf"))

        places = torch.arange(n - new, n)
        exact = masked(logits, places)
        # A probe observes as the tokens before it would.
        back = self.window if self._probing else 0
        seen = masked(coarse, places - back)
        found = seen.softmax(-1)
        for row in range(max(new - self.window, 0), new):
            mass = found[:, row].view(heads, group, n).pow(self.power).sum(1)
            by_layer = self.paid.setdefault(n - new + row - back, [])
            if len(by_layer) == self.model.layers:
                by_layer.clear()
            by_layer.append(mass[..., :kept])
        return exact.softmax(-1) @ value.repeat_interleave(group, 0)


def in_bytes(queries: torch.Tensor) -> torch.Tensor:
    """Queries [..., D] as a server with a byte an element remembers them.

    Multiples of a scale, the least power of 2 that makes the largest element 123 or
    less; of two scales in the first 8 elements.
    """
    scale = 2 ** (queries.abs().amax(-1, keepdim=True) / 123).log2().ceil()
    step = torch.ones(queries.shape[-1])
    step[:8] = 2
    sizes = (queries.abs() / scale / step).round() * step
    return queries.sign() * sizes.clamp(max=122 + (step < 2).float()) * scale
