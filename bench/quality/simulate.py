"""Many ways to score and share a budget, tried at once in Hugging Face: a scout.

    python -m bench.quality.simulate --model DIR --tasks multikey_few needle_uuids \\
        --length 1200 --samples 8 --seed 1 --rates 4 8 --out build/simulate.jsonl

A prompt is prefilled once with its last 256 queries observed; every candidate chooses
what each head keeps, and all of them decode as one batch, each under its own mask. What
it finds is to be measured again through the engine (`bench.quality run`): it says which
options are worth a server. Pages, protected tokens, sinks and selection are as served,
after prefill only; nothing is evicted while decoding.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.quality import metrics
from bench.quality.tasks import TASKS, make_sample
from bench.quality.tasks.corpus import DEFAULT_DATA, Corpus
from bench.quality.tasks.sample import Sample, encode
from bench.record import environment, read_lines, write_record
from sglang_kvc.kernels.select import cheapest_by_row
from sglang_kvc.options import PAGE_SIZE, KVCompressOptions

PROTECTED, SINKS = KVCompressOptions.protected, KVCompressOptions.sinks
MAX_WINDOW, MAX_NEW = 256, 128
FULL = "full"


@dataclass(frozen=True)
class Candidate:
    """One way to choose.

    Attributes
    ----------
    window : queries observed, at most `MAX_WINDOW`.
    back, ahead : a KV takes the highest score of those up to `back` before it and
        `ahead` behind it: what follows a match is kept with it.
    power : on the probabilities.
    reduce : sum or max over the queries.
    share : divide by the sum of the head's scores.
    value_norm : weigh by the norm of the value.
    allocation : joint, layer or head.
    floor : part of the budget that every head keeps.
    """

    window: int = KVCompressOptions.window
    back: int = KVCompressOptions.pool_back
    ahead: int = KVCompressOptions.pool_ahead
    power: int = 2
    reduce: str = "sum"
    share: bool = False
    value_norm: bool = False
    allocation: str = "joint"
    floor: float = 0.0

    @property
    def name(self) -> str:
        """What differs from the server's defaults."""
        plain = Candidate()
        words = [
            f"{field}={value}"
            for field, value in vars(self).items()
            if value != getattr(plain, field)
        ]
        return ",".join(words) or "plain"


CANDIDATES = (
    *(Candidate(window=window) for window in (16, 32, 64, 128, 256)),
    *(Candidate(back=back) for back in (0, 3, 16, 48, 64, 96)),
    *(Candidate(ahead=ahead) for ahead in (0, 8, 32)),
    *(Candidate(window=64, back=back) for back in (3, 64)),
    Candidate(power=1),
    Candidate(reduce="max"),
    Candidate(share=True),
    Candidate(value_norm=True),
    Candidate(window=64, value_norm=True),
    Candidate(allocation="layer"),
    Candidate(allocation="head"),
    Candidate(floor=0.25),
)


