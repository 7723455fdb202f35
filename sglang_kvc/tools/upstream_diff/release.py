"""One release of SGLang as text: a wheel, an unpacked folder, or what is installed."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from sglang_kvc.errors import KVCError

_VERSION = re.compile(r"\d+(\.\d+)+([a-z0-9.]*)")
# SGLang's wheels are built for one Python each; this one is in all releases since
# 0.5.17. Nothing of the wheel is run.
_WHEEL_PYTHON = "3.12"
_FETCH_S = 600


class CheckError(KVCError):
    """A release cannot be read, or our own source not be understood."""


class Release:
    """The Python files and the metadata of one SGLang release.

    Parameters
    ----------
    root : Path
        A wheel, or a folder that contains ``sglang/``.
    label : str, optional
        What to call it where it names no version itself.

    Raises
    ------
    CheckError
        If there is no SGLang in it.
    """

    def __init__(self, root: Path, label: str = "") -> None:
        self._root = root
        self._wheel = _open_wheel(root) if root.is_file() else None
        names = self._wheel.namelist() if self._wheel else _file_names(root)
        self._names = frozenset(names)
        if self._find_path("sglang.srt.server_args") is None:
            raise CheckError(
                f"{root} holds no sglang/srt/server_args.py: it is no SGLang. Give a "
                "wheel of SGLang, or the folder that contains sglang/."
            )
        self._metadata = self._read_metadata()
        found = self._metadata_field("Version")
        self.version = found[0] if found else label or root.name

    def parse(self, module: str) -> tuple[str, ast.Module] | None:
        """Path and syntax tree of a module, None if there is no such module.

        Raises
        ------
        CheckError
            If this Python cannot read it.
        """
        return self._parsed(module)

    def modules_in(self, folder: str) -> list[str]:
        """Dotted names of the modules right inside a folder such as ``sglang/srt``."""
        inside = (n.removeprefix(f"{folder}/") for n in self._names if folder in n)
        names = sorted(n[:-3] for n in inside if n.endswith(".py") and "/" not in n)
        dotted = folder.replace("/", ".")
        return [f"{dotted}.{n}" for n in names if n != "__init__"]

    def requirements(self) -> dict[str, str]:
        """Requirements by normalised name, without extras; "python" is one of them."""
        found = {}
        for line in self._metadata_field("Requires-Dist"):
            text, _, marker = line.partition(";")
            name = re.match(r"[\w.-]+", text)
            # Where a package has two lines, Linux on x86_64 comes last in them.
            if name and "extra ==" not in marker and not _other_machine(marker):
                key = re.sub(r"[-_.]+", "-", name[0]).lower()
                rest = re.sub(r"\[.*?\]", "", text[name.end() :])
                found[key] = rest.strip(" ()") or "any"
        for line in self._metadata_field("Requires-Python"):
            found["python"] = line
        return found

    @functools.cache  # noqa: B019 (two releases, one short run)
    def _parsed(self, module: str) -> tuple[str, ast.Module] | None:
        path = self._find_path(module)
        if path is None:
            return None
        try:
            return path, ast.parse(self._read(path))
        except (SyntaxError, UnicodeDecodeError) as error:
            python = ".".join(map(str, sys.version_info[:2]))
            raise CheckError(
                f"{path} of SGLang {self.version} cannot be read by Python {python} "
                f"({error}). Run this with a newer Python."
            ) from error

    def _find_path(self, module: str) -> str | None:
        base = module.replace(".", "/")
        paths = (f"{base}.py", f"{base}/__init__.py")
        return next((path for path in paths if path in self._names), None)

    def _read(self, path: str) -> str:
        if self._wheel is not None:
            return self._wheel.read(path).decode()
        return (self._root / path).read_text(encoding="utf-8")

    def _read_metadata(self) -> str:
        pattern = re.compile(r"sglang-[^/]+\.dist-info/METADATA")
        path = next((n for n in sorted(self._names) if pattern.fullmatch(n)), None)
        # The description behind the first empty line is not wanted.
        return self._read(path).partition("\n\n")[0] if path else ""

    def _metadata_field(self, name: str) -> list[str]:
        return re.findall(rf"^{name}: (.*?)\r?$", self._metadata, flags=re.MULTILINE)


def open_release(given: str, folder: Path) -> Release:
    """Open what the user has named.

    Parameters
    ----------
    given : str
        A version, or the path of a wheel or of a folder.
    folder : Path
        Where a wheel may be downloaded to.

    Raises
    ------
    CheckError
        If there is no such thing, with what to do.
    """
    path = Path(given)
    if path.exists():
        return Release(path)
    if not _VERSION.fullmatch(given):
        raise CheckError(
            f"{given} is neither an existing file or folder nor a version. Give for "
            "example 0.5.17, the path of a wheel, or a folder that contains sglang/."
        )
    return Release(_fetch(given, folder), given)


def installed_release() -> Release:
    """The SGLang of this environment, found without importing it.

    Raises
    ------
    CheckError
        If none is installed.
    """
    try:
        found = metadata.distribution("sglang")
    except metadata.PackageNotFoundError:
        raise CheckError(
            "No SGLang is installed to compare with. Give the one to compare with by "
            "--against, for example --against 0.5.17."
        ) from None
    return Release(Path(str(found.locate_file(""))), found.version)


def _fetch(version: str, folder: Path) -> Path:
    """Download the wheel of a version; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--python-version", _WHEEL_PYTHON, "--dest", str(folder)]
    command += [f"sglang=={version}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_FETCH_S
        )
    except subprocess.TimeoutExpired:
        raise CheckError(
            f"Downloading SGLang {version} took more than {_FETCH_S} seconds."
        ) from None
    wheels = sorted(folder.glob(f"sglang-{version}-*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    raise CheckError(_why_not_fetched(version, done.stderr))


def _why_not_fetched(version: str, errors: str) -> str:
    known = re.search(r"\(from versions: (.+)\)", errors)
    if known and known[1] != "none":
        newest = ", ".join(known[1].split(", ")[-5:])
        return (
            f"There is no SGLang {version}, or no wheel of it for Linux and Python "
            f"{_WHEEL_PYTHON}. The newest that there are: {newest}."
        )
    last = errors.strip().splitlines() or ["pip said nothing"]
    return (
        f"SGLang {version} could not be downloaded ({last[-1]}). Check the network and "
        "pip, or give the path of a wheel."
    )


def _open_wheel(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckError(f"{path} is no wheel ({error}).") from error


def _file_names(root: Path) -> list[str]:
    """Files below ``sglang/``, and the metadata; not the rest of a site-packages."""
    found = [*root.glob("sglang/**/*.py"), *root.glob("sglang-*.dist-info/METADATA")]
    return [path.relative_to(root).as_posix() for path in found]


def _other_machine(marker: str) -> bool:
    """Whether a marker is for ARM or macOS alone."""
    others = ("aarch64", "arm64", "armv7l", "darwin")
    x86 = "x86_64" in marker or '!= "aarch64"' in marker
    return any(name in marker for name in others) and not x86
