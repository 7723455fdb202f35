"""SGLang's own route, streamed: the text as it comes, and what is kept meanwhile.

python docs/examples/native_stream.py --url http://127.0.0.1:30000 --budget 1024
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import requests


def chunks(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Events of a streamed ``/generate``.

    Raises
    ------
    SystemExit
        With what the server says of a request that it refuses: when the error comes,
        HTTP 200 has been sent already.
    """
    with requests.post(f"{url}/generate", json=body, stream=True) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise SystemExit(event["error"]["message"])
            yield event


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask once and print the answer as it comes."""
    parser = argparse.ArgumentParser(description="One streamed answer.")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--text", default="Once upon a time there was a whale who")
    parser.add_argument("--max-tokens", type=int, default=128)
    given = parser.parse_args(arguments)
    body = {
        "text": given.text,
        "stream": True,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": given.max_tokens,
            "custom_params": {"kv_compress": {"budget": given.budget}},
        },
    }
    shown, kept = 0, None
    for event in chunks(given.url, body):
        # Every event has the whole text so far.
        print(event["text"][shown:], end="", flush=True)
        shown, kept = len(event["text"]), event["meta_info"]["kv_compress"]
    if kept is None:
        raise SystemExit("the server sent nothing")
    print(f"\n[{kept['resident_tokens']} of {kept['logical_tokens']} tokens kept]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
