"""`tools.advise` over HTTP, as its users run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_kvc.tools.advise.__main__ import main
from tests.engine.server import Server
from tests.engine.texts import corpus

pytestmark = pytest.mark.server


def test_advise(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates 1 and 4 on a text and a chat; of two prompts nothing can be told."""
    text = corpus()[6000:7000]
    chat = [{"role": "user", "content": f"Sum it up: {corpus()[7000:8000]}"}]
    lines = [
        {"prompt": text, "reference": "a story of a whale"},
        {"messages": chat, "reference": ["a whale", "the sea"]},
    ]
    prompts, raw = tmp_path / "prompts.jsonl", tmp_path / "raw.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    words = f"--rates 1,4 --max-new-tokens 6 --concurrency 2 --out {raw}".split()
    words += ["--url", server.url, "--prompts", str(prompts), "--json"]
    assert main(words) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    full, four = found["rows"]
    assert (full["rate"], four["rate"]) == (1, 4)
    assert full["resident"] == full["logical"] == four["logical"]
    assert four["resident"] < four["logical"] / 2
    assert full["equal"] == 1
    assert full["means"]["agreement"] == 1
    assert full["logprob"] < 0
    assert set(full["kept"]) >= {"likelihood", "agreement", "contains", "rouge_l"}
    assert full["speed"] > 0
    assert four["speed"] > 0
    # Too few, and a small model may never say what is asked for.
    assert found["advice"].startswith("Cannot tell")
    assert not found["dictated"]
    assert "--enable-custom-logit-processor" in said.err
    answers = [json.loads(line) for line in raw.read_text().splitlines()]
    assert sorted((a["line"], a["rate"]) for a in answers) == [
        (1, 1),
        (1, 4),
        (2, 1),
        (2, 4),
    ]
    assert main(words) == 1
    assert "cannot write --out" in capsys.readouterr().err
