"""Runs a command and measures its time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from scripts.dev import ROOT


class Usage(NamedTuple):
    """What a command has used."""

    seconds: float
    cpu_seconds: float
    peak_mib: float  # of its process
    peak_gpu_mib: float  # that nvidia-smi shows for it; 0 without a GPU


def measure_command(command: list[str], log: Path) -> Usage:
    """Runs a command in the repository, its output in `log`.

    Errors: SystemExit with the log's end if it fails.
    """
    with log.open("w") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT)
        peak_gpu, is_over = [0.0], threading.Event()

        def watch() -> None:
            while not is_over.wait(0.5):
                peak_gpu[0] = max(peak_gpu[0], gpu_memory(process.pid))

        watcher = threading.Thread(target=watch)
        if Path("/dev/nvidiactl").exists():
            watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        is_over.set()
        if watcher.is_alive():
            watcher.join()
    if status:
        print(f"failed: {' '.join(command)}\n{log.read_text()[-3000:]}", file=sys.stderr)
        raise SystemExit(1)
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, peak_gpu[0])


def gpu_memory(pid: int) -> float:
    """MiB that nvidia-smi shows for a process, or 0 without a GPU."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return 0.0
    rows = [line.split(",") for line in lines if line.strip()]
    return sum(float(memory) for owner, memory in rows if int(owner) == pid)
