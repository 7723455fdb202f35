"""The pages: links lead somewhere, the README is short, the flags are today's.

``python -m tests.unit.test_docs --write`` writes tables of flags and metrics into
the guide.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest

from sglang_kvc.config.flags import USER_FLAGS, add_cli_arguments
from sglang_kvc.config.series import SERIES

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide.md"
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "kernels" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
)
BY_USERS = ("", *(f"-{name.replace('_', '-')}" for name in USER_FLAGS))


def targets(page: Path) -> list[str]:
    """Relative links of a page, those of images too; code is left out."""
    text = re.sub(r"^    .*$|`[^`\n]*`(?!\])", "", page.read_text(), flags=re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in links if "://" not in link]


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


def flags_tables() -> str:
    """The flags as two tables, with the words of ``--help``."""
    parser = argparse.ArgumentParser(add_help=False)
    add_cli_arguments(parser)
    rows: dict[bool, list[str]] = {True: [], False: []}
    for action in parser._actions:
        name = action.option_strings[0]
        by_users = name.removeprefix("--kv-compress") in BY_USERS
        value = f" {action.metavar}" if action.metavar else ""
        text = (action.help or "").replace("%%", "%")
        rows[by_users].append(f"| `{name}{value}` | {text} |\n")
    head = "| flag | meaning |\n| --- | --- |\n"
    return (
        f"What a user turns:\n\n{head}{''.join(rows[True])}\n"
        "Experts only. The defaults were tuned together:\n\n"
        f"{head}{''.join(rows[False])}"
    )


def metrics_table() -> str:
    """What /metrics shows of ours."""
    rows = []
    for one in SERIES:
        values = ", ".join(f"`{value}`" for value in one.values)
        label = f"`{one.label}`: {values}" if one.label else ""
        rows.append(f"| `{one.name}` | {one.kind} | {label} | {one.text} |\n")
    return "| name | type | label | meaning |\n| --- | --- | --- | --- |\n" + "".join(
        rows
    )


def with_tables(text: str) -> str:
    """The guide with today's tables."""
    for name, table in (("flags", flags_tables()), ("metrics", metrics_table())):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in targets(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        missing = anchor and found.suffix == ".md" and anchor not in anchors(found)
        if not found.exists() or missing:
            broken.append(target)
    assert broken == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_guide_has_todays_tables() -> None:
    text = GUIDE.read_text()
    assert text == with_tables(text), "run python -m tests.unit.test_docs --write"


def test_every_page_of_docs_is_named_by_the_readme() -> None:
    named = targets(ROOT / "README.md")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"quality_tables.md"}
    assert pages - {Path(link).name for link in named} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_path_of_a_machine(page: Path) -> None:
    assert re.findall(r"(?<![\w.])/(?:work|tmp|home|root|mnt)/", page.read_text()) == []


if __name__ == "__main__" and "--write" in sys.argv:
    GUIDE.write_text(with_tables(GUIDE.read_text()))
