"""Quality under compression, measured through the served engine.

    python -m bench.quality run --model DIR --tasks ruler qa --rates 1 4 8 \\
        --samples 50 --length 4096 --systems stock ours ours:allocation=head \\
        --deadline 540 --out bench/results/quality.jsonl
    python -m bench.quality run --model DIR --preset tune-windows --out tune.jsonl
    python -m bench.quality heads --model DIR --tasks ruler qa --rates 4 8 \\
        --samples 20 --out bench/results/quality_heads.jsonl
    python -m bench.quality report bench/results/quality*.jsonl
    python -m bench.quality plot bench/results/quality*.jsonl --out docs/plots
    python -m bench.quality archive bench/results/quality.jsonl
    python -m bench.quality list

The question is inside the prompt. A run goes on where earlier ones stopped; give the
most important tasks, rates and systems first. ``archive`` moves the samples of a file
into a compressed one beside it, which all commands read, too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.quality.plan import SAMPLES_LEFT, Wish
from bench.quality.presets import RUNS, Preset
from bench.quality.run import Asker
from bench.quality.systems import (
    KVPRESS,
    PRESETS,
    RATES,
    Setting,
    System,
    parse_setting,
    parse_systems,
)
from bench.quality.tasks import GROUPS, RULER, TASKS, resolve
from bench.quality.tasks.corpus import DEFAULT_DATA

if TYPE_CHECKING:
    from bench.quality.samples import SampleStore
    from bench.quality.tasks.sample import SampleKey

OUT = Path("bench/results/quality.jsonl")
HEADS_OUT = Path("bench/results/quality_heads.jsonl")


def parser(preset: Preset | None = None) -> argparse.ArgumentParser:
    """The command line; `preset` has the defaults of ``run``."""
    top = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure what is missing")
    _add_wish(run, PRESETS, RATES, 50, OUT)
    add = run.add_argument
    add("--block", type=int, default=0, help="tasks asked at all rates at a time")
    add("--preset", choices=RUNS, help="values of the flags above, see list")
    add("--deadline", type=float, help="seconds after which to stop")
    add("--batch", type=int, default=256, help="most samples sent at once")
    add("--also", type=Path, nargs="*", default=[], help="results that count as done")
    if preset:
        run.set_defaults(**preset.arguments())
    heads = commands.add_parser("heads", help="measure what every head keeps")
    _add_wish(heads, PRESETS[:1], ("4", "8"), 20, HEADS_OUT)
    for name, text in (("report", "tables in Markdown"), ("plot", "PNG files")):
        one = commands.add_parser(name, help=text)
        one.add_argument("files", type=Path, nargs="*", default=[OUT])
        one.add_argument("--seed", type=int, help="default: all")
        one.add_argument("--model", default="", help="default: each")
        target = Path("docs/plots") if name == "plot" else None
        one.add_argument("--out", type=Path, default=target)
    store = commands.add_parser("archive", help="samples out of the text")
    store.add_argument("files", type=Path, nargs="+", metavar="FILE.jsonl")
    commands.add_parser("list", help="tasks by group, and presets")
    return top


def _add_wish(
    command: argparse.ArgumentParser,
    systems: Sequence[str],
    rates: Sequence[str],
    samples: int,
    out: Path,
) -> None:
    """Flags that say what to measure and where."""
    add = command.add_argument
    add("--model", required=True, help="folder of a Hugging Face model")
    add("--tasks", nargs="+", default=[RULER], help="names, groups, ruler or all")
    add("--rates", "--settings", nargs="+", default=list(rates), help="4 or b512")
    add("--systems", nargs="+", default=list(systems))
    add("--length", "--lengths", type=int, nargs="+", default=[4096], dest="lengths")
    add("--samples", type=int, default=samples, help="of each cell")
    add("--seed", type=int, default=0, help="odd and even seeds share no text")
    add("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2))
    add("--data", type=Path, default=default_data(), help="folder of evaluation data")
    add("--out", type=Path, default=out)
    add("--engine", nargs="*", default=[], metavar="KEY=VALUE", help="sglang.Engine's")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Arguments; a preset's where no flag is given."""
    args = parser().parse_args(words)
    if getattr(args, "preset", None):
        args = parser(RUNS[args.preset]).parse_args(words)
    return args


def default_data() -> Path | None:
    """The usual folder of the evaluation data if it is there."""
    return DEFAULT_DATA if DEFAULT_DATA.is_dir() else None


