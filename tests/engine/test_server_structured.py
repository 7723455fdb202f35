"""Structured output on a machine without a GPU, over HTTP."""

from __future__ import annotations

import json

import openai
import pytest

from tests.engine.server import Server
from tests.engine.test_server_hostile import IDS, check_serves

pytestmark = pytest.mark.server


def test_structured_output_without_a_gpu(server: Server, client: openai.OpenAI) -> None:
    """A JSON schema through OpenAI's API."""
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Alan"]}, "born": {"type": "boolean"}},
        "required": ["name", "born"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Who wrote the first program?"}],
        temperature=0,
        # JSON may have any whitespace, and the first layers alone like it.
        frequency_penalty=2,
        max_tokens=60,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": schema},
        },
    )
    person = json.loads(answer.choices[0].message.content or "")
    assert person["name"] in ("Ada", "Alan")
    assert isinstance(person["born"], bool)
    check_serves(server)


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [({"regex": "(left|right){2}"}, 8), ({"ebnf": 'root ::= "left" | "right"'}, 4)],
)
def test_grammars_without_a_gpu(
    server: Server, grammar: dict[str, str], expected: int
) -> None:
    """Also beside requests without one, and sampled."""
    params = {"max_new_tokens": 16, "temperature": 1, **grammar}
    free = {"max_new_tokens": 4, "temperature": 1}
    body = {"input_ids": [IDS, IDS, IDS], "sampling_params": [params, free, params]}
    response = server.post("/generate", body)
    assert response.status_code == 200, response.text
    texts = [answer["text"] for answer in response.json()]
    for text in (texts[0], texts[2]):
        assert text.replace("left", "").replace("right", "") == ""
        assert len(text) >= expected
    check_serves(server)
