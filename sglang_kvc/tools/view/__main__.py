"""Ask a server and write the page: ``python -m sglang_kvc.tools.view``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sglang_kvc.errors import KVCError
from sglang_kvc.tools import checked_numbers as numbers
from sglang_kvc.tools.server_http import RefusedError
from sglang_kvc.tools.view.client import Answer, Client
from sglang_kvc.tools.view.page import View, render

_REPORT_S = 5.0


class ViewError(KVCError):
    """Something that the user of the tool can put right, said in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; 0, or 1 with one line that says what is wrong."""
    args = _parser().parse_args(argv)
    try:
        path = _write(args)
    except KVCError as error:
        print(f"view: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("view: interrupted, nothing was written", file=sys.stderr)
        return 130
    print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kvc.tools.view",
        description="Write a page that shows what a server with --kv-compress keeps of "
        "a prompt, and what it answers at each rate.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server")
    parser.add_argument("--prompt", required=True, metavar="FILE", help="its text")
    parser.add_argument(
        "--rates", type=numbers.rates, default=[2.0, 4.0, 8.0], metavar="X,Y"
    )
    parser.add_argument("--max-new-tokens", type=numbers.count, default=64, metavar="N")
    parser.add_argument("--out", default="view.html", metavar="FILE.html")
    parser.add_argument("--api-key", help="if the server wants one")
    return parser


def _write(args: argparse.Namespace) -> Path:
    source, out = Path(args.prompt), Path(args.out)
    prompt = _read(source)
    if not out.parent.is_dir() or out.is_dir():
        raise ViewError(f"--out must be a file in a folder that exists, got {out}")
    client = Client(args.url.rstrip("/"), args.api_key)
    model = client.model()
    ids, tokens = client.tokens(prompt)
    _say(f"{client.url} serves {model}; the prompt has {len(ids):,} tokens")
    answers = [
        _ask(client, ids, rate, args.max_new_tokens) for rate in (None, *args.rates)
    ]
    if all(answer.refused for answer in answers[1:]):
        raise ViewError(f"the server refused the prompt: {answers[-1].refused}")
    page = render(View(Path(model).name, source.name, tokens, answers))
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ViewError(f"{out} could not be written: {error.strerror}") from None
    _say(f"wrote {out}: {out.stat().st_size / 1000:,.0f} kB")
    return out


def _read(path: Path) -> str:
    try:
        prompt = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ViewError(f"{path} could not be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ViewError(f"{path} must be text in UTF-8") from None
    if not prompt.strip():
        raise ViewError(f"{path} is empty: it must have the text of a prompt")
    return prompt


def _ask(
    client: Client, ids: list[int], rate: float | None, max_new_tokens: int
) -> Answer:
    """One answer; what the server refuses is a part of the page, too."""
    name = Answer(rate).name
    _say(f"{name}: asked")
    started = time.monotonic()
    try:
        answer = client.answer(
            ids, rate, max_new_tokens, _progress(name, max_new_tokens)
        )
    except RefusedError as error:
        _say(f"{name}: refused: {error}")
        return Answer(rate, refused=str(error))
    held, asked = answer.resident[-1], answer.logical[-1]
    took, count = time.monotonic() - started, len(answer.token_ids)
    _say(f"{name}: {count} tokens in {took:.1f} s, {held:,} of {asked:,} held")
    return answer


def _progress(name: str, most: int) -> Callable[[int], None]:
    """What says how far an answer is, every few seconds."""
    last = time.monotonic()

    def on_token(count: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_S:
            last = time.monotonic()
            _say(f"{name}: {count} of at most {most} tokens")

    return on_token


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
