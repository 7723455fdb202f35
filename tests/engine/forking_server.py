"""SGLang's launcher, whose processes are forked from it instead of started anew.

``python -m tests.engine.forking_server FLAGS``. A server of several ranks has five
processes, and each imports SGLang for 12 to 20 s of CPU. Here the first one does so for
all. It is for a second server: the first one starts as its users start it.
"""

import importlib
import multiprocessing
import runpy
from typing import Any

importlib.import_module("tests.engine.preloaded")
set_start_method = multiprocessing.set_start_method


def fork(method: str | None, **how: Any) -> None:
    """In the place of `set_start_method`; SGLang asks for ``spawn``."""
    assert method == "spawn"
    set_start_method("fork", **how)


if __name__ == "__main__":
    multiprocessing.set_start_method = fork  # type: ignore[assignment]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
