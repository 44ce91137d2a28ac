"""A Windows as Python programs meet it, on another system: what it lacks is taken away, what it forbids fails.

`main` is run by ready_process.py with a plan's file, and runs the plan's programs one after the other in one process, which spares
the imports: [[program, [words], options], …]. Options: "stop_at": steps after which Ctrl-Break is sent; "open": files that another
program holds meanwhile. The exit codes are printed at the end, as JSON.

No SIGUSR1, SIGALRM, SIGHUP, resource, fcntl or os.fork; processes are spawned; folders can't be opened, files that are only read
not flushed; what is open or mapped can't be renamed, replaced or removed; consoles and files are in cp1252 unless said otherwise.
The rest (paths, drives, os.name) stays what the system has.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELD: set[str] = set()  # files that another program has open


def held_by_someone(path: str) -> bool:
    """Whether this or another program has the file, or a file of the folder, open or mapped."""
    path = os.path.realpath(path)
    files = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread has just closed it
            files.append(os.path.realpath(f"/proc/self/fd/{number}"))
    with io.FileIO("/proc/self/maps") as maps:
        files += [line.split(maxsplit=5)[5] for line in maps.readall().decode().splitlines() if line.count("/")]
    return any(file == path or file.startswith(path + os.sep) for file in (*files, *HELD))


def become_windows() -> None:
    """Takes away what Windows has not, and forbids what it forbids."""
    for name in ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "SIGQUIT", "SIGKILL"):
        delattr(signal, name)
    signal.SIGBREAK = signal.Signals(21)  # Ctrl-Break
    for name in ("fork", "forkpty"):
        delattr(os, name)
    plain_import = builtins.__import__

    def import_module(
        name, importer=None, *rest, **options
    ):  # libraries know by the system's name what they may import
        ours = Path((importer or {}).get("__file__") or "").resolve()
        if (
            name in ("resource", "fcntl", "pwd", "grp", "termios")
            and ours.is_relative_to(ROOT)
            and "site-packages" not in ours.parts
        ):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain_import(name, importer, *rest, **options)

    builtins.__import__ = import_module
    sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda handle, mode, count: None)
    shutil._use_fd_functions = False  # as there, where folders have no handles
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # which closes a file before it goes
    multiprocessing.set_start_method("spawn", force=True)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="cp1252", errors="strict" if stream is sys.stdout else "backslashreplace")
    opened, renamed, replaced, removed, flushed = os.open, os.rename, os.replace, os.unlink, os.fsync

    def open_file(path, flags, *rest, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *rest, **options)

    def free(*paths) -> None:
        for path in paths:
            if os.path.exists(path) and held_by_someone(path):
                raise PermissionError(13, "The process cannot access the file: it is being used", str(path))

    def rename(source, target, **options):
        free(source)
        if os.path.exists(target):
            raise FileExistsError(17, "Cannot create a file when that file already exists", str(target))
        return renamed(source, target, **options)

    def replace(source, target, **options):
        free(source, target)
        if os.path.isdir(target):
            raise PermissionError(13, "Access is denied", str(target))
        return replaced(source, target, **options)

    def remove(path, **options):
        free(path)
        return removed(path, **options)

    def flush(handle):
        number = handle if isinstance(handle, int) else handle.fileno()
        with io.FileIO(f"/proc/self/fdinfo/{number}") as info:
            flags = int(info.readall().decode().split("flags:")[1].split()[0], 8)
        if not flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(9, "Bad file descriptor")
        return flushed(number)

    plain_open = io.open

    def open_text(file, mode="r", buffering=-1, encoding=None, *rest, **options):
        if "b" not in mode and encoding in (None, "locale"):
            encoding = "cp1252"
        return plain_open(file, mode, buffering, encoding, *rest, **options)

    os.open, os.rename, os.replace, os.unlink, os.remove, os.fsync = open_file, rename, replace, remove, remove, flush
    builtins.open = io.open = open_text


def break_after(steps: int, output: Path) -> None:
    """Sends Ctrl-Break once a run has written so many steps."""
    file = output / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < steps:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGBREAK)


def run(program: str, words: list[str], stop_at: int = 0, open: tuple[str, ...] | list[str] = ()) -> int:
    """Runs a program as the main one; returns its exit code."""
    HELD.clear()
    for file in open:
        Path(file).touch()  # one of an earlier run, which ComfyUI has loaded
        HELD.add(os.path.realpath(file))
    if stop_at:
        output = Path(words[words.index("-o") + 1])
        threading.Thread(target=break_after, args=(stop_at, output), daemon=True).start()
    sys.argv = [program, *words]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def main(argv: list[str]) -> int:
    """Runs the plan in the file that is named."""
    plan = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    become_windows()
    codes = [run(program, words, **options) for program, words, options in plan]
    print(f"\n{json.dumps(codes)}", flush=True)
    os._exit(0)  # the spawned workers' helpers are this system's own
