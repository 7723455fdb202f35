"""Many ways to score and share a budget, tried at once in Hugging Face: a scout.

    python -m bench.quality.scouts.simulate --model DIR \\
        --tasks multikey_few needle_uuids --length 1200 --samples 8 --seed 1 \\
        --rates 4 8 --out build/simulate.jsonl

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.common.record import environment, read_lines, write_record
from bench.quality import metrics
from bench.quality.forced import likelihood
from bench.quality.scouts.simulate_choice import CANDIDATES, Candidate, Observer, keep
from bench.quality.tasks import TASKS, make_sample
from bench.quality.tasks.corpus import DEFAULT_DATA, Corpus
from bench.quality.tasks.sample import (
    DICTATED,
    LIKELIHOOD,
    Sample,
    cut_at,
    encode,
    encode_parts,
)
from sglang_kvc.config.keep import Keep

MAX_NEW = 128
FULL = "full"


class Simulator:
    """A model and what is to be tried on it."""

    def __init__(
        self,
        model: str,
        rates: list[float],
        observer: Observer | None = None,
    ) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

        self.observer, self.rates = observer or Observer(), rates
        self.device = device = "cuda" if torch.cuda.is_available() else "cpu"
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
        ids, question = encode(self.tokenizer, sample), list(sample.targets[:-1])
        if sample.mode == DICTATED:
            ids, question = encode_parts(self.tokenizer, sample)
        observer, n = self.observer, len(ids)
        observer.seen, observer.visible = [], None
        prompt = torch.tensor([ids], device=self.device)
        out = self.model(prompt, use_cache=True, logits_to_keep=1)
        masks = {FULL: torch.ones_like(observer.scores(Candidate()), dtype=torch.bool)}
        for candidate in CANDIDATES:
            scores = observer.scores(candidate)
            for rate in self.rates:
                budget = Keep(rate=rate).tokens(n)
                chosen = keep(scores, self.layers, budget, candidate)
                masks[f"{rate:g}|{candidate.name}"] = chosen
        stacked = torch.stack(list(masks.values())).unflatten(1, (self.layers, -1))
        more = len(question) + MAX_NEW
        observer.visible = functional.pad(stacked, (0, more), value=True)
        out.past_key_values.batch_repeat_interleave(len(masks))
        token = out.logits[0, -1].argmax().expand(len(masks))
        if question:
            asked = torch.tensor(question, device=self.device).expand(len(masks), -1)
            out = self.model(asked, past_key_values=out.past_key_values, use_cache=True)
            if sample.mode == LIKELIHOOD:
                return dict(zip(masks, _likelihoods(out.logits, sample), strict=True))
            token = out.logits[:, -1].argmax(-1)
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
            name: scorer(cut_at(text, sample.stop), sample.answers)
            for name, text in zip(masks, texts, strict=True)
        }

    def _text(self, ids: list[int]) -> str:
        end = self.tokenizer.eos_token_id
        ids = ids[: ids.index(end)] if end in ids else ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _likelihoods(logits: torch.Tensor, sample: Sample) -> list[float]:
    """Of the text to be decoded but for its first token, which saw the whole prompt."""
    targets = torch.tensor(sample.targets[1:], device=logits.device)[:, None]
    rows = (row.float().log_softmax(-1).gather(1, targets) for row in logits)
    return [likelihood(row[:, 0].tolist()) for row in rows]


def table(lines: list[dict[str, Any]]) -> str:
    """Mean score of every candidate by task, in percent."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for name, score in line["scores"].items():
            found[name][line["task"]].append(score)
    tasks = sorted({line["task"] for line in lines})
    rows = [f"{'':34} " + " ".join(f"{task[:12]:>12}" for task in tasks) + "   mean"]
    # Stable: candidates stay in their order, below their rate.
    for name, by_task in sorted(found.items(), key=lambda row: row[0].split("|")[0]):
        means = [100 * sum(s) / len(s) for s in (by_task[task] for task in tasks) if s]
        cells = " ".join(f"{mean:12.0f}" for mean in means)
        rows.append(f"{name:34} {cells} {sum(means) / len(means):6.1f}")
    return "\n".join(rows)


def scout_arguments(
    description: str | None, tasks: Sequence[str], samples: int
) -> argparse.ArgumentParser:
    """What every scout is told; `tasks` are its choices."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", nargs="+", required=True, choices=tasks)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--seed", type=int, default=1, help="odd: not used in tables")
    parser.add_argument("--rates", type=float, nargs="+", default=[4, 8])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def samples_left(
    args: argparse.Namespace, lines: Sequence[dict[str, Any]], tokenizer: Any
) -> Iterator[tuple[dict[str, Any], Sample]]:
    """Samples that no line stands for, each with what names it, until the deadline."""
    end, corpus = time.monotonic() + args.deadline, Corpus(args.data)
    done = {(line["task"], line["index"], line["length"]) for line in lines}
    for index in range(args.samples):
        for task in args.tasks:
            if time.monotonic() > end or (task, index, args.length) in done:
                continue
            key = {"task": task, "index": index, "length": args.length}
            sample = make_sample(
                TASKS[task], args.length, args.seed, index, tokenizer, corpus
            )
            yield {**key, "seed": args.seed}, sample


def main() -> None:
    """Try all candidates, sample by sample; goes on where it stopped."""
    args = scout_arguments(__doc__, list(TASKS), samples=8).parse_args()
    simulator, origin = Simulator(args.model, args.rates), environment()
    lines = read_lines(args.out) if args.out.exists() else []
    for key, sample in samples_left(args, tuple(lines), simulator.tokenizer):
        line = {**key, "scores": simulator.scores(sample)}
        write_record(args.out, {**origin, "simulated": True, **line})
        lines.append(line)
        print(key["task"], key["index"], line["scores"][FULL], flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
