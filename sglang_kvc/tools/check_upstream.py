"""Say what a release of SGLang changes for us.

It reads the source of two releases, never imports them, and compares what we touch:
hook targets, symbols, fields and methods, requirements. It also lists new settings and
request fields, which may be something to refuse. What it cannot see is what a function
does that we neither hook nor name; ``docs/upgrading.md`` says what to run beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sglang_kvc.tools.upstream_diff import compare, report
from sglang_kvc.tools.upstream_diff.ours import read_ours
from sglang_kvc.tools.upstream_diff.release import (
    CheckError,
    Release,
    installed_release,
    open_release,
)

SAME, WORK, UNCHECKED = 0, 1, 2


def check(old: Release, new: Release, with_diffs: bool = False) -> tuple[str, int]:
    """Compare two releases.

    Parameters
    ----------
    old, new : Release
        The one that we support, and the one in question.
    with_diffs : bool
        Print also the lines that have changed.

    Returns
    -------
    text : str
        The report.
    status : int
        0 if nothing needs work, 1 if something does.

    Raises
    ------
    CheckError
        If something cannot be compared.
    """
    ours = read_ours()
    patches = compare.compare_patches(old, new, ours)
    symbols = compare.compare_symbols(old, new, ours)
    members = compare.compare_members(old, new, ours)
    fresh = list(compare.compare_new(old, new, ours))
    inherited = list(compare.compare_inherited(old, new, ours))
    pins, other_pins = compare.compare_pins(old, new)
    lines = [f"SGLang {new.version} against {old.version}, read only."]
    lines += report.section("Patches", patches, all_rows=True)
    lines += report.section("Symbols without a hook", symbols)
    lines += report.section("Fields and methods", members)
    lines += report.section("New, to be judged: refuse, bound or ignore", fresh)
    lines += report.section("New methods of classes that ours derive from", inherited)
    lines += report.section("Requirements", pins)
    if other_pins:
        lines.append(f"  {other_pins} others moved, which our code does not meet")
    if with_diffs:
        lines += report.diffs([*patches, *symbols, *members])
    others = [*symbols, *members, *fresh, *inherited, *pins]
    lines += report.summary(patches, others)
    work = any(row.status.needs_work for row in (*patches, *others))
    return "\n".join(lines), WORK if work else SAME


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kvc.tools.check_upstream",
        description="Say what a release of SGLang changes for us. Nothing of it is "
        "installed or imported.",
        epilog="Exit status: 0 nothing needs work, 1 something does, 2 it could not "
        "be checked.",
    )
    what = "a version, a wheel, or a folder that contains sglang/"
    parser.add_argument("release", help=what)
    parser.add_argument(
        "--against", metavar="RELEASE", help=f"{what}; default: the installed SGLang"
    )
    parser.add_argument(
        "--diff", action="store_true", help="print also the lines that have changed"
    )
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            new = open_release(given.release, Path(folder))
            old = (
                open_release(given.against, Path(folder))
                if given.against
                else installed_release()
            )
            text, status = check(old, new, given.diff)
        except CheckError as error:
            print(f"error: {error}", file=sys.stderr)
            return UNCHECKED
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
