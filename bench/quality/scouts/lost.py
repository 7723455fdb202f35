"""What long answers look at and do not find any more: prompt or answer, step by step.

    python -m bench.quality.scouts.lost --model DIR --tasks squality gsm8k_four \\
        --samples 4 --settings 8 8+512 --length 4096 --out build/lost.jsonl \\
        --plots build/plots

The answer is decoded with the full cache in Hugging Face. Beside it, what a server
would hold at each setting is followed through all passes, while decoding, too: when
they come, how much they keep and what they choose. For every step of the answer: the
share of the full cache's attention (behind the sinks, mean over heads) that falls on
what was evicted of the prompt and of the answer itself, and how many tokens of both are
held. Queries are the full cache's at each pass, so late steps are a lower bound. A
record a sample and setting, a table, and a plot a task.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench.common.record import environment, read_lines, write_record
from bench.quality.scouts import lost_report
from bench.quality.scouts.lost_course import SHIPPED, HeldTokens, Step
from bench.quality.scouts.lost_report import BIN
from bench.quality.scouts.simulate import Simulator, samples_left, scout_arguments
from bench.quality.scouts.simulate_choice import Observer
from bench.quality.systems import Setting, parse_setting
from bench.quality.tasks import TASKS
from bench.quality.tasks.sample import ASK, Sample, encode

DIGITS = 4


class Follower(Observer):
    """Keeps what the queries of the newest token pay.

    Attributes
    ----------
    paid : for each layer, [H, G, n] probabilities.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paid: dict[int, torch.Tensor] = {}

    def decoded(self, layer: int, probs: torch.Tensor) -> None:
        """Keep a layer's, for one row and one token."""
        self.paid[layer] = probs[0, :, :, 0].float()

    def all_layers(self) -> torch.Tensor:
        """[LH, G, n], in the order of the layers."""
        return torch.cat([self.paid[layer] for layer in sorted(self.paid)])


class Lost:
    """A model whose answers are followed.

    Parameters
    ----------
    model : str
        Its folder.
    settings : sequence of Setting
    most : int
        Steps of an answer at most.
    """

    def __init__(self, model: str, settings: Sequence[Setting], most: int) -> None:
        self.follower, self.settings, self.most = Follower(), settings, most
        self.simulator = Simulator(model, [], self.follower)

    @torch.no_grad()
    def measure(self, sample: Sample) -> list[dict[str, Any]]:
        """One record a setting; none if the model says nothing."""
        simulator, follower = self.simulator, self.follower
        ids = encode(simulator.tokenizer, sample)
        follower.seen, follower.visible = [], None
        prompt = torch.tensor([ids], device=simulator.device)
        out = simulator.model(prompt, use_cache=True, logits_to_keep=1)
        scores = follower.scores(SHIPPED)
        norms = torch.cat([norms for _, norms, _ in follower.seen])
        follower.seen = []
        most = min(sample.max_new_tokens, self.most)
        heads = len(norms) // simulator.layers
        shape = (1, simulator.layers, heads, len(ids) + most)
        follower.visible = torch.ones(shape, dtype=torch.bool, device=simulator.device)
        courses = [HeldTokens(one, scores, simulator.layers) for one in self.settings]
        steps: list[list[Step]] = [[] for _ in courses]
        past, token = out.past_key_values, out.logits[0, -1].argmax()
        for _ in range(most):
            if token == simulator.tokenizer.eos_token_id:
                break
            out = simulator.model(
                token.view(1, 1), past_key_values=past, use_cache=True
            )
            token, probs = out.logits[0, -1].argmax(), follower.all_layers()
            new = [layer.values[0, :, -1].float().norm(dim=-1) for layer in past.layers]
            norms = torch.cat([norms, torch.cat(new)[:, None]], 1)
            for course, own in zip(courses, steps, strict=True):
                own.append(course.decode(probs, norms))
        return [
            {
                "setting": setting.label,
                "prompt_tokens": len(ids),
                "answer_tokens": len(own),
                "passes": course.state.passes,
                **binned(own),
            }
            for setting, course, own in zip(self.settings, courses, steps, strict=True)
            if own
        ]


def binned(steps: Sequence[Step]) -> dict[str, list[float]]:
    """Means over `BIN` steps each, a list for each field of `Step`."""
    rows = [asdict(step) for step in steps]
    parts = [rows[i : i + BIN] for i in range(0, len(rows), BIN)]
    return {
        name: [round(mean(row[name] for row in part), DIGITS) for part in parts]
        for name in rows[0]
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    tasks = [n for n, t in TASKS.items() if t.group in ("long", "lists", "chain")]
    more = ["summary_lead", "gsm8k_steps", "math500"]
    found = scout_arguments(__doc__, [*tasks, *more], samples=4)
    found.add_argument("--settings", nargs="+", default=["4", "8"], help="8, 8+512")
    found.add_argument("--steps", type=int, default=512, help="of an answer at most")
    found.add_argument("--plots", type=Path, help="a folder for a plot of each task")
    return found


def main() -> None:
    """Follow the answers, sample by sample; goes on where it stopped."""
    args = parser().parse_args()
    settings = [parse_setting(word) for word in args.settings]
    lost, origin = Lost(args.model, settings, args.steps), environment()
    lines = read_lines(args.out) if args.out.exists() else []
    for key, sample in samples_left(args, tuple(lines), lost.simulator.tokenizer):
        if sample.mode != ASK:
            continue
        for record in lost.measure(sample):
            line = {**key, **record}
            write_record(args.out, {**origin, "lost_attention": True, **line})
            lines.append(line)
        print(key["task"], key["index"], flush=True)
    print(lost_report.table(lines))
    if args.plots:
        for path in lost_report.draw(lines, args.plots):
            print(path)


if __name__ == "__main__":
    main()