class Observer:
    """Attention of the model: exact in prefill, masked per candidate in decoding.

    Attributes
    ----------
    seen : for each layer, probabilities of the last queries [H, G, w, n] and the norms
        of the values [H, n].
    visible : [candidates, L, H, tokens] bool, while decoding.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.visible = torch.empty(0)

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """[batch, new, Hq, D], as Hugging Face wants it."""
        del attention_mask, kwargs
        batch, heads, new, dim = query.shape
        kv_heads, n = key.shape[1:3]
        grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
        if new == 1:
            logits = (grouped @ key[:, :, None].transpose(3, 4)) * scaling
            hidden = ~self.visible[:, module.layer_idx, :, None, None, :n]
            probs = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
            out = (probs @ value[:, :, None]).flatten(1, 2)
            return out.transpose(1, 2), None
        window = min(MAX_WINDOW, new)
        logits = (grouped[0, :, :, -window:] @ key[0, :, None].transpose(2, 3)).float()
        later = torch.arange(n) > torch.arange(n - window, n)[:, None]
        logits = (logits * scaling).masked_fill_(later.to(key.device), float("-inf"))
        self.seen.append((logits.softmax(-1), value[0].float().norm(dim=-1)))
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    def scores(self, candidate: Candidate) -> torch.Tensor:
        """[L * H, n] pooled scores of a prompt."""
        rows = []
        for probs, norms in self.seen:
            paid = probs[:, :, -candidate.window :].pow(candidate.power).flatten(1, 2)
            mass = paid.amax(1) if candidate.reduce == "max" else paid.sum(1)
            if candidate.share:
                mass = mass / mass.sum(1, keepdim=True)
            rows.append(mass * norms if candidate.value_norm else mass)
        score = torch.cat(rows)[None]
        back, ahead = candidate.back, candidate.ahead
        padded = functional.pad(score, (back, ahead))
        return functional.max_pool1d(padded, back + ahead + 1, stride=1)[0]


def keep(scores: torch.Tensor, layers: int, budget: int, c: Candidate) -> torch.Tensor:
    """[L * H, n] bool: what stays at `budget` tokens a head on average."""
    heads, n = scores.shape
    fold = n // PAGE_SIZE * PAGE_SIZE
    own = scores[:, :fold].clone()
    own[:, :SINKS] = own[:, n - PROTECTED :] = float("inf")
    order = own.argsort(dim=1, stable=True)
    price = own.gather(1, order)[:, PAGE_SIZE - 1 :: PAGE_SIZE]
    price = price[:, : fold // PAGE_SIZE - int(budget * c.floor) // PAGE_SIZE]
    evict = (fold // PAGE_SIZE - budget // PAGE_SIZE) * heads
    groups = {"joint": 1, "layer": layers, "head": heads}[c.allocation]
    lost = [
        cheapest_by_row(own_prices, torch.ones_like(own_prices) > 0, evict // groups)
        for own_prices in price.chunk(groups)
    ]
    stays = torch.ones(heads, n, dtype=torch.bool, device=scores.device)
    rank = (
        torch.arange(fold, device=scores.device) >= PAGE_SIZE * torch.cat(lost)[:, None]
    )
    stays[:, :fold].scatter_(1, order, rank)
    return stays


class Simulator:
    """A model and what is to be tried on it."""

    def __init__(self, model: str, rates: list[float], device: str) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

        self.observer, self.rates, self.device = Observer(), rates, device
        AttentionInterface.register("kv_simulate", self.observer)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="kv_simulate"
        )
        self.model: Any = loaded.eval().to(device)
        self.layers: int = self.model.config.num_hidden_layers

    @torch.no_grad()
    def scores(self, sample: Sample) -> dict[str, float]:
        """Score of the answer, by rate and candidate."""
        ids = encode(self.tokenizer, sample)
        observer, n = self.observer, len(ids)
        observer.seen = []
        prompt = torch.tensor([ids], device=self.device)
        out = self.model(prompt, use_cache=True, logits_to_keep=1)
        masks = {FULL: torch.ones_like(observer.scores(Candidate()), dtype=torch.bool)}
        for rate in self.rates:
            budget = math.ceil(n / rate / PAGE_SIZE) * PAGE_SIZE
            for candidate in CANDIDATES:
                chosen = keep(
                    observer.scores(candidate), self.layers, budget, candidate
                )
                masks[f"{rate:g}|{candidate.name}"] = chosen
        stacked = torch.stack(list(masks.values())).unflatten(1, (self.layers, -1))
        observer.visible = functional.pad(stacked, (0, MAX_NEW), value=True)
        out.past_key_values.batch_repeat_interleave(len(masks))
        token = out.logits[0, -1].argmax().expand(len(masks))
        tokens, ended = [token], token == self.tokenizer.eos_token_id
        while len(tokens) < min(sample.max_new_tokens, MAX_NEW) and not ended.all():
            out = self.model(
                token[:, None], past_key_values=out.past_key_values, use_cache=True
            )
            token = out.logits[:, -1].argmax(-1)
            tokens.append(token)
            ended = ended | (token == self.tokenizer.eos_token_id)
        texts = map(self._text, torch.stack(tokens, 1).tolist())
        scorer = metrics.SCORERS[sample.scorer]
        return {
            name: scorer(_cut(text, sample.stop), sample.answers)
            for name, text in zip(masks, texts, strict=True)
        }

    def _text(self, ids: list[int]) -> str:
        end = self.tokenizer.eos_token_id
        ids = ids[: ids.index(end)] if end in ids else ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _cut(text: str, stops: tuple[str, ...]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def table(lines: list[dict[str, Any]]) -> str:
    """Mean score of every candidate by task, in percent."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for name, score in line["scores"].items():
            found[name][line["task"]].append(score)
    tasks = sorted({line["task"] for line in lines})
    rows = [f"{'':34} " + " ".join(f"{task[:12]:>12}" for task in tasks) + "   mean"]
    for name, by_task in found.items():
        means = [100 * sum(s) / len(s) for s in (by_task[task] for task in tasks) if s]
        cells = " ".join(f"{mean:12.0f}" for mean in means)
        rows.append(f"{name:34} {cells} {sum(means) / len(means):6.1f}")
    return "\n".join(rows)


def main() -> None:
    """Try all candidates, sample by sample; goes on where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", nargs="+", required=True, choices=list(TASKS))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1, help="odd: not used in tables")
    parser.add_argument("--rates", type=float, nargs="+", default=[4, 8])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    end = time.monotonic() + args.deadline
    device = "cuda" if torch.cuda.is_available() else "cpu"
    simulator = Simulator(args.model, args.rates, device)
    corpus, origin = Corpus(args.data), environment()
    lines = read_lines(args.out) if args.out.exists() else []
    done = {(line["task"], line["index"], line["length"]) for line in lines}
    for index in range(args.samples):
        for task in args.tasks:
            if time.monotonic() > end or (task, index, args.length) in done:
                continue
            sample = make_sample(
                TASKS[task], args.length, args.seed, index, simulator.tokenizer, corpus
            )
            key = {"task": task, "index": index, "length": args.length}
            line = {**key, "seed": args.seed, "scores": simulator.scores(sample)}
            write_record(args.out, {**origin, "simulated": True, **line})
            lines.append(line)
            print(task, index, line["scores"][FULL], flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
