"""LangChain on the OpenAI route. Needs ``pip install langchain-openai``.

Install it in an environment of its own: it wants another release of ``openai`` than
SGLang does.

python docs/examples/langchain_chat.py --url http://127.0.0.1:30000 --rate 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one chain."""
    parser = argparse.ArgumentParser(description="One chain of LangChain.")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--rate", type=float, default=8)
    parser.add_argument("--topic", default="whales")
    parser.add_argument("--max-tokens", type=int, default=128)
    given = parser.parse_args(arguments)
    model = ChatOpenAI(
        model="default",
        base_url=f"{given.url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=given.max_tokens,
        extra_body={"custom_params": {"kv_compress": {"rate": given.rate}}},
    )
    prompt = ChatPromptTemplate.from_template("Tell me one thing about {topic}.")
    print((prompt | model | StrOutputParser()).invoke({"topic": given.topic}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
