"""The small model's first layers: the same weights, a fifth of the work.

Most tests compare two systems, or a system with an oracle, or ask what the server says
of a request, and nothing of the answers. They take six of the thirty layers.
`test_quality.py` judges answers and has the whole model. With `WHOLE` set every test
has it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

LAYERS = 6
WHOLE = "KVC_TEST_WHOLE_MODEL"
"""Environment variable: 1 for the whole model."""

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def wants_whole() -> bool:
    """Whether all tests are to use the whole model."""
    return os.environ.get(WHOLE, "0") not in ("", "0")


def shallow(folder: Path, layers: int = LAYERS) -> Path:
    """A model of the first layers of the one in `folder`, made once, beside it."""
    target = folder.with_name(f"{folder.name}-{layers}-layers")
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / target.name
        made.mkdir()
        for path in folder.iterdir():
            if path.name not in (WEIGHTS, CONFIG):
                shutil.copy(path, made)
        config = json.loads((folder / CONFIG).read_text())
        config["num_hidden_layers"] = layers
        (made / CONFIG).write_text(json.dumps(config))
        _copy_weights(folder / WEIGHTS, made / WEIGHTS, layers)
        try:
            made.rename(target)
        except OSError:
            # Another process was first.
            if not target.exists():
                raise
    return target


def _copy_weights(source: Path, target: Path, layers: int) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, "pt") as file:
        kept = {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if not (found := _LAYER.match(name)) or int(found[1]) < layers
        }
        save_file(kept, target, file.metadata())
