"""Answers that a grammar constrains, behind a compressed prompt."""

from __future__ import annotations

import json
import re
from typing import Any

from bench.features.asking import RATE, Asker
from bench.features.compressed import expect_compressed
from bench.features.verdicts import Check, expect

COLOURS = ["red", "green", "blue"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"type": "string", "enum": COLOURS},
        "good": {"type": "boolean"},
        "tags": {
            "type": "array",
            "items": {"type": "string", "enum": ["one", "two"]},
            "minItems": 2,
            "maxItems": 2,
        },
    },
    "required": ["colour", "good", "tags"],
    "additionalProperties": False,
}
"""Every answer of it is short, so that none runs into its limit."""
REGEX = r"[0-9]{4}-[0-9]{2}: (yes|no)"


def obeys(value: Any) -> bool:
    """Whether a value is of `SCHEMA`."""
    if not isinstance(value, dict) or set(value) != set(SCHEMA["properties"]):
        return False
    tags = value["tags"]
    return (
        value["colour"] in COLOURS
        and isinstance(value["good"], bool)
        and isinstance(tags, list)
        and len(tags) == 2
        and set(tags) <= {"one", "two"}
    )


def json_schema(asker: Asker) -> str:
    """A chat with a response_format."""
    question = "\nDescribe this in JSON: a colour, whether it is good, two tags."
    reply = asker.chat(
        asker.text(asker.sizes.middle) + question,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA},
        },
    )
    try:
        right = obeys(json.loads(reply.text))
    except ValueError:
        right = False
    expect(right, "JSON of the schema", repr(reply.text))
    kept = expect_compressed(asker, reply, RATE)
    return f"{reply.text!r} behind {reply.prompt} tokens, {kept}"


def regex(asker: Asker) -> str:
    """``/generate`` with a regular expression."""
    reply = asker.generate(
        asker.text(asker.sizes.middle) + "\nThe month and the answer:",
        regex=REGEX,
    )
    expect(bool(re.fullmatch(REGEX, reply.text)), f"a match of {REGEX}", repr(reply))
    kept = expect_compressed(asker, reply, RATE)
    return f"{reply.text!r} behind {reply.prompt} tokens, {kept}"


CHECKS = (Check("json_schema in a chat", json_schema), Check("regex", regex))
