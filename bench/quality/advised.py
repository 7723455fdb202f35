"""A record of `sglang_kvc.tools.advise` on a real server.

``python -m bench.quality.advised --model PATH --url URL [--task qa_paragraphs]``: makes
prompts of a task with their references, asks a server that runs already, and appends
what the tool says to a file of records, with command, commit and versions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.common.record import ROOT, environment, write_record
from bench.quality.__main__ import default_data
from bench.quality.samples import SampleStore
from bench.quality.tasks.sample import SampleKey, chat_text

OUT = ROOT / "bench" / "results" / "advise.jsonl"


def write_prompts(args: argparse.Namespace, path: Path) -> None:
    """The prompts of the task as the tool reads them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    store = SampleStore(args.model, args.data, workers=0)
    lines = []
    for number in range(args.samples):
        sample = store.get(SampleKey(args.task, args.length, args.seed, number))
        text = chat_text(tokenizer, sample.prompt, sample.prefix)
        lines.append(json.dumps({"prompt": text, "reference": list(sample.answers)}))
    path.write_text("\n".join(lines) + "\n")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; the tool's exit status."""
    from sglang_kvc.tools.advise.__main__ import main as advise

    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.advised",
        epilog="Further arguments go to sglang_kvc.tools.advise.",
    )
    parser.add_argument("--model", required=True, help="folder of the tokenizer")
    parser.add_argument("--data", type=Path, default=default_data())
    parser.add_argument("--task", default="qa_paragraphs")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--flags", default="", help="of the server, for the record")
    parser.add_argument("--to", type=Path, default=OUT)
    args, rest = parser.parse_known_args(words)
    made = environment()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        write_prompts(args, prompts)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            status = advise(["--prompts", str(prompts), "--json", *rest])
    if status == 0:
        what = {
            name: getattr(args, name)
            for name in ("task", "length", "seed", "samples", "flags")
        }
        write_record(args.to, {**made, **what, **json.loads(said.getvalue())})
    print(said.getvalue(), end="")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