def run(args: argparse.Namespace) -> int:
    """Measure; the exit status, `SAMPLES_LEFT` if some are."""
    from bench.common.record import environment
    from bench.quality.deadline import Deadline
    from bench.quality.records import Results
    from bench.quality.run import Runner

    wish, store = read_wish(args)
    wish = replace(wish, block=args.block)
    try:
        results = Results(args.out, args.also, environment())
        deadline = Deadline.after(args.deadline)
        runner = Runner(wish, store, results, deadline, args.batch)
        if not runner.cells:
            print("nothing is missing")
            return 0
        left = runner.run(lambda s: open_system(s, args, runner.coming(s)))
    finally:
        store.close()
    print(f"{left} samples are left" if left else "all done")
    return SAMPLES_LEFT if left else 0


def run_heads(args: argparse.Namespace) -> int:
    """Measure what every head keeps."""
    from transformers import AutoConfig, AutoTokenizer

    from bench.common.record import environment
    from bench.quality.engines import start
    from bench.quality.heads import HeadAsker, measure

    wish, store = read_wish(args)

    def open_heads(system: System) -> HeadAsker:
        config = AutoConfig.from_pretrained(args.model)
        return HeadAsker(
            start(system, args.model, engine_options(args)),
            AutoTokenizer.from_pretrained(args.model),
            config.get_text_config().num_hidden_layers,
        )

    try:
        lines = measure(wish, store, args.out, environment(), open_heads)
    finally:
        store.close()
    print(f"{lines} new lines" if lines else "nothing is missing")
    return 0


def read_wish(args: argparse.Namespace) -> tuple[Wish, SampleStore]:
    """What to measure, and its samples."""
    from bench.quality.samples import SampleStore

    if args.data is None:
        raise SystemExit(
            f"{DEFAULT_DATA.name}/ is not beside the repository: give the folder of "
            "the evaluation data with --data"
        )
    if not Path(args.model).is_dir():
        raise SystemExit(
            f"--model {args.model} is no folder; "
            "python -m sglang_kvc.tools.fetch_model prints one"
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
    return wish, SampleStore(args.model, args.data, args.workers)


def open_system(
    system: System,
    args: argparse.Namespace,
    settings: Mapping[System, Mapping[SampleKey, Sequence[Setting]]],
) -> Asker:
    """What answers for a system; `settings` as `Runner.coming` gives them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if system.kind == KVPRESS:
        from bench.quality.kvpress_systems import PressAsker

        return PressAsker(system, args.model, tokenizer, settings)
    from bench.quality.asking import EngineAsker

    return EngineAsker(system, args.model, tokenizer, extra=engine_options(args))


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of ``sglang.Engine`` from the command line."""
    from bench.quality.systems import parse_system

    return dict(parse_system("ours:" + ",".join(args.engine)).options)


def show_list() -> None:
    """Print the tasks by group, and the presets."""
    for group in GROUPS:
        print(group)
        for task in TASKS.values():
            if task.group == group:
                mark = " (ruler)" if task.ruler else ""
                print(f"  {task.name}{mark}")
    print("\npresets")
    for name, preset in RUNS.items():
        print(
            f"  {name}: {' '.join(preset.systems)}; tasks {' '.join(preset.tasks)}; "
            f"rates {' '.join(preset.rates)}; {preset.samples} samples, "
            f"seed {preset.seed}"
        )


def report(args: argparse.Namespace) -> None:
    """Print, or write and print, all tables."""
    from bench.quality import heads_report
    from bench.quality.records import read
    from bench.quality.report import markdown

    cells = read(args.files)
    kept = heads_report.markdown(
        heads_report.read_maps(args.files, args.model, args.seed)
    )
    parts = [markdown(cells, args.model, args.seed)] if cells or not kept else []
    text = "\n".join([*parts, *([kept + "\n"] if kept else [])])
    if args.out:
        args.out.write_text(text)
    print(text)


def plot(args: argparse.Namespace) -> None:
    """Write all figures; prints their paths and the table of the heat maps."""
    from bench.quality import heads_report
    from bench.quality.plot import draw
    from bench.quality.records import read

    kept = heads_report.read_maps(args.files, args.model, args.seed)
    drawn = draw(read(args.files), args.out, args.model, args.seed)
    for path in [*drawn, *heads_report.draw(kept, args.out)]:
        print(path)
    if kept:
        print(f"\n{heads_report.markdown(kept)}")


def move(args: argparse.Namespace) -> None:
    """Move samples out of the files."""
    from bench.quality.archive import archive

    for path in args.files:
        print(f"{path}: {archive(path)} lines with samples moved")


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    args = parse(words)
    if args.command in ("run", "heads"):
        try:
            return run(args) if args.command == "run" else run_heads(args)
        except ValueError as error:
            raise SystemExit(f"bench.quality: {error}") from None
    if args.command == "list":
        show_list()
    elif args.command == "archive":
        move(args)
    elif args.command == "report":
        report(args)
    else:
        plot(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
