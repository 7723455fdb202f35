"""Passkey retrieval through the served engine: which rates still find the key.

    python -m bench.passkey --model PATH --lengths 4096 8192 --rates 1 2 4 8

One engine serves every rate (a per-request option), the question inside the prompt.
Filler is the usual repeated sentences, or the text of ``--text FILE``. Prints a table
of keys found out of ``--samples`` and appends it to ``bench/results/passkey.jsonl``.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from bench.record import environment, write_record

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
    "back again. "
)
INTRO = (
    "There is important information hidden inside a lot of irrelevant text. Find it "
    "and memorize it.\n\n"
)
QUESTION = "\n\nWhat is the pass key? Answer with the number only."


def build_prompt(
    tokenizer: Any, text: str, length: int, depth: float, key: str
) -> list[int]:
    """Chat prompt of about `length` tokens with the key at `depth` of the filler."""
    needle = f"The pass key is {key}. Remember it. {key} is the pass key. "
    frame = tokenizer(INTRO + needle + QUESTION)["input_ids"]
    room = length - len(frame) - 40
    filler = tokenizer(text)["input_ids"]
    filler = (filler * (room // len(filler) + 1))[:room]
    cut = int(room * depth)
    content = INTRO + tokenizer.decode(filler[:cut]) + " " + needle
    content += tokenizer.decode(filler[cut:]) + QUESTION
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        return_dict=False,
    )
    return ids


def main() -> None:
    """Serve all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--text", type=Path, help="filler; default: repeated sentences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/passkey.jsonl"))
    args = parser.parse_args()

    import sglang
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    engine = sglang.Engine(
        model_path=args.model,
        kv_compress=True,
        skip_server_warmup=True,
        cuda_graph_backend_prefill="disabled",
        random_seed=args.seed,
    )
    text = args.text.read_text() if args.text else FILLER
    rng = random.Random(args.seed)
    cases = [
        (length, depth, rate, key)
        for length in args.lengths
        for depth in args.depths
        for key in [str(rng.randrange(10_000, 99_999)) for _ in range(args.samples)]
        for rate in args.rates
    ]
    prompts = {
        (length, depth, key): build_prompt(tokenizer, text, length, depth, key)
        for length, depth, _, key in cases
    }
    outputs = engine.generate(
        input_ids=[prompts[length, depth, key] for length, depth, _, key in cases],
        sampling_params=[
            {
                "max_new_tokens": 16,
                "temperature": 0.0,
                "custom_params": {"kv_compress": {"rate": rate}},
            }
            for _, _, rate, _ in cases
        ],
    )
    found: dict[tuple[int, float, float], int] = {}
    resident: dict[tuple[int, float], int] = {}
    for (length, depth, rate, key), output in zip(cases, outputs, strict=True):
        cell = (length, depth, rate)
        found[cell] = found.get(cell, 0) + (key in output["text"])
        info = output["meta_info"]["kv_compress"]
        resident[length, rate] = info["resident_tokens"]
    engine.shutdown()

    print(f"{'tokens':>8}{'depth':>8}" + "".join(f"{r:>9g}x" for r in args.rates))
    for length in args.lengths:
        for depth in args.depths:
            cells = [found[length, depth, r] for r in args.rates]
            row = "".join(f"{c:>7}/{args.samples:<2}" for c in cells)
            print(f"{length:>8}{depth:>8.0%}{row}")
        row = "".join(f"{resident[length, r]:>10}" for r in args.rates)
        print(f"{length:>8}{'kept':>8}{row}")
    write_record(
        args.out,
        {
            **environment(),
            "model": Path(args.model).name,
            "samples": args.samples,
            "text": args.text.name if args.text else "repeated sentences",
            "found": [
                {"tokens": n, "depth": d, "rate": r, "found": c}
                for (n, d, r), c in found.items()
            ],
            "resident": [
                {"tokens": n, "rate": r, "resident": c}
                for (n, r), c in resident.items()
            ],
        },
    )


if __name__ == "__main__":
    main()
