"""The command line."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sglang_kvc.errors import KVCError
from sglang_kvc.tools import checked_numbers as numbers
from sglang_kvc.tools.advise import plot
from sglang_kvc.tools.advise.advice import MIN_PROMPTS, TOLERANCE, advise
from sglang_kvc.tools.advise.asking import FULL, Answer, Asker, Run
from sglang_kvc.tools.advise.prompts import Prompt, PromptsError, read_prompts
from sglang_kvc.tools.advise.report import table
from sglang_kvc.tools.advise.scores import REFERENCE_SCORERS
from sglang_kvc.tools.advise.server import Server, ServerError
from sglang_kvc.tools.advise.speed import measure
from sglang_kvc.tools.advise.summary import (
    AUTO,
    SCORES,
    has_references,
    main_score,
    rows_of,
)

_RATES = "1,2,4,8,16"
_PROCESSORS = "enable_custom_logit_processor"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if there is an answer, 1 on an error."""
    given = _parser().parse_args(arguments)
    try:
        return _run(given)
    except KVCError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; no advice", file=sys.stderr)
        return 130


def _run(given: argparse.Namespace) -> int:
    prompts = read_prompts(given.prompts)
    if given.score in REFERENCE_SCORERS and not has_references(prompts):
        line = next(prompt.line for prompt in prompts if not prompt.references)
        raise PromptsError(
            f'--score {given.score} needs a "reference" in every line; line {line} of '
            f"{given.prompts} has none"
        )
    if given.plot:
        plot.load_pyplot()
    rates = [rate for rate in given.rates if rate != FULL]
    server = Server(given.url, given.api_key)
    info = server.info()
    dictates = bool(info.get(_PROCESSORS))
    if not dictates:
        print(
            "The server cannot be given answers (start it with "
            "--enable-custom-logit-processor): likelihoods go up to the first token "
            "that differs.",
            file=sys.stderr,
        )
    with _raw(given.out) as write, _bar("answers", prompts, 1 + len(rates)) as bar:
        one = threading.Lock()

        def done(answer: Answer | None) -> None:
            with one:
                write(answer)
                bar.update()

        run = Asker(
            server,
            concurrency=given.concurrency,
            max_new_tokens=given.max_new_tokens,
            dictates=dictates,
            done=done,
        ).run(prompts, rates)
    for reason in run.left_out:
        print(f"left out: {reason}", file=sys.stderr)
    speeds: dict[float, float] = {}
    if not given.no_speed:
        try:
            with _bar("speed", run.prompts, 1 + len(rates)) as bar:
                speeds = measure(server, run, rates, given.concurrency, bar.update)
        except ServerError as error:
            print(f"speed was not measured: {error}", file=sys.stderr)
    _report(given, run, speeds, str(info.get("model_path", "")))
    return 0


def _report(
    given: argparse.Namespace, run: Run, speeds: dict[float, float], model: str
) -> None:
    rows = rows_of(run, speeds)
    score = main_score(given.score, run.prompts)
    sentence = advise(rows, score, given.tolerance)
    if given.json:
        record = {
            "model": Path(model).name,
            "prompts": len(run.prompts),
            "left_out": run.left_out,
            "score": score,
            "tolerance": given.tolerance,
            "concurrency": given.concurrency,
            "dictated": run.dictated,
            "rows": [row.as_record() for row in rows],
            "advice": sentence,
        }
        print(json.dumps(record))
    else:
        print(f"{table(rows, run.dictated)}\n\n{sentence}")
    if given.plot:
        title = f"{Path(model).name}, {len(run.prompts)} prompts"
        plot.draw(rows, given.tolerance, title, given.plot)


@contextmanager
def _raw(path: Path | None) -> Iterator[Callable[[Answer | None], None]]:
    """Writes answers as they come, one JSON object a line."""
    if path is None:
        yield lambda _answer: None
        return
    try:
        stream: IO[str] = path.open("x", encoding="utf-8")
    except OSError as error:
        raise PromptsError(f"cannot write --out {path}: {error.strerror}") from None
    with stream:

        def write(answer: Answer | None) -> None:
            if answer is not None:
                stream.write(json.dumps(answer.as_record()) + "\n")
                stream.flush()

        yield write


def _bar(title: str, prompts: Sequence[Prompt], rounds: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=len(prompts) * rounds, desc=title, unit="request")


def _rates(text: str) -> list[float]:
    return sorted(numbers.rates(text))


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be from 0 to 100, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kvc.tools.advise",
        description="Run your prompts on a running server at several rates, and say "
        "what each rate costs and which to take.",
        epilog="The advice is the highest rate whose 95 % interval allows no loss "
        f"beyond the tolerance. It takes {MIN_PROMPTS} prompts at least.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--api-key", metavar="KEY", help="of a server that wants one")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines: {"prompt": ...} or {"messages": [...]}, and if there are '
        'right answers "reference": a text or a list of them',
    )
    parser.add_argument("--rates", type=_rates, default=_RATES, metavar="X,Y,...")
    parser.add_argument(
        "--max-new-tokens", type=numbers.count, default=128, metavar="N"
    )
    parser.add_argument(
        "--concurrency",
        type=numbers.count,
        default=8,
        metavar="N",
        help="requests at once",
    )
    parser.add_argument(
        "--score",
        choices=SCORES,
        default=AUTO,
        help="what the advice is about; auto: the references (contains if all are "
        "short, else rouge_l), without them the likelihood of the full cache's answers",
    )
    parser.add_argument(
        "--tolerance",
        type=_percent,
        default=TOLERANCE,
        metavar="PERCENT",
        help=f"of the full cache's score that may be lost; default {TOLERANCE:g}",
    )
    parser.add_argument(
        "--no-speed", action="store_true", help="leave out the rounds that are timed"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="raw answers, JSON lines"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="a PNG; needs matplotlib"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
