"""OpenAI's client: one chat at rate 8, and what was kept.

python docs/examples/openai_client.py --url http://127.0.0.1:30000 --rate 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import openai


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask once and print the answer."""
    parser = argparse.ArgumentParser(description="One chat with OpenAI's client.")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--rate", type=float, default=8)
    parser.add_argument("--question", default="Why is the sea salty? Answer briefly.")
    parser.add_argument("--max-tokens", type=int, default=128)
    given = parser.parse_args(arguments)
    client = openai.OpenAI(base_url=f"{given.url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": given.question}],
        max_tokens=given.max_tokens,
        temperature=0,
        extra_body={"custom_params": {"kv_compress": {"rate": given.rate}}},
    )
    print(answer.choices[0].message.content)
    # One summary for every choice; OpenAI's client keeps fields that it does not know.
    (kept,) = answer.metadata["kv_compress"]  # type: ignore[attr-defined]
    print(f"[{kept['resident_tokens']} of {kept['logical_tokens']} tokens kept]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
