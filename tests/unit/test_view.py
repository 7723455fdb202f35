"""The viewer: what it asks, how it reads tokens, what it writes, how it fails."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sglang_kvc.tools.token_ids import TOKENIZE
from sglang_kvc.tools.view.__main__ import main
from sglang_kvc.tools.view.client import Answer
from sglang_kvc.tools.view.drawings import LEVELS, chart, level, ticks
from sglang_kvc.tools.view.page import (
    View,
    agreement,
    first_difference,
    render,
    script_safe,
)
from sglang_kvc.tools.view.texts import BROKEN, spell

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='hacked=1'>&\"$x"
)
WORDS = ["<s>", " one", " two", "\n", HOSTILE, " five", " \u2028six", "\n", "!"] * 4
SHARES = [1.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 0.0] * 4


def answer(
    rate: float | None, shares: list[float], text: str = f"An answer {HOSTILE}"
) -> Answer:
    """One that has been told all there is to tell."""
    length = len(shares)
    summary = {
        **{"logical_tokens": length + 3, "resident_tokens": 40, "passes": 2},
        **{"peak_resident_tokens": 50, "budget_tokens": rate and 32},
        "prompt_token_shares": shares,
    }
    if rate:
        packed = [16, 48, 160, 32, 64, 96]
        summary |= {"packed_tokens_per_head": packed, "num_layers": 3}
    ids = [ord(sign) for sign in text]
    logical = [length + i for i in range(4)]
    return Answer(rate, text, ids, [1, 2, 3, 4], logical, [40] * 4, summary)


def view() -> View:
    """A page with every colour, a difference, and texts that want to be code."""
    none = [0.0 if share == 0.05 else share for share in SHARES]
    answers = [
        answer(None, [1.0] * len(WORDS)),
        answer(2, SHARES),
        answer(8, none, f"An answer, or {HOSTILE}"),
        Answer(16, refused=f"too long {HOSTILE}"),
    ]
    return View(HOSTILE, HOSTILE, WORDS, answers)


def test_no_text_becomes_code() -> None:
    page = render(view())
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])
    assert data["tokens"] == WORDS
    assert [one["shares"][1] for one in data["series"]] == [0.05, 0.0]


def test_the_page_names_nothing_that_is_elsewhere() -> None:
    page = render(View("m", "p", WORDS[:4], view().answers))
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "url(" not in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("text", [HOSTILE, "<!-- <script>", "\u2028 \x00 ü", "]]>"])
def test_json_in_a_script_is_the_same_json(text: str) -> None:
    safe = script_safe({"a": [text]})
    assert json.loads(safe) == {"a": [text]}
    assert not set("<>&") & set(safe)


def test_the_first_difference_is_marked() -> None:
    page = render(view())
    assert "An answer<mark>,</mark>" in page
    assert page.count("<mark>") == 1
    assert "differs from token 10" in page
    assert "refused: too long" in page


@pytest.mark.parametrize(
    ("text", "other", "place"),
    [("", "", None), ("ab", "ab", None), ("ab", "ac", 1), ("a", "ab", 1), ("b", "", 0)],
)
def test_first_difference(text: str, other: str, place: int | None) -> None:
    assert first_difference(text, other) == place


def test_an_answer_that_is_a_beginning_differs_behind_its_end() -> None:
    full, short = answer(None, SHARES, "abc"), answer(2, SHARES, "ab")
    assert agreement(short, full) == "differs from token 3"
    assert agreement(answer(2, SHARES, "abc"), full) == "the same answer"
    assert "ab<mark>⏹</mark>" in render(View("m", "p", WORDS, [full, short]))


def test_levels_rise_with_shares() -> None:
    assert [level(share) for share in LEVELS] == list(range(len(LEVELS)))
    assert level(0.001) == 1


@pytest.mark.parametrize("top", [1, 2, 7, 48, 64, 999, 1989, 30_000, 131_072])
def test_ticks_are_few_and_round(top: int) -> None:
    found = ticks(top)
    assert 2 <= len(found) <= 6
    assert found[-1] <= top < found[-1] + found.step


def test_the_chart_tells_its_numbers() -> None:
    drawn = chart(view().answers)
    assert "Rate 8: 40" in drawn
    assert "logical: 36 to 39 tokens" in drawn
    assert len(re.findall("<polyline", drawn)) == 3


PIECES = {1: "<s>", 2: "Hello", 3: "wor", 4: "ld", 5: BROKEN, 6: BROKEN, 7: "\n", 8: ""}


def decode(groups: list[list[int]]) -> list[str]:
    """A tokenizer that drops spaces and has characters of two tokens."""
    return ["🙂" if group == [5, 6] else PIECES[group[0]] for group in groups]


def test_tokens_spell_the_prompt() -> None:
    prompt = "Hello  world 🙂\n Hello"
    texts = spell(prompt, [1, 2, 3, 4, 5, 6, 7, 8, 2], decode)
    assert texts == ["<s>", "Hello", "  wor", "ld", " 🙂", "", "\n", "", " Hello"]
    assert "".join(texts[1:]) == prompt


class Fake(BaseHTTPRequestHandler):
    """A server that behaves as `server.mode` says: for what a real one does not do."""

    def do_GET(self) -> None:
        self._send(200, {"model_path": "/models/m"})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        mode = self.server.mode  # type: ignore[attr-defined]
        if self.path == TOKENIZE:
            self._send(200, {"tokens": [2, 3]})
        elif self.path == "/detokenize":
            self._send(200, {"text": decode(body["tokens"])})
        elif mode == "too long":
            self._send(400, {"error": {"message": "longer than the context"}})
        else:
            info: dict[str, Any] = {"completion_tokens": 1}
            if mode == "breaks off":
                kept = {"logical_tokens": 3, "resident_tokens": 3}
                info["kv_compress"] = kept
            event = {"text": "a", "output_ids": [1], "meta_info": info}
            self._send(200, event, b"data: ")

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _send(self, code: int, body: Any, before: bytes = b"") -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(before + json.dumps(body).encode() + b"\n\n")


@pytest.fixture(scope="module")
def fake() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Fake) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("stock", "the server runs without --kv-compress"),
        (
            "too long",
            "the server refused the prompt: HTTP 400: longer than the context",
        ),
        ("breaks off", "the answer broke off before its end"),
    ],
)
def test_a_server_that_cannot_is_named(
    fake: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    message: str,
) -> None:
    fake.mode = mode
    (tmp_path / "p.txt").write_text("Hello world")
    url = f"http://127.0.0.1:{fake.server_port}"
    out = tmp_path / "view.html"
    assert main(["--url", url, "--prompt", f"{tmp_path}/p.txt", "--out", str(out)]) == 1
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]
    assert err[-1].startswith("view: ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "gone.txt"], "gone.txt could not be read: No such file"),
        (["--prompt", "empty.txt"], "empty.txt is empty"),
        (["--prompt", "bytes.txt"], "bytes.txt must be text in UTF-8"),
        (["--prompt", "p.txt", "--out", "no/where.html"], "folder that exists"),
        (["--prompt", "p.txt", "--url", "http://127.0.0.1:1"], "no server answers"),
        (["--prompt", "p.txt", "--url", "nonsense"], "no server answers at nonsense"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("Hello")
    Path("empty.txt").write_text(" \n")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rates", "2,0.5"], "rates of at least 1"),
        (["--rates", "2,x"], "rates of at least 1"),
        (["--rates", "nan"], "rates of at least 1"),
        (["--max-new-tokens", "0"], "must be a number above 0"),
    ],
)
def test_a_bad_option_ends_with_usage(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--prompt", "p.txt", *argv])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
