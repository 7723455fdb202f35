"""Every program of docs/examples runs against the server as it is written there."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.engine.server import Server
from tests.engine.texts import corpus

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
FEW = ("--max-tokens", "6")
KEPT = re.compile(r"\[(\d+) of (\d+) tokens kept\]")


def load(name: str) -> ModuleType:
    """A program as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Exit status and output of a program."""

    def start(name: str, *words: str) -> tuple[int, str]:
        status: int = load(name).main(["--url", server.url, *words])
        return status, capsys.readouterr().out

    return start


def kept(said: str) -> tuple[int, int]:
    """Resident and logical tokens that a program has printed."""
    found = KEPT.search(said)
    assert found, said
    return int(found[1]), int(found[2])


@pytest.mark.server
def test_openai_client(run: Callable[..., Any]) -> None:
    question = f"What is this about?\n\n{corpus()[:1200]}"
    status, said = run("openai_client", "--question", question, *FEW)
    resident, logical = kept(said)
    assert status == 0
    assert resident < logical / 2


@pytest.mark.server
def test_native_stream(run: Callable[..., Any]) -> None:
    words = ("--text", corpus()[:1200], "--budget", "64", *FEW)
    status, said = run("native_stream", *words)
    resident, logical = kept(said)
    assert status == 0
    assert resident < logical / 2
    with pytest.raises(SystemExit, match="at least 48 tokens"):
        run("native_stream", "--budget", "16")


@pytest.mark.server
def test_frontend_program(run: Callable[..., Any]) -> None:
    status, said = run("frontend_program", *FEW)
    assert status == 0
    assert said.count("---") == 2
    assert kept(said)[1] > 60


@pytest.mark.server
def test_agent_takes_plain_text_for_an_answer(run: Callable[..., Any]) -> None:
    """SmolLM2 calls no tool that the server could parse."""
    status, said = run("agent", *FEW)
    assert status == 0
    assert "[0 tool calls]" in said


@pytest.mark.server
def test_session_agent(run: Callable[..., Any], tmp_path: Path) -> None:
    """Without sessions it only computes more; with them: `test_server_sessions`."""
    (document := tmp_path / "document.txt").write_text(corpus()[:900])
    words = ("--document", str(document), "--turns", "2", *FEW)
    status, said = run("session_agent", *words)
    assert status == 0
    assert re.search(r"turn 1: \d+ tokens, from token 0 on; holds \d+", said)


def test_session_agent_searches_its_document() -> None:
    agent = load("session_agent")
    document = "One apple.\n\n Two pears.\nAn APPLE pie.\n"
    assert agent.search(document, "apple") == "One apple.\nAn APPLE pie."
    assert agent.search(document, "plum") == "nothing is said of 'plum'"
    assert agent.asked_for("I will SEARCH: pears now") == "pears"
    assert agent.asked_for("a longest word") == "longest"
    assert agent.asked_for("") == "the"


def test_agent_survives_what_a_model_may_write() -> None:
    """Tools that do not exist, arguments that are no JSON, and no end."""
    agent = load("agent")
    asked = [("calculate", '{"expression": "12 * (7 + 30)"}'), ("nope", "{}")]
    asked += [("calculate", "{"), ("calculate", '{"expression": "__import__(1)"}')]
    seen: list[Any] = []

    def create(**fields: Any) -> Any:
        seen.append(list(fields["messages"]))
        calls = [
            SimpleNamespace(id=str(n), function=SimpleNamespace(name=a, arguments=b))
            for n, (a, b) in enumerate(asked)
        ]
        dumped = {"role": "assistant", "tool_calls": []}
        message = SimpleNamespace(
            tool_calls=calls, content=None, model_dump=lambda **_: dumped
        )
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])

    chat = SimpleNamespace(completions=SimpleNamespace(create=create))
    answer, calls = agent.run(SimpleNamespace(chat=chat), "?", 4, 2, 8)
    assert (answer, calls) == ("", 8)
    told = [m["content"] for m in seen[1] if m["role"] == "tool"]
    assert told[0] == "444"
    assert all(text.startswith("error: ") for text in told[1:])
    assert len(seen) == 2


@pytest.mark.server
def test_batch_documents(
    server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One document is longer than the model's context; the others are answered."""
    texts = {
        "a.txt": corpus()[:900],
        "b.txt": corpus()[900:1800],
        "c.txt": "x y " * 20_000,
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    words = ["--url", server.url, str(tmp_path), *FEW]
    assert load("batch_documents").main(words) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == list(texts)
    assert all(row["kept"] < row["tokens"] for row in rows[:2])
    assert rows[2]["error"]


@pytest.mark.server
def test_langchain(run: Callable[..., Any]) -> None:
    pytest.importorskip(
        "langchain_openai", reason="langchain-openai wants another openai than SGLang"
    )
    status, said = run("langchain_chat", *FEW)
    assert status == 0
    assert said.strip()


def test_every_example_is_tested_and_listed() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert all(f'"{name}"' in Path(__file__).read_text() for name in names)
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in listed for name in names)
