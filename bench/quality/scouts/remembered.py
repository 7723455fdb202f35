"""What a pass keeps, by how it remembers queries and what softmax divides by: a scout.

    python -m bench.quality.scouts.remembered --model DIR --tasks multikey_uuids \\
        --seed 0 --samples 3 --rates 16 --out bench/results/quality_check.jsonl

A prompt is prefilled in Hugging Face. Then the pass behind it chooses, with the options
as shipped and the references of the kernels, once from exact queries and once for every
one of `WAYS`. The record says how many of the kept KVs are those of exact queries.
"""

from __future__ import annotations

import argparse
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common.record import environment, write_record
from bench.quality.scouts.simulate import samples_left, scout_arguments
from bench.quality.tasks import TASKS
from bench.quality.tasks.sample import encode
from sglang_kvc.config.keep import Keep
from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.config.pages import ceil_tokens, floor_tokens, pages_of
from sglang_kvc.eviction.runner import least_pages, pooling, rule_of
from sglang_kvc.kernels.key_diff import key_diff_ref
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables
from sglang_kvc.kernels.novelty import add_novelty_ref
from sglang_kvc.kernels.pass_plan import PassRequest, build_plan
from sglang_kvc.kernels.pool import pool_scores_ref
from sglang_kvc.kernels.query_ring import decode_ref, encode_ref
from sglang_kvc.kernels.select import select_entries_ref
from sglang_kvc.memory.metadata import ModelShape

NAME = "kv_remembered"
LOG2E = 1.4426950408889634


class Way(NamedTuple):
    """Whether logits and log-sum-exps are of exact queries; the dtype of the latter."""

    exact: bool
    exact_sums: bool
    dtype: torch.dtype = torch.float32


EXACT = Way(True, True)
WAYS = {
    "exact, sums in fp16": Way(True, True, torch.float16),
    "remembered": Way(False, False),
    "remembered, sums in fp16": Way(False, False, torch.float16),
    "remembered, sums of exact queries": Way(False, True),
    "remembered, sums of exact queries in fp16": Way(False, True, torch.float16),
}


class Layer(NamedTuple):
    """Of a prompt: the last queries [H, w, G, D], keys and values [H, n, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Listener:
    """Attention of transformers that notes what every layer sees of a prompt."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.layers: list[Layer] = []

    def __call__(
        self, module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
    ) -> tuple[Any, None]:
        """Causal attention; shapes are transformers'."""
        last = query[0, :, -self.window :].unflatten(0, (key.shape[1], -1))
        self.layers.append(Layer(last.transpose(1, 2), key[0], value[0]))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=module.scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None


