"""Tool calls and reasoning, taken out of answers behind compressed prompts."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from bench.features.asking import RATE, Asker, Reply
from bench.features.compressed import expect_compressed
from bench.features.verdicts import Check, expect

TOOL_FLAGS = ("--tool-call-parser", "qwen25")
REASONING_FLAGS = ("--reasoning-parser", "qwen3")
COLOURS = ["red", "green", "blue"]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "set_lamp",
        "description": "Set the colour of the lamp, and whether it is bright.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "colour": {"type": "string", "enum": COLOURS},
                "bright": {"type": "boolean"},
            },
            "required": ["colour", "bright"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "set_lamp"}}
THOUGHT = r"<think>[a-z]{4,12} [a-z]{4,12}</think>[A-Z]{3,6}\."


def is_call(call: tuple[str, str]) -> bool:
    """Whether a call's name and arguments are those of `TOOL`."""
    name, arguments = call
    try:
        given = json.loads(arguments)
    except ValueError:
        return False
    return (
        name == TOOL["function"]["name"]
        and isinstance(given, dict)
        and set(given) == {"colour", "bright"}
        and given["colour"] in COLOURS
        and isinstance(given["bright"], bool)
    )


def tool_call(asker: Asker, choice: Any, stream: bool) -> str:
    """A chat that has to call the tool.

    The first call alone is judged. The grammar allows text and more calls behind it,
    and a small model goes on to its limit, which may cut off the last one.
    """
    reply = asker.chat(
        asker.text(asker.sizes.short) + "\nSet the lamp to a bright green.",
        stream=stream,
        tools=[TOOL],
        tool_choice=choice,
    )
    right = bool(reply.tools) and is_call(reply.tools[0])
    expect(right, "a call of set_lamp with its arguments", reply)
    seen = f"{reply.tools[0]}, finish {reply.finish}, {_streamed(reply, stream)}"
    return seen + expect_compressed(asker, reply, RATE)


def reasoning(asker: Asker, stream: bool) -> str:
    """A chat whose answer a regular expression forces to be a thought and a word.

    The thought is forced as well: the grammar holds from the first token on, for
    `Asker.chat` says that the model does not think.
    """
    reply = asker.chat(
        asker.text(asker.sizes.short) + "\nThink, then answer with one word.",
        stream=stream,
        regex=THOUGHT,
    )
    thought, word = reply.reasoning.strip(), reply.text.strip()
    apart = thought.replace(" ", "").islower() and word.rstrip(".").isupper()
    clean = "think>" not in thought + word
    expect(apart and clean, "a lower-case thought apart from an upper-case word", reply)
    seen = f"thought {thought!r}, content {word!r}, "
    return f"{seen}{_streamed(reply, stream)}{expect_compressed(asker, reply, RATE)}"


def _streamed(reply: Reply, stream: bool) -> str:
    if not stream:
        return ""
    expect(reply.events > 2, "more than two events", reply.events)
    return f"{reply.events} events, "


CHECKS = (
    Check("tool call", partial(tool_call, choice="required", stream=False)),
    Check("tool call, streamed", partial(tool_call, choice="required", stream=True)),
    Check("named tool call", partial(tool_call, choice=NAMED, stream=False)),
    Check("named tool call, streamed", partial(tool_call, choice=NAMED, stream=True)),
    Check("reasoning", partial(reasoning, stream=False)),
    Check("reasoning, streamed", partial(reasoning, stream=True)),
)
