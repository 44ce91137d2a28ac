"""Windows as Python programs meet it, on another system: what it lacks is taken away, what it forbids fails.

`main` is run by ready_process.py with a plan's file, and runs the plan's programs one after the other in one
process, which spares the imports: [[program, [arguments], options], ...]. Options: "stop_at": steps after
which Ctrl-Break is sent; "open": files that another program has open meanwhile. The exit codes are printed at
the end, as JSON.

No SIGUSR1, SIGALRM, SIGHUP, resource, fcntl or os.fork; processes are spawned; folders can't be opened, files
that are only read not flushed; what is open or mapped can't be renamed, replaced or removed; consoles and
files are in cp1252 unless said otherwise. The rest (paths, drives, os.name) stays what the system has.
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
OPEN_ELSEWHERE: set[str] = set()  # files that another program has open
MISSING_SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "SIGQUIT", "SIGKILL")
MISSING_MODULES = ("resource", "fcntl", "pwd", "grp", "termios")


def is_open(path: str) -> bool:
    """Whether this or another program has the file, or a file of the folder, open or mapped."""
    path = os.path.realpath(path)
    files = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread has just closed it
            files.append(os.path.realpath(f"/proc/self/fd/{number}"))
    with io.FileIO("/proc/self/maps") as maps:
        lines = maps.readall().decode().splitlines()
    files += [line.split(maxsplit=5)[5] for line in lines if "/" in line]
    return any(file == path or file.startswith(path + os.sep) for file in (*files, *OPEN_ELSEWHERE))


def require_closed(*paths) -> None:
    """Errors: PermissionError for a file that is open."""
    for path in paths:
        if os.path.exists(path) and is_open(path):
            raise PermissionError(13, "The process cannot access the file: it is being used", str(path))


def become_windows() -> None:
    """Takes away what Windows has not, and forbids what it forbids."""
    for name in MISSING_SIGNALS:
        delattr(signal, name)
    signal.SIGBREAK = signal.Signals(21)  # Ctrl-Break
    for name in ("fork", "forkpty"):
        delattr(os, name)
    sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda handle, mode, count: None)
    shutil._use_fd_functions = False  # as there, where folders have no handles
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # which closes a file before it goes
    multiprocessing.set_start_method("spawn", force=True)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="cp1252", errors="strict" if stream is sys.stdout else "backslashreplace")
    forbid_modules()
    forbid_handles_of_folders()
    forbid_changes_of_open_files()
    forbid_flushing_what_is_read()
    read_text_in_cp1252()


def forbid_modules() -> None:
    """The project finds no modules that Windows hasn't; libraries know by the system's name what they may
    import.
    """
    original = builtins.__import__

    def import_module(name, importer=None, *rest, **options):
        file = Path((importer or {}).get("__file__") or "").resolve()
        is_project = file.is_relative_to(ROOT) and "site-packages" not in file.parts
        if name in MISSING_MODULES and is_project:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, importer, *rest, **options)

    builtins.__import__ = import_module


def forbid_handles_of_folders() -> None:
    original = os.open

    def open_file(path, flags, *rest, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, flags, *rest, **options)

    os.open = open_file


def forbid_changes_of_open_files() -> None:
    original_rename, original_replace, original_unlink = os.rename, os.replace, os.unlink

    def rename(source, target, **options):
        require_closed(source)
        if os.path.exists(target):
            raise FileExistsError(17, "Cannot create a file when that file already exists", str(target))
        return original_rename(source, target, **options)

    def replace(source, target, **options):
        require_closed(source, target)
        if os.path.isdir(target):
            raise PermissionError(13, "Access is denied", str(target))
        return original_replace(source, target, **options)

    def remove(path, **options):
        require_closed(path)
        return original_unlink(path, **options)

    os.rename, os.replace, os.unlink, os.remove = rename, replace, remove, remove


def forbid_flushing_what_is_read() -> None:
    original = os.fsync

    def flush(handle):
        number = handle if isinstance(handle, int) else handle.fileno()
        with io.FileIO(f"/proc/self/fdinfo/{number}") as info:
            flags = int(info.readall().decode().split("flags:")[1].split()[0], 8)
        if not flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(9, "Bad file descriptor")
        return original(number)

    os.fsync = flush


def read_text_in_cp1252() -> None:
    original = io.open

    def open_text(file, mode="r", buffering=-1, encoding=None, *rest, **options):
        if "b" not in mode and encoding in (None, "locale"):
            encoding = "cp1252"
        return original(file, mode, buffering, encoding, *rest, **options)

    builtins.open = io.open = open_text


def break_after(steps: int, output: Path) -> None:
    """Sends Ctrl-Break once a run has written so many steps."""
    file = output / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < steps:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGBREAK)


def run(program: str, argv: list[str], stop_at: int = 0, open: list[str] | tuple[()] = ()) -> int:
    """Runs a program as the main one; returns its exit code."""
    OPEN_ELSEWHERE.clear()
    for file in open:
        Path(file).touch()  # one of an earlier run, which ComfyUI has loaded
        OPEN_ELSEWHERE.add(os.path.realpath(file))
    if stop_at:
        output = Path(argv[argv.index("-o") + 1])
        threading.Thread(target=break_after, args=(stop_at, output), daemon=True).start()
    sys.argv = [program, *argv]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def main(argv: list[str]) -> int:
    """Runs the plan in the file that is named."""
    plan = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    become_windows()
    codes = [run(program, arguments, **options) for program, arguments, options in plan]
    print(f"\n{json.dumps(codes)}", flush=True)
    os._exit(0)  # the spawned workers' helpers are this system's own
