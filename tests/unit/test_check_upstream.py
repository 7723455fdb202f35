"""The program that compares two SGLang releases: what it reads, its errors, its end."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from sglang_kvc.patches import catalogue
from sglang_kvc.tools import check_upstream
from sglang_kvc.tools.upstream_diff import release, touched
from sglang_kvc.tools.upstream_diff.ours import Needed, read_ours
from sglang_kvc.tools.upstream_diff.release import CheckError, open_release
from tests.unit.small_wheels import make_wheel

MODULE = "sglang/srt/managers/scheduler.py"
LOOP = "class Scheduler:\n    def get_init_info(self):\n        pass\n"


def test_our_own_source_is_understood() -> None:
    ours = read_ours()
    assert [p.needed_by.removesuffix(".py") for p in ours.patches] == [
        *catalogue.PARENT,
        *catalogue.SCHEDULER,
    ]
    assert sum(bool(patch.allowed) for patch in ours.patches) > 20
    assert {"sglang.srt.mem_cache.radix_cache:RadixKey"} <= {
        symbol.target for symbol in ours.symbols
    }
    assert "cache_finished_req" in str(ours.derived)
    assert {"tp_size", "beam_width"} & ours.words
    assert set(ours.members) <= set(touched.HOMES)


def write_package(folder: Path, patch: str, types: str = "") -> Path:
    """Our package in small."""
    files = {
        "patches/catalogue.py": "PARENT = ('a',)\nSCHEDULER: tuple = ()\n",
        "patches/a.py": f"PATCH = Patch({patch})\n",
        "upstream/compat.py": "SEAMS = (Seam('m:f', ('x',), needed_by='us'),)\n",
        "upstream/types.py": types,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ("None", ()),
        ("('self', 'x')", (("self", "x"),)),
        ("(('self',), ('self', 'x'))", (("self",), ("self", "x"))),
        ("{'0.5.17': ('self',), NEW: ('self', 'x')}", (("self",), ("self", "x"))),
        ("{'0.5.17': ('self',), '0.5.19': None}", (("self",), None)),
    ],
)
def test_parameters_of_a_patch(tmp_path: Path, params: str, allowed: Any) -> None:
    patch = f"target='m:' 'A.f', expected_params={params}"
    types = "class Req(Protocol):\n    kv: int\n    def stop(self): ...\n"
    ours = read_ours(write_package(tmp_path, patch, types))
    assert ours.patches == [Needed("m:A.f", "a.py", allowed)]
    assert ours.symbols[0] == Needed("m:f", "us", (("x",),))
    assert ours.members["Req"] >= {"kv", "stop"}


def test_own_source_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"target of patches/a\.py"):
        read_ours(write_package(tmp_path, "target=TARGET"))
    (tmp_path / "patches/a.py").write_text("PATCH = (")
    with pytest.raises(CheckError, match=r"a\.py cannot be read"):
        read_ours(tmp_path)
    (tmp_path / "patches/a.py").write_text("")
    with pytest.raises(CheckError, match="No PATCH"):
        read_ours(tmp_path)


def test_what_is_no_release_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.whl").write_text("no zip")
    bad = make_wheel(tmp_path, {"sglang/srt/managers/scheduler.py": "def ("})
    for given, message in (
        (tmp_path / "text.whl", "is no wheel"),
        (tmp_path, "it is no SGLang"),
        (tmp_path / "sglang-1.whl", "neither an existing file"),
        (bad, "cannot be read by Python"),
    ):
        against = ["--against", str(bad)]
        assert check_upstream.main([str(given), *against]) == check_upstream.UNCHECKED
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        assert message in errors


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (
            "ERROR: Could not find a version that satisfies the requirement "
            "sglang==9.9 (from versions: 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)\nERROR: No",
            r"There is no SGLang 9\.9.* 0\.2, 0\.3, 0\.4, 0\.5, 0\.6\.",
        ),
        ("WARNING: x\nERROR: no route", r"could not be downloaded \(ERROR: no route\)"),
        ("", "pip said nothing"),
    ],
)
def test_a_version_that_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, message: str
) -> None:
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(release.subprocess, "run", lambda *_a, **_k: done)
    with pytest.raises(CheckError, match=message):
        open_release("9.9", tmp_path)


def test_a_version_is_fetched_and_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        make_wheel(Path(command[command.index("--dest") + 1]), {}, "9.9")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(release.subprocess, "run", run)
    assert open_release("9.9", tmp_path).version == "9.9"
    assert {"download", "--no-deps", "sglang==9.9"} <= set(commands[0])


def test_without_sglang_the_other_release_must_be_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def distribution(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(release.metadata, "distribution", distribution)
    with pytest.raises(CheckError, match="--against"):
        release.installed_release()


def test_exit_status_and_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = make_wheel(tmp_path, {MODULE: LOOP})
    new = make_wheel(
        tmp_path, {MODULE: LOOP.replace("pass", "return 1")}, version="2.0"
    )
    gone = make_wheel(tmp_path, {}, version="3.0")
    assert check_upstream.main([str(old), "--against", str(old)]) == check_upstream.SAME
    assert "Nothing needs work." in capsys.readouterr().out
    given = [str(new), "--against", str(old), "--diff"]
    assert check_upstream.main(given) == check_upstream.WORK
    text = capsys.readouterr().out
    assert text.startswith("SGLang 2.0 against 1.0")
    assert "read scheduler__get_init_info.py (body changed)" in text
    assert "+    return 1" in text
    assert check_upstream.main([str(gone), "--against", str(old)]) == 1
    assert "adapt scheduler__get_init_info.py (gone)" in capsys.readouterr().out


def test_installed_sglang_has_not_moved_and_is_not_imported() -> None:
    """Every name that is looked for exists: in the table, too."""
    code = (
        "import sys; from importlib import metadata; "
        "from sglang_kvc.tools.check_upstream import main; "
        "status = main([str(metadata.distribution('sglang').locate_file(''))]); "
        "assert not {'sglang', 'torch', 'triton'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SGLang {metadata.version('sglang')} against" in done.stdout
