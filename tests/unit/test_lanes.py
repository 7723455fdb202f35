"""`make test` runs every test once, and fails if one fails or if there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import lanes
from tests.claims import BACKWARDS, CLAIMS

ROOT = Path(__file__).parents[2]
SERVER = "def test_{}(server): {}"
FIXTURE = """
import pytest
@pytest.fixture(scope="session")
def server():
    open("starts", "a").write("x")
    yield
    open("ends", "a").write("x")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the lanes of these tests run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # They take longer to load than these tests to run.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name in (CLAIMS, BACKWARDS):
        monkeypatch.delenv(name, raising=False)
    Path("pytest.ini").write_text("[pytest]")
    Path("conftest.py").write_text(FIXTURE)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("def test_a(): pass", 0),
        (SERVER.format("a", "pass"), 0),
        ("def test_b(): pass\n" + SERVER.format("a", "assert 0"), 1),
        ("def test_b(): assert 0\n" + SERVER.format("a", "pass"), 1),
        ("x = 1", lanes.NO_TESTS),
    ],
)
def test_a_failure_in_any_lane_counts(
    capfdbinary: pytest.CaptureFixture[bytes], source: str, code: int
) -> None:
    Path("test_x.py").write_text(f"{source}\n")
    assert lanes.main(["test_x.py"]) == code
    shown = capfdbinary.readouterr().out
    assert shown.count(b"test session starts") == 2


def test_every_test_runs_once_and_one_server_is_started() -> None:
    """Tests of several files; those of the server stand among others."""
    note = "open('ran', 'a').write('{0}\\n')"
    for number in range(6):
        one, two = f"{number}a", f"{number}b"
        wait = "import time; time.sleep(0.05); "
        Path(f"test_{number}.py").write_text(
            f"def test_a(): {wait}{note.format(one)}\n"
            f"def test_b(server): {note.format(two)}\n"
        )
    assert lanes.main(["."]) == 0
    ran = sorted(Path("ran").read_text().split())
    assert ran == [f"{number}{test}" for number in range(6) for test in "ab"]
    assert Path("starts").read_text() == Path("ends").read_text() == "x"


def test_each_run_gets_its_switch_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = []

    def note(command: list[str], env: dict[str, str], **_: object) -> object:
        assert "PYTHONDONTWRITEBYTECODE" not in env
        switches = ("TRITON_INTERPRET", BACKWARDS)
        ran.append((command[3:], *(env.get(name) for name in switches)))
        return type("Ran", (), {"returncode": 0})

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(lanes.subprocess, "run", note)
    assert lanes.main([]) == 0
    left_out = [f"--ignore={lanes.KERNELS}", f"--ignore={lanes.NEWCOMER}"]
    rest = ["-p", "tests.claims", *left_out]
    assert sorted(ran, key=str) == [
        (rest, None, "0"),
        (rest, None, "1"),
        ([lanes.KERNELS], "1", None),
    ]