class Prompt:
    """A prefilled prompt whose pass is about to run.

    Parameters
    ----------
    layers : of its attention.
    sm_scale : factor on the logits.
    rate : how much is kept.
    """

    def __init__(self, layers: list[Layer], sm_scale: float, rate: float) -> None:
        self.layers, self.sm_scale = layers, sm_scale
        self.options = options = KVCompressOptions()
        heads, self.tokens, dim = layers[0].k.shape
        group = layers[0].q.shape[2]
        shape = ModelShape(len(layers), heads, heads * group, dim, 2, 2)
        self.rule = rule_of(options, shape, prompt=True)
        fold = floor_tokens(self.tokens)
        kept = pages_of(ceil_tokens(Keep(rate=rate).tokens(self.tokens)))
        protected = max(fold - (self.tokens - options.protected), 0)
        least = least_pages(options, kept, protected)
        request = PassRequest(
            slot=1,
            seq_len=self.tokens,
            fold_old=0,
            fold_new=fold,
            query_start=self.tokens - options.window,
            packed_pages=0,
            evict_pages=fold // PAGE_SIZE - kept,
            evict_most_pages=fold // PAGE_SIZE - least,
            protected=protected,
            is_first=True,
            repeated=False,
            pool_tail=True,
        )
        self.plan = build_plan([request], shape.heads_per_page, "cpu")
        self.arena, self.tables = self._memory(shape)

    def _memory(self, shape: ModelShape) -> tuple[Arena, BlockTables]:
        """The arena that holds the prompt from page 1 on, and its tables."""
        pages = 1 + pages_of(ceil_tokens(self.tokens))
        cells = (pages, shape.num_layers, shape.num_kv_heads, PAGE_SIZE)
        sides = []
        for name in ("k", "v"):
            side = torch.zeros(*cells, shape.head_dim, dtype=self.layers[0].k.dtype)
            flat = side[1:].permute(1, 2, 0, 3, 4).flatten(2, 3).clone()
            for layer, seen in enumerate(self.layers):
                flat[layer, :, : self.tokens] = getattr(seen, name)
            side[1:] = flat.unflatten(2, (-1, PAGE_SIZE)).permute(2, 0, 1, 3, 4)
            sides.append(side)
        ints = {"dtype": torch.int32}
        tokens = torch.zeros(2, pages * PAGE_SIZE, **ints)
        tokens[1, : self.tokens] = torch.arange(self.tokens) + PAGE_SIZE
        tables = BlockTables(
            tokens,
            torch.zeros(2, **ints),
            torch.zeros(2, shape.heads_per_page + 1, **ints),
            torch.zeros(2, pages, **ints),
        )
        return Arena(*sides, torch.zeros(cells)), tables

    def scores(self, way: Way) -> tuple[torch.Tensor, float]:
        """Scores in the plan's layout, and the largest log2 of a probability."""
        scores = torch.zeros(self.plan.num_entries).view(
            len(self.layers), len(self.layers[0].k), -1
        )
        largest = float("-inf")
        for layer, (exact, rounded) in enumerate(self.logits):
            sums = _log2_sums(exact if way.exact_sums else rounded).to(way.dtype)
            chance = (exact if way.exact else rounded) - sums.float()
            largest = max(largest, float(chance.max()))
            mass = chance.exp2().square().sum((1, 2))
            lengths = self.layers[layer].v.float().norm(dim=-1)
            scores[layer, :, : self.tokens] = mass * lengths
        # What overflows is the largest there is.
        return scores.view(-1).nan_to_num(0.0), largest

    @cached_property
    def logits(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every layer, of exact and of remembered queries, for all ways."""
        found = []
        for seen in self.layers:
            remembered = decode_ref(encode_ref(seen.q), seen.q.dtype)
            found.append((self._logits(seen, seen.q), self._logits(seen, remembered)))
        return found

    def _logits(self, seen: Layer, q: torch.Tensor) -> torch.Tensor:
        """[H, w, G, n] on the scale of log2; -inf where a query sees nothing."""
        keys = seen.k.float().transpose(1, 2)[:, None]
        logits = q.float() @ keys * (self.sm_scale * LOG2E)
        places = torch.arange(self.tokens)
        hidden = places > places[-q.shape[1] :, None]
        return logits.masked_fill(hidden[:, None], float("-inf"))

    def kept(self, scores: torch.Tensor) -> set[int]:
        """Rows of the arena that survive."""
        options, plan, tables = self.options, self.plan, self.tables
        spread = pool_scores_ref(tables, plan, scores, pooling=pooling(options))
        diffs = key_diff_ref(self.arena, tables, plan)
        unit = torch.zeros(2)
        weight = options.distinct_weight
        add_novelty_ref(tables, plan, spread, diffs, unit, weight=weight)
        chosen = select_entries_ref(tables, plan, spread, rule=self.rule)
        return set(chosen.source_rows.tolist())


def _log2_sums(logits: torch.Tensor) -> torch.Tensor:
    return (logits / LOG2E).logsumexp(-1, keepdim=True) * LOG2E


def compare(prompt: Prompt) -> dict[str, Any]:
    """What every way keeps of a prompt beside what exact queries keep."""
    want = prompt.kept(prompt.scores(EXACT)[0])
    largest_sum = max(float(_log2_sums(exact).max()) for exact, _ in prompt.logits)
    found: dict[str, Any] = {"kept": len(want), "largest_log2_sum": round(largest_sum)}
    for name, way in WAYS.items():
        scores, largest = prompt.scores(way)
        same = len(prompt.kept(scores) & want)
        found[name] = {"same": same, "largest_log2_probability": round(largest, 1)}
    return found


def parse_arguments() -> argparse.Namespace:
    """Those of the scouts."""
    return scout_arguments(__doc__, tuple(TASKS), samples=3).parse_args()


def main() -> None:
    """Prefill, compare, record."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    args = parse_arguments()
    listener = Listener(KVCompressOptions().window)
    AttentionInterface.register(NAME, listener)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, attn_implementation=NAME
    ).eval()
    scale = model.model.layers[0].self_attn.scaling
    for key, sample in samples_left(args, [], tokenizer):
        listener.layers = []
        with torch.no_grad():
            model(torch.tensor([encode(tokenizer, sample)]), logits_to_keep=1)
        for rate in args.rates:
            found = compare(Prompt(listener.layers, scale, rate))
            name = Path(args.model).name
            about = {"check": "remembered queries", "model": name, "rate": rate}
            record = {**environment(), **about, "seed": args.seed, **key, **found}
            write_record(args.out, record)
            for way, of in found.items():
                print(rate, key, way, of, flush=True)


if __name__ == "__main__":
    main()
