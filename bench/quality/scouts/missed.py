"""What answers look at and a rate evicts: which heads, which tokens, what is possible.

    python -m bench.quality.scouts.missed --model DIR \\
        --tasks summary_lead qa_documents --length 4096 --samples 4 --seed 1 \\
        --rates 4 8 --out build/missed.jsonl

The answer is decoded with the full cache in Hugging Face (dictated, where text is
continued), and the attention that it pays to the prompt is noted for every head. The
kept set is chosen as served, by the prompt's last queries. *Missed* is the share of the
attention behind the sinks that falls on what is evicted, mean over heads; *values*
weighs it by the norm of the value and adds up all heads. *Possible* is what is missed
if the answer's own attention chooses as many tokens: no metric can miss less.
``--candidates`` does the same for what `simulate` tries. Says what to look at, not what
a rate costs: that is measured through the engine (`bench.quality run`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch

from bench.common.record import environment, read_lines, write_record
from bench.quality.scouts.simulate import (
    MAX_NEW,
    Simulator,
    samples_left,
    scout_arguments,
)
from bench.quality.scouts.simulate_choice import (
    CANDIDATES,
    SINKS,
    Candidate,
    Observer,
    keep,
)
from bench.quality.tasks import TASKS
from bench.quality.tasks.sample import LIKELIHOOD, Sample, encode
from sglang_kvc.config.keep import Keep

TENTHS = 10
DIGITS = 4
SHOWN = ("task", "index", "rate", "missed")
SHIPPED = Candidate()
"""The server's defaults."""


class Watcher(Observer):
    """Adds up what decoded queries pay to every token.

    Attributes
    ----------
    paid : for each layer, [H, n] probabilities of the query heads of a group, their
        mean, added up over the queries; decoded tokens are left out.
    prompt : n.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompt = 0
        self.paid: list[torch.Tensor] = []

    def watch(self, prompt: int, layers: int) -> None:
        """Begin with a prompt of so many tokens."""
        self.prompt = prompt
        self.paid = [torch.zeros(())] * layers

    def decoded(self, layer: int, probs: torch.Tensor) -> None:
        """Add the queries of a layer."""
        own = probs[0, ..., : self.prompt].float()
        self.paid[layer] = self.paid[layer] + own.mean(1).sum(1).cpu()


class Answer(NamedTuple):
    """What the decoded tokens of an answer looked at.

    Attributes
    ----------
    paid : [LH, n] mean probability that a decoded query gave to a token of the prompt.
    norms : [LH, n] norms of the values.
    tokens : how many tokens were decoded.
    """

    paid: torch.Tensor
    norms: torch.Tensor
    tokens: int


def values_missed(answer: Answer, stays: torch.Tensor) -> float:
    """Share of probability times norm that is evicted, all heads, sinks left out."""
    weighed = (answer.paid * answer.norms)[:, SINKS:]
    lost = weighed.masked_fill(stays[:, SINKS:], 0)
    return round((lost.sum() / weighed.sum().clamp_min(1e-9)).item(), DIGITS)


def shares(paid: torch.Tensor, stays: torch.Tensor) -> dict[str, Any]:
    """What is missed of the attention behind the sinks.

    Parameters
    ----------
    paid : [LH, n] attention of the answer.
    stays : [LH, n] bool, what is kept.

    Returns
    -------
    dict : ``missed``, the mean over heads; ``heads`` [LH], each head's; ``tenths``, how
        the missed attention is spread over the prompt, first part first, sum 1.
    """
    beyond = paid.clone()
    beyond[:, :SINKS] = 0
    share = beyond.masked_fill(stays, 0) / beyond.sum(1, keepdim=True).clamp_min(1e-9)
    heads = share.sum(1)
    tenths = torch.stack([part.sum() for part in share.mean(0).tensor_split(TENTHS)])
    return {
        "missed": round(heads.mean().item(), DIGITS),
        "heads": [round(value, DIGITS) for value in heads.tolist()],
        "tenths": [
            round(value, DIGITS)
            for value in (tenths / tenths.sum().clamp_min(1e-9)).tolist()
        ],
    }


class Missed:
    """A model whose answers are watched."""

    def __init__(
        self, model: str, rates: list[float], candidates: Sequence[Candidate]
    ) -> None:
        self.watcher, self.rates, self.candidates = Watcher(), rates, candidates
        self.simulator = Simulator(model, rates, self.watcher)

    def measure(self, sample: Sample) -> list[dict[str, Any]]:
        """One record a rate; none if the model says nothing."""
        ids = encode(self.simulator.tokenizer, sample)
        answer = self._answer(ids, sample)
        if not answer.tokens:
            return []
        layers, n = self.simulator.layers, len(ids)
        # By name: what is scored once serves every rate.
        scores = {one.name: self._scores(one) for one in (SHIPPED, *self.candidates)}
        records = []
        for rate in self.rates:
            budget = Keep(rate=rate).tokens(n)
            stays = keep(scores[SHIPPED.name], layers, budget, SHIPPED)
            best = keep(answer.paid, layers, budget, SHIPPED)
            weighed = keep(answer.paid * answer.norms, layers, budget, SHIPPED)
            tried = {
                one.name: keep(scores[one.name], layers, budget, one)
                for one in self.candidates
            }
            records.append(
                {
                    "rate": rate,
                    "answer_tokens": answer.tokens,
                    **shares(answer.paid, stays),
                    "values": values_missed(answer, stays),
                    "possible": shares(answer.paid, best)["missed"],
                    "possible_values": values_missed(answer, weighed),
                    "candidates": {
                        name: {
                            "values": values_missed(answer, own),
                            "missed": shares(answer.paid, own)["missed"],
                        }
                        for name, own in tried.items()
                    },
                }
            )
        return records

    def _scores(self, candidate: Candidate) -> torch.Tensor:
        return self.watcher.scores(candidate).cpu()

    @torch.no_grad()
    def _answer(self, ids: list[int], sample: Sample) -> Answer:
        """Decode with the full cache, watched."""
        simulator, watcher = self.simulator, self.watcher
        watcher.seen, watcher.visible = [], None
        prompt = torch.tensor([ids], device=simulator.device)
        out = simulator.model(prompt, use_cache=True, logits_to_keep=1)
        norms = torch.cat([norms for _, norms, _ in watcher.seen]).cpu()
        most = min(sample.max_new_tokens, MAX_NEW)
        text = torch.tensor([sample.targets[:-1]], device=simulator.device)
        watcher.watch(len(ids), simulator.layers)
        watcher.visible = torch.ones(
            1,
            simulator.layers,
            len(norms) // simulator.layers,
            len(ids) + max(most, text.shape[1]),
            dtype=torch.bool,
            device=simulator.device,
        )
        past, token, tokens = out.past_key_values, out.logits[0, -1].argmax(), 0
        if sample.mode == LIKELIHOOD:
            simulator.model(text, past_key_values=past, use_cache=True)
            tokens, most = text.shape[1], 0
        while tokens < most and token != simulator.tokenizer.eos_token_id:
            out = simulator.model(
                token.view(1, 1), past_key_values=past, use_cache=True
            )
            token, tokens = out.logits[0, -1].argmax(), tokens + 1
        paid = torch.cat(watcher.paid) / tokens if tokens else torch.zeros_like(norms)
        return Answer(paid, norms, tokens)


def table(lines: list[dict[str, Any]], layers: int) -> str:
    """Means by task and rate, in percent, and the layers that miss most."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["task"], line["rate"]].append(line)
    columns = ("missed", "possible", "values", "possible_values")
    rows = [f"| task | rate | {' | '.join(columns)} | first tenth | worst layers |"]
    rows.append("| --- " * (len(columns) + 4) + "|")
    for (task, rate), own in sorted(groups.items()):
        means = [100 * mean(line[name] for line in own) for name in columns]
        first = 100 * mean(line["tenths"][0] for line in own)
        heads = torch.tensor([line["heads"] for line in own]).mean(0)
        by_layer = heads.view(layers, -1).mean(1)
        worst = ", ".join(
            f"{layer}: {100 * by_layer[layer]:.0f}"
            for layer in by_layer.topk(min(4, layers)).indices.tolist()
        )
        cells = " | ".join(f"{value:.1f}" for value in (*means, first))
        rows.append(f"| {task} | {rate:g} | {cells} | {worst} |")
    return "\n".join(rows + _candidate_rows(groups))


