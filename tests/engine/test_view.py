"""The viewer, and what it asks for, against a real server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sglang_kvc.tools.view.__main__ import main
from sglang_kvc.tools.view.client import Client
from tests.engine.server import Server, body_of
from tests.engine.texts import corpus, prompt

pytestmark = pytest.mark.server

START, CHARACTERS, NEW = 40_000, 1200, 20


@pytest.fixture
def text() -> str:
    """A prompt of some 300 tokens, one of them half a character."""
    return corpus()[START : START + CHARACTERS] + " 🦥 </script><b>"


def test_a_page_is_written(
    server: Server, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "prompt.txt", tmp_path / "view.html"
    source.write_text(text, encoding="utf-8")
    argv = ["--url", server.url, "--prompt", str(source), "--out", str(out)]
    assert main([*argv, "--rates", "4", "--max-new-tokens", str(NEW)]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(out)
    assert "Rate 4: " in told.err

    page = out.read_text(encoding="utf-8")
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])
    assert "".join(data["tokens"]) == text
    ids, _ = Client(server.url).tokens(text)
    (series,) = data["series"]
    shares = series["shares"]
    assert len(data["tokens"]) == len(shares) == len(ids)
    # Sinks stay, a quarter is held, and not all of it by all.
    assert shares[:4] == [1.0] * 4
    assert 0.15 < sum(shares) / len(shares) < 0.4
    assert len(set(shares)) > 10
    assert page.count('<th scope="row">head') == 3
    assert page.count("<article>") == 2


def test_a_prompt_too_long_is_refused_in_one_line(
    server: Server, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "prompt.txt"
    source.write_text(text * 30, encoding="utf-8")
    out = tmp_path / "view.html"
    argv = ["--url", server.url, "--prompt", str(source), "--out", str(out)]
    assert main(argv) == 1
    assert "the server refused the prompt: " in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_shares_come_once_and_with_the_complete_answer(server: Server) -> None:
    body = body_of(prompt(server.model, START, 300), NEW, {"report_tokens": True})
    with server.post("/generate", {**body, "stream": True}, stream=True) as response:
        chunks = [
            json.loads(line.removeprefix(b"data: "))["meta_info"]["kv_compress"]
            for line in response.iter_lines()
            if line and line != b"data: [DONE]"
        ]
    assert len(chunks) > 5
    *before, last = chunks
    assert len(last["prompt_token_shares"]) == 300
    assert not any("prompt_token_shares" in chunk for chunk in before)


def test_a_whole_cache_holds_every_token(server: Server) -> None:
    kv = {"enabled": False, "report_tokens": True}
    info = server.generate(prompt(server.model, START, 100), 4, kv)
    assert info["kv_compress"]["prompt_token_shares"] == [1.0] * 100
