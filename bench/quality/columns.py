"""Lines of results as one compressed file with columns: Parquet, with zstd.

A line's key stands in columns of its own and every recorded figure of its samples in a
column of lists; what else a line says (commit, hardware, times) is JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUFFIX = ".parquet"
SAMPLES = "samples"
FIGURE = f"{SAMPLES}."
REST = "rest"
LEVEL = 22
PAGE_BYTES = 1 << 26
"""A column is one page, almost always: answers of all lines are compressed together."""


def write(path: Path, lines: Sequence[dict[str, Any]], key: Sequence[str]) -> None:
    """Write lines with samples; a file that was there is replaced as a whole.

    Parameters
    ----------
    path : Path
    lines : sequence of dict
        With ``samples`` as `records.pack` makes them.
    key : sequence of str
        Fields that every line has, of one type each.
    """
    arrow, parquet = _load()
    names = dict.fromkeys(name for line in lines for name in line[SAMPLES])
    apart = {*key, SAMPLES}
    columns: dict[str, list[Any]] = {name: [r[name] for r in lines] for name in key}
    columns[REST] = [
        json.dumps({name: value for name, value in line.items() if name not in apart})
        for line in lines
    ]
    for name in names:
        columns[FIGURE + name] = [line[SAMPLES].get(name) for line in lines]
    new = path.with_name(path.name + ".new")
    parquet.write_table(
        arrow.table(columns),
        new,
        compression="zstd",
        compression_level=LEVEL,
        data_page_size=PAGE_BYTES,
        # Both cost more than they save in columns of short lists.
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
    )
    new.replace(path)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that `write` was given, in their order; none without the file."""
    if not path.exists():
        return []
    _, parquet = _load()
    lines = []
    for row in parquet.read_table(path).to_pylist():
        line = json.loads(row.pop(REST))
        figures = {name for name in row if name.startswith(FIGURE)}
        line |= {name: value for name, value in row.items() if name not in figures}
        line[SAMPLES] = {
            name.removeprefix(FIGURE): values
            for name, values in row.items()
            if name in figures and values is not None
        }
        lines.append(line)
    return lines


def _load() -> tuple[Any, Any]:
    """pyarrow and its Parquet module; a hint where they are missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SystemExit(f"{SUFFIX} files need pyarrow: pip install pyarrow") from None
    return pyarrow, pyarrow.parquet
