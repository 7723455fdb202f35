"""`make test` fails if a test of any lane fails, or if there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import lanes

SERVER = "@pytest.mark.server\n"


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("def test_a(): pass", 0),
        (f"{SERVER}def test_a(): pass", 0),
        (f"def test_b(): pass\n{SERVER}def test_a(): assert 0", 1),
        (f"def test_b(): assert 0\n{SERVER}def test_a(): pass", 1),
        ("x = 1", lanes.NO_TESTS),
    ],
)
def test_a_failure_in_any_lane_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    source: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    # They take longer to load than these tests to run.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    Path("pytest.ini").write_text("[pytest]\nmarkers = server: x")
    Path("test_x.py").write_text(f"import pytest\n{source}\n")
    assert lanes.main(["test_x.py"]) == code
    shown = capfdbinary.readouterr().out
    assert shown.count(b"test session starts") == 2


def test_each_run_gets_its_switch_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = []

    def note(command: list[str], env: dict[str, str], **_: object) -> object:
        assert "PYTHONDONTWRITEBYTECODE" not in env
        ran.append((command[3:], env.get("TRITON_INTERPRET")))
        return type("Ran", (), {"returncode": 0})

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(lanes.subprocess, "run", note)
    assert lanes.main([]) == 0
    rest = f"--ignore={lanes.KERNELS}"
    assert sorted(ran, key=str) == [
        (["-m", "not server", rest], None),
        (["-m", "server", rest], None),
        ([lanes.KERNELS], "1"),
    ]