def _candidate_rows(
    groups: dict[tuple[str, float], list[dict[str, Any]]],
) -> list[str]:
    """What the candidates miss, a column for each task and rate."""
    names = list(next(iter(groups.values()))[0]["candidates"]) if groups else []
    keys = sorted(groups)
    rows = []
    for what in ("values", "missed") if names else ():
        head = " | ".join(f"{task} {rate:g}" for task, rate in keys)
        rows += ["", f"| {what} | {head} |", "| --- " * (len(keys) + 1) + "|"]
        for name in names:
            means = (
                mean(line["candidates"][name][what] for line in groups[key])
                for key in keys
            )
            cells = " | ".join(f"{100 * value:.1f}" for value in means)
            rows.append(f"| {name} | {cells} |")
    return rows


def main() -> None:
    """Watch the answers, sample by sample; goes on where it stopped."""
    # What is asked later, of a context compressed before, has no prompt of its own.
    tasks = [name for name, task in TASKS.items() if task.group != "reuse"]
    parser = scout_arguments(__doc__, tasks, samples=4)
    parser.add_argument("--candidates", action="store_true", help="what simulate tries")
    args = parser.parse_args()
    watched = Missed(args.model, args.rates, CANDIDATES if args.candidates else ())
    simulator, origin = watched.simulator, environment()
    lines = read_lines(args.out) if args.out.exists() else []
    for key, sample in samples_left(args, tuple(lines), simulator.tokenizer):
        for record in watched.measure(sample):
            line = {**key, **record}
            write_record(args.out, {**origin, "missed_attention": True, **line})
            lines.append(line)
            print(*(line[name] for name in SHOWN), flush=True)
    print(table(lines, simulator.layers))


if __name__ == "__main__":
    main()
