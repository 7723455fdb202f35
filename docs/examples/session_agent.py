"""An agent that searches one document for many turns, each from where the last ended.

    python docs/examples/session_agent.py --document FILE --question "..."

Start the server with ``--kv-compress-sessions``. The document is sent once with every
turn, as the OpenAI API wants it, but computed only in the first: later turns start from
what the turn before has left packed. A line a turn says how much was computed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai

TASK = """Answer a question about the document below. To search it, answer only with
SEARCH: and a word. When you know enough, answer with ANSWER: and the answer.

{document}

Question: {question}"""


def search(document: str, word: str, most: int = 3) -> str:
    """Lines of the document with a word, as a tool's answer."""
    lines = [line.strip() for line in document.splitlines() if line.strip()]
    found = [line for line in lines if word.lower() in line.lower()]
    return "\n".join(found[:most]) or f"nothing is said of {word!r}"


def asked_for(said: str) -> str:
    """The word to search for: what stands behind SEARCH:, else the longest word."""
    named = re.search(r"SEARCH:\s*(\w+)", said)
    return named[1] if named else max(re.findall(r"\w+", said) or ["the"], key=len)


def run(
    client: openai.OpenAI, document: str, question: str, turns: int, **more: Any
) -> tuple[str, list[dict[str, Any]]]:
    """The answer, empty if the turns are used up, and what each turn reports."""
    messages: list[Any] = [
        {"role": "user", "content": TASK.format(document=document, question=question)}
    ]
    reports = []
    for _ in range(turns):
        reply = client.chat.completions.create(
            model="default", messages=messages, temperature=0, **more
        )
        said = reply.choices[0].message.content or ""
        # OpenAI's client keeps fields that it does not know.
        (report,) = reply.metadata["kv_compress"]  # type: ignore[attr-defined]
        assert reply.usage is not None
        reports.append({**report, "prompt_tokens": reply.usage.prompt_tokens})
        if "ANSWER:" in said:
            return said.partition("ANSWER:")[2].strip(), reports
        # The answer goes back as it came: what is changed must be computed again.
        messages.append({"role": "assistant", "content": said})
        found = search(document, asked_for(said))
        messages.append({"role": "user", "content": f"Found:\n{found}\n\nGo on."})
    return "", reports


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask once; print what every turn has computed."""
    parser = argparse.ArgumentParser(description="An agent on one document.")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--question", default="What is this document about?")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args(arguments)
    client = openai.OpenAI(base_url=f"{given.url}/v1", api_key="none")
    answer, reports = run(
        client,
        given.document.read_text(),
        given.question,
        given.turns,
        max_tokens=given.max_tokens,
    )
    for turn, report in enumerate(reports, 1):
        resumed, prompt = report.get("resumed_tokens", 0), report["prompt_tokens"]
        held = report["resident_tokens"]
        print(f"turn {turn}: {prompt} tokens, from token {resumed} on; holds {held}")
    print(answer or f"no answer within {given.turns} turns")
    return 0


if __name__ == "__main__":
    sys.exit(main())
