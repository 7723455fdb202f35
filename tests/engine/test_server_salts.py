"""The prefix cache keeps tenants apart: what one has sent, no other finds."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from sglang_kvc.config.pages import PAGE_SIZE
from tests.engine.server import Server
from tests.engine.texts import corpus

pytestmark = pytest.mark.server

# Characters of the corpus that no other test of the server sends first.
TEXT = {"cache_salt": 40_000, "extra_key": 44_000}
# Less than a chunk: of two chunks, a wrong salt for the last one would end the server.
CHARACTERS = 700
MOST_NEW = 2


def ask(client: openai.OpenAI, text: str, **tenant: str) -> dict[str, Any]:
    """meta_info of a chat that begins with `text`, for this tenant."""
    answer = client.chat.completions.create(
        model="default",
        messages=[
            {"role": "system", "content": text},
            {"role": "user", "content": "Summarize."},
        ],
        temperature=0,
        max_tokens=MOST_NEW,
        extra_body={"return_meta_info": True, **tenant},
    )
    info: dict[str, Any] = answer.choices[0].meta_info  # type: ignore[attr-defined]
    # Only a compressed prompt comes to the cache on our way.
    assert info["kv_compress"]["passes"] >= 1
    return info


@pytest.mark.parametrize("field", TEXT)
def test_only_the_same_salt_finds_a_prompt(
    server: Server, client: openai.OpenAI, field: str
) -> None:
    """On 0.5.17 SGLang makes one key of both fields; later they are two."""
    text = corpus()[TEXT[field] :][:CHARACTERS]
    first = ask(client, text, **{field: "mine"})
    assert 160 < first["prompt_tokens"] < 256
    assert first["cached_tokens"] == 0
    assert ask(client, text)["cached_tokens"] == 0
    assert ask(client, text, **{field: "theirs"})["cached_tokens"] == 0
    again = ask(client, text, **{field: "mine"})
    window = 2 * PAGE_SIZE
    assert again["cached_tokens"] >= again["prompt_tokens"] - window - PAGE_SIZE
