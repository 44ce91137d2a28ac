"""A signal ends a preparation at any time with a line; the same command does the rest."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from photo_folders import photo, prepare, read_rows
from PIL import Image

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]


def cpu_seconds(process: int) -> float:
    """What a process has computed so far: on a busy machine, how far it is."""
    return sum(psutil.Process(process).cpu_times()[:2])


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_at_any_time_ends_with_a_line(number, code, tmp_path):
    """While libraries are imported, pictures read and written; the same command then does the rest."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for k in range(60):
        photo(200, 150, k).save(folder / f"{k}.png")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "dataset" / "prepare_dataset.py"),
        "-d",
        str(folder),
        "-o",
        str(out),
    ]
    command += ["--image_resizing", "target_resolution=1024", "--num_workers", "1"]
    # Python has started and imports libraries; the folder is there; some pictures are
    moments = [lambda: cpu_seconds(process.pid) > 0.15, out.exists, lambda: len(list(out.glob("*.jpg"))) > 5]
    for moment in moments:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        limit = time.monotonic() + 60
        while not moment() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
        process.send_signal(getattr(signal, number))
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert f"stopped by {number}" in err and "Traceback" not in err
    assert prepare(*command[2:]) == 0
    assert len(read_rows(out)) == 60 and not list(out.rglob(".*.partial"))
    assert all(Image.open(out / row["file_name"]).size == (1024, 1024) for row in read_rows(out))
