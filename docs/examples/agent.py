"""An agent: the model asks for tools, we run them, until it answers or a limit is met.

    python docs/examples/agent.py --url http://127.0.0.1:30000 --rate 4

Start the server with the ``--tool-call-parser`` of your model. Without it, or with a
model that knows no tools, the answer comes as plain text, which ends the loop. A
conversation is compressed anew in every turn; its prefix stays in the cache whole.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import openai

_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(expression: str) -> float:
    """Value of a sum such as ``3 * (4 + 5)``; nothing else is evaluated."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f"cannot calculate {expression!r}")

    return value(ast.parse(expression, mode="eval").body)


TOOLS: dict[str, Callable[..., Any]] = {"calculate": calculate}
DESCRIBED: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "calculate",
            "description": "Value of a sum with + - * / and brackets.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        },
    }
]


def call(name: str, arguments: str) -> str:
    """Run a tool; what goes wrong is told to the model, which may try again."""
    if name not in TOOLS:
        return f"error: no tool {name!r}; there are {', '.join(TOOLS)}"
    try:
        given = json.loads(arguments)
        return str(TOOLS[name](**given))
    except Exception as error:  # whatever the model has written
        return f"error: {type(error).__name__}: {error}"


def run(
    client: openai.OpenAI, question: str, rate: float, turns: int, max_tokens: int
) -> tuple[str, int]:
    """The answer, and how many tools were called; empty if the turns are used up."""
    messages: list[Any] = [{"role": "user", "content": question}]
    calls = 0
    for _ in range(turns):
        reply = client.chat.completions.create(
            model="default",
            messages=messages,
            tools=DESCRIBED,
            temperature=0,
            max_tokens=max_tokens,
            extra_body={"custom_params": {"kv_compress": {"rate": rate}}},
        )
        message = reply.choices[0].message
        wanted: list[Any] = message.tool_calls or []
        if not wanted:
            return message.content or "", calls
        messages.append(message.model_dump(exclude_none=True))
        for each in wanted:
            calls += 1
            result = call(each.function.name, each.function.arguments)
            messages.append(
                {"role": "tool", "tool_call_id": each.id, "content": result}
            )
    return "", calls


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask once; 1 if no answer came within the turns."""
    parser = argparse.ArgumentParser(description="An agent with a calculator.")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--rate", type=float, default=4)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--question", default="What is 12 * (7 + 30)? Use the tool.")
    given = parser.parse_args(arguments)
    client = openai.OpenAI(base_url=f"{given.url}/v1", api_key="none")
    answer, calls = run(
        client, given.question, given.rate, given.turns, given.max_tokens
    )
    print(answer or f"no answer within {given.turns} turns")
    print(f"[{calls} tool calls]")
    return 0 if answer else 1


if __name__ == "__main__":
    sys.exit(main())
