"""Quality under compression, measured through the served engine.

    python -m bench.quality run --model DIR --tasks ruler qa --rates 1 4 8 \\
        --samples 50 --length 4096 --systems stock ours ours:allocation=head \\
        --deadline 540 --out bench/results/quality.jsonl
    python -m bench.quality report bench/results/quality*.jsonl
    python -m bench.quality plot bench/results/quality*.jsonl --out docs/plots
    python -m bench.quality list

The question is inside the prompt. A run goes on where earlier ones stopped; give the
most important tasks, rates and systems first.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.quality.plan import Wish
from bench.quality.run import Asker
from bench.quality.systems import (
    KVPRESS,
    PRESETS,
    RATES,
    System,
    parse_setting,
    parse_systems,
)
from bench.quality.tasks import GROUPS, RULER, TASKS, resolve
from bench.quality.tasks.corpus import DEFAULT_DATA

OUT = Path("bench/results/quality.jsonl")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure what is missing")
    add = run.add_argument
    add("--model", required=True, help="folder of a Hugging Face model")
    add("--tasks", nargs="+", default=[RULER], help="names, groups, ruler or all")
    add("--rates", "--settings", nargs="+", default=list(RATES), help="4 or b512")
    add("--systems", nargs="+", default=list(PRESETS))
    add("--length", "--lengths", type=int, nargs="+", default=[4096], dest="lengths")
    add("--samples", type=int, default=50, help="of each cell")
    add("--seed", type=int, default=0, help="odd and even seeds share no text")
    add("--deadline", type=float, help="seconds after which to stop")
    add("--batch", type=int, default=256, help="most samples sent at once")
    add("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2))
    add("--data", type=Path, default=default_data(), help="folder of evaluation data")
    add("--out", type=Path, default=OUT)
    add("--also", type=Path, nargs="*", default=[], help="results that count as done")
    add("--engine", nargs="*", default=[], metavar="KEY=VALUE", help="sglang.Engine's")
    for name, text in (("report", "tables in Markdown"), ("plot", "PNG files")):
        one = commands.add_parser(name, help=text)
        one.add_argument("files", type=Path, nargs="*", default=[OUT])
        one.add_argument("--seed", type=int, help="default: all")
        one.add_argument("--model", default="", help="default: each")
        target = Path("docs/plots") if name == "plot" else None
        one.add_argument("--out", type=Path, default=target)
    commands.add_parser("list", help="tasks by group")
    return top


def default_data() -> Path | None:
    """The usual folder of the evaluation data if it is there."""
    return DEFAULT_DATA if DEFAULT_DATA.is_dir() else None


def run(args: argparse.Namespace) -> int:
    """Measure; the exit status is 3 if samples are left."""
    from bench.quality.run import Runner
    from bench.quality.samples import SampleStore

    if args.data is None:
        raise SystemExit(
            f"{DEFAULT_DATA.name}/ is not beside the repository: give the folder of "
            "the evaluation data with --data"
        )
    if not Path(args.model).is_dir():
        raise SystemExit(
            f"--model {args.model} is no folder; python -m sglang_kvc.fetch_model "
            "prints one"
        )
    wish = Wish(
        Path(args.model).name,
        parse_systems(args.systems),
        [parse_setting(word) for word in args.rates],
        resolve(args.tasks),
        args.lengths,
        args.seed,
        args.samples,
    )
    store = SampleStore(args.model, args.data, args.workers)
    try:
        runner = Runner(
            wish,
            store,
            args.out,
            args.also,
            origin(),
            args.deadline,
            args.batch,
        )
        if not runner.cells:
            print("nothing is missing")
            return 0
        left = runner.run(lambda system: open_system(system, args))
    finally:
        store.close()
    print(f"{left} samples are left" if left else "all done")
    return 3 if left else 0


def origin() -> dict[str, Any]:
    """Command, commit and hardware, as they go into every line."""
    from bench.record import environment

    found = environment()
    main_file = "bench/quality/__main__.py"
    found["command"] = found["command"].replace(main_file, "-m bench.quality")
    return found


def open_system(system: System, args: argparse.Namespace) -> Asker:
    """What answers for a system."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if system.kind == KVPRESS:
        from bench.quality.kvpress_systems import PressAsker

        return PressAsker(system, args.model, tokenizer)
    from bench.quality.asking import EngineAsker
    from bench.quality.systems import parse_system

    extra = dict(parse_system("ours:" + ",".join(args.engine)).options)
    return EngineAsker(system, args.model, tokenizer, extra=extra)


def list_tasks() -> None:
    """Print the tasks by group."""
    for group in GROUPS:
        print(group)
        for task in TASKS.values():
            if task.group == group:
                mark = " (ruler)" if task.ruler else ""
                print(f"  {task.name}{mark}")


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    args = parser().parse_args(words)
    if args.command == "list":
        list_tasks()
    elif args.command == "run":
        try:
            return run(args)
        except ValueError as error:
            raise SystemExit(f"bench.quality: {error}") from None
    elif args.command == "report":
        from bench.quality.records import read
        from bench.quality.report import markdown

        text = markdown(read(args.files), args.model, args.seed)
        if args.out:
            args.out.write_text(text)
        print(text)
    else:
        from bench.quality.plot import draw
        from bench.quality.records import read

        for path in draw(read(args.files), args.out, args.model, args.seed):
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
