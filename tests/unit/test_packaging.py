"""The package is importable in every way it is installed, and shadows nothing."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import sglang_kvc
from sglang_kvc.upstream.compat import SUPPORTED_SGLANG
from tests.unit.packed_tree import PAGES, ROOT, copy_packed

PLUGIN = "sglang_kvc.plugin:register"
TYPED = "sglang_kvc/py.typed"


def run_python(code: str, cwd: Path, path: Path | None = None) -> dict[str, str]:
    """Run code in a new interpreter and return the dict it prints as JSON."""
    environment = dict(os.environ)
    if path is not None:
        old = environment.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), old)))
    result = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}"],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, str] = json.loads(result.stdout)
    return found


def source_files() -> set[str]:
    """Return modules and templates of the package as paths inside a wheel."""
    folders = {"sglang_kvc": "", "kernels": "sglang_kvc/", "patches": "sglang_kvc/"}
    return {
        f"{prefix}{file.relative_to(ROOT)}"
        for folder, prefix in folders.items()
        for kind in ("*.py", "page.*")
        for file in (ROOT / folder).rglob(kind)
        if file.parent.name != "__pycache__"
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is packed, in a folder of its own."""
    return copy_packed(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """The wheel."""
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True)
    return next((tree / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    """The sources as they would be uploaded."""
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True)
    return next((tree / "dist").glob("*.tar.gz"))


def test_pypi_kernels_package_wins_in_repository_root() -> None:
    found = run_python(
        "import kernels, sglang_kvc.kernels.layout as layout\n"
        "print(json.dumps({'pypi': kernels.__file__, 'ours': layout.__file__}))",
        cwd=ROOT,
    )
    assert Path(found["pypi"]).name == "__init__.py", "a namespace, not the package"
    assert Path(found["pypi"]).parent != ROOT / "kernels"
    assert Path(found["ours"]).resolve() == ROOT / "kernels" / "layout.py"


def test_installed_package_is_found_from_elsewhere(tmp_path: Path) -> None:
    found = run_python(
        "import importlib.util as u\n"
        "names = 'sglang_kvc', 'sglang_kvc.kernels.layout'\n"
        "print(json.dumps({name: u.find_spec(name).origin for name in names}))",
        cwd=tmp_path,
    )
    assert Path(found["sglang_kvc"]).name == "__init__.py"
    assert Path(found["sglang_kvc.kernels.layout"]).name == "layout.py"


def test_wheel_holds_all_modules_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == source_files() | {TYPED}


def test_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith("/METADATA"))
    said = email.message_from_bytes(archive.read(name))
    assert said["Version"] == sglang_kvc.__version__
    assert said["License"] == "Apache-2.0"
    assert said["Description-Content-Type"] == "text/markdown"
    given = set(said.get_all("Classifier", []))
    assert "Typing :: Typed" in given
    pythons = {c.rpartition(" ")[2] for c in given if "Python :: 3." in c}
    assert pythons == {"3.10", "3.11", "3.12"}
    assert {"plot", "test", "dev"} <= set(said.get_all("Provides-Extra", []))
    assert any(n.endswith("/LICENSE") for n in archive.namelist())


def test_changelog_has_the_version() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    assert sglang_kvc.__version__ in headings


def test_sdist_holds_the_sources_and_the_pages(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    wanted = {*source_files(), *PAGES, TYPED, "LICENSE", "docs/guide.md"}
    assert wanted - files == set()


def test_wheel_declares_the_plugin(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert f"kvcompress = {PLUGIN}" in archive.read(name).decode()


def test_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    found = run_python(
        "import sglang_kvc.kernels.layout as layout\n"
        "print(json.dumps({'ours': layout.__file__}))",
        cwd=tmp_path,
        path=tmp_path / "site",
    )
    expected = tmp_path / "site" / "sglang_kvc" / "kernels" / "layout.py"
    assert Path(found["ours"]) == expected


def test_installed_metadata() -> None:
    plugins = {p.name: p.value for p in entry_points(group="sglang.srt.plugins")}
    assert plugins["kvcompress"] == PLUGIN
    assert version("sglang_kvc") == sglang_kvc.__version__


def test_import_is_light(tmp_path: Path) -> None:
    """Options are unpickled in every SGLang process; the front ends start at once."""
    found = run_python(
        "import sglang_kvc.config.options, sglang_kvc.tools.serve\n"
        "import sglang_kvc.tools.view.__main__\n"
        "heavy = {'torch', 'sglang', 'transformers'} & set(sys.modules)\n"
        "print(json.dumps({'heavy': ' '.join(heavy)}))",
        cwd=tmp_path,
    )
    assert found["heavy"] == ""


@pytest.mark.parametrize("release", ["0.5.17", "0.5.23"])
def test_lock_file_pins_sglang_with_hashes_and_names_no_index(release: str) -> None:
    lock = (ROOT / f"requirements-{release}.lock").read_text()
    pins = re.findall(r"^[a-z0-9._-]+==.*$", lock, flags=re.MULTILINE)
    assert f"sglang=={release} \\" in pins
    assert all(pin.endswith("\\") for pin in pins), "a pin without hashes"
    assert "://" not in lock
    assert "index-url" not in lock


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Output of make, which only says what it would run."""
    run = ["make", "--dry-run", "--no-print-directory", *arguments]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "folder", "release"),
    [
        ((), ".venv", SUPPORTED_SGLANG[-1]),
        (("SGLANG=0.5.17",), ".venv-0.5.17", "0.5.17"),
    ],
)
def test_make_takes_the_newest_release_or_the_one_named(
    arguments: tuple[str, ...], folder: str, release: str
) -> None:
    done = make("--always-make", "setup", f"PYTHON={sys.executable}", *arguments)
    assert f"--python {folder}/bin/python --require-hashes" in done.stdout, done.stderr
    assert f"requirements-{release}.lock" in done.stdout


def old_python(folder: Path) -> Path:
    """Something that says it was Python 3.10."""
    path = folder / "python3.10"
    code = "import sys; sys.version_info = (3, 10, 0); exec(sys.argv.pop(1))"
    path.write_text(f"#!/bin/sh\nshift\nexec '{sys.executable}' -c '{code}' \"$@\"\n")
    path.chmod(0o755)
    return path


def test_python_310_gets_the_oldest_release_and_is_told(tmp_path: Path) -> None:
    done = make("--always-make", "setup", f"PYTHON={old_python(tmp_path)}")
    assert "needs Python 3.11 or 3.12" in done.stdout
    assert "requirements-0.5.17.lock" in done.stdout, done.stderr


def test_a_release_without_a_lock_file_is_refused_by_name() -> None:
    run = ["make", "--no-print-directory", "setup", "SGLANG=0.5.18"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no lock file for SGLang 0.5.18; there are 0.5.17 0.5.23" in done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_a_clone_is_small() -> None:
    """Records and plots grow quietly; what is checked out stays under 8 MB."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert sum(path.lstat().st_size for path in files) < 8_000_000
