"""How much of the GPU's memory is in use, watched from outside."""

from __future__ import annotations

import subprocess
import threading


def total_mib() -> int | None:
    """Memory of the first GPU by nvidia-smi; None without one."""
    query = "nvidia-smi -i 0 --query-gpu=memory.total --format=csv,noheader,nounits"
    try:
        said = subprocess.run(query.split(), capture_output=True, text=True)
    except OSError:
        return None
    word = said.stdout.strip()
    return int(word) if word.isdigit() else None


class GpuMemory:
    """Used memory of the first GPU by nvidia-smi: no CUDA context of our own."""

    def __init__(self) -> None:
        self.now: int | None = None
        self.peak: int | None = None
        query = "nvidia-smi -i 0 --query-gpu=memory.used --format=csv,noheader,nounits"
        self._process = None
        try:
            self._process = subprocess.Popen(
                [*query.split(), "-lms", "300"], stdout=subprocess.PIPE, text=True
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
