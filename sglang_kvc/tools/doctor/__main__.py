"""The command line of the doctor."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence

from sglang_kvc.tools.doctor.device import device
from sglang_kvc.tools.doctor.findings import (
    BAD,
    NOTE,
    Finding,
    as_json,
    as_table,
    starts,
)
from sglang_kvc.tools.doctor.installed import installed
from sglang_kvc.tools.doctor.refused import refused

_NO_MODEL = "not looked at: give --model-path and the flags of your server"


def findings(flags: Sequence[str]) -> list[Finding]:
    """Everything there is to say about this machine and a server with these flags."""
    found = list(installed())
    if any(each.subject == "SGLang" and each.state == BAD for each in found):
        return found
    found += _safely("device", device)
    if not flags:
        return [*found, Finding("flags, model", NOTE, _NO_MODEL)]
    return [*found, *_safely("flags", lambda: refused(flags))]


def _safely(subject: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """A broken installation is a finding, too."""
    try:
        return list(look())
    except ImportError as error:
        return [Finding(subject, BAD, f"{type(error).__name__}: {error}")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if the server would start, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kvc.tools.doctor",
        usage="%(prog)s [--json] [--model-path MODEL] [FLAGS OF THE SERVER]",
        description="Say what is installed, which GPU path will be used, and what a "
        "server with --kv-compress and these flags would refuse. Loads no model.",
        epilog="Exit status: 0 it would start, 1 it would not.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given, flags = parser.parse_known_args(arguments)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        # What SGLang prints on the way is no part of the answer.
        with contextlib.redirect_stdout(sys.stderr):
            found = findings(flags)
    finally:
        logging.disable(logging.NOTSET)
    print(as_json(found) if given.json else as_table(found))
    return 0 if starts(found) else 1


if __name__ == "__main__":
    sys.exit(main())
