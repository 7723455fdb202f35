"""Watch from outside how much of the GPU's memory is in use."""

from __future__ import annotations

import subprocess
import threading


def _query(field: str) -> list[str]:
    """The command that prints a figure of the first GPU."""
    form = "--format=csv,noheader,nounits"
    return ["nvidia-smi", "-i", "0", f"--query-gpu={field}", form]


def total_mib() -> int | None:
    """Memory of the first GPU by nvidia-smi; None without one."""
    try:
        said = subprocess.run(_query("memory.total"), capture_output=True, text=True)
    except OSError:
        return None
    word = said.stdout.strip()
    return int(word) if word.isdigit() else None


class GpuMemory:
    """Used memory of the first GPU by nvidia-smi: no CUDA context of our own."""

    def __init__(self) -> None:
        self.now: int | None = None
        self.peak: int | None = None
        self._process = None
        try:
            self._process = subprocess.Popen(
                [*_query("memory.used"), "-lms", "300"],
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError:
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process and self._process.stdout
        for line in self._process.stdout:
            if line.strip().isdigit():
                self.now = int(line)
                self.peak = max(self.peak or 0, self.now)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def stop(self) -> None:
        """End nvidia-smi."""
        if self._process:
            self._process.kill()
            self._process.wait()
