"""scripts/watch.py: the page of a run that goes on, in a browser and over HTTP."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from conftest import FAMILIES, ROOT, SAMPLE

from lora_training.errors import UserError
from lora_training.report.live_pages import find_runs
from lora_training.report.page_server import make_server

pytestmark = pytest.mark.run
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def watched(folder, host="127.0.0.1"):
    """The address at which a folder is watched, meanwhile."""
    server, address = make_server(folder, host, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()


def get(address: str, path: str, **headers: str) -> tuple[int, bytes, dict]:
    """(status, content, headers) of a path as it stands, dots and all."""
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def start_training(output, *flags):
    """A toy run as a process of its own."""
    family = FAMILIES["sd15"]
    command = [
        sys.executable,
        family.script,
        "-m",
        family.base,
        "-d",
        SAMPLE,
        "-o",
        output,
        "--report_to",
        "none",
    ]
    command += ["--resolution", "64", "--rank", "4", "--train_batch_size", "2", *flags]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def make_run(folder, caption="a dog", steps=4):
    """An output folder with two steps' pictures and some numbers."""
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_itxt("prompt", caption)
    for step in (0, steps):
        (folder / f"samples/step-{step:06d}").mkdir(parents=True)
        image = Image.new("RGB", (16, 12), (10 * step, 0, 0))
        image.save(folder / f"samples/step-{step:06d}/00_00_a.png", pnginfo=text)
    rows = [{"step": n, "loss": 1 / (n + 1), "seconds_per_step": 2.0} for n in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which shows the page")
def test_a_browser_sees_pictures_curves_and_the_end_without_reloading(tmp_path):
    from playwright import sync_api

    make_run(tmp_path / "runs" / "earlier")
    flags = ("--max_train_steps", 40, "--validation_steps", 20, "--num_validation_images", 1)
    flags += (
        "--validation_inference_steps",
        2,
        "--validation_prompt",
        "<script>document.title = 'taken'</script>",
    )
    training = start_training(tmp_path / "runs" / "live", *flags)
    try:
        while not (tmp_path / "runs/live/config.yaml").exists():
            assert training.poll() is None
            time.sleep(0.2)
        with watched(tmp_path / "runs") as address, sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(address)
            assert page.locator(".run").count() == 2
            page.locator("a", has_text="live").click()
            page.evaluate("window.stays = true")
            page.locator(".state.running").wait_for(timeout=60_000)
            page.locator("#before-after img").nth(1).wait_for(timeout=120_000)
            page.locator("#curves svg").first.wait_for(timeout=60_000)
            page.locator(".state.finished").wait_for(timeout=120_000)
            page.locator("#before-after .sheet img").wait_for(state="attached", timeout=60_000)
            assert page.evaluate("window.stays") and page.title() == "live: training run"
            assert "<script>document.title" in page.locator("#before-after h3.prompt").nth(1).inner_text()
            broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).length"
            assert page.evaluate(broken) == 0
            browser.close()
    finally:
        training.kill()
        training.wait()


def test_only_the_pictures_of_a_run_are_sent(tmp_path):
    run = make_run(tmp_path / "runs" / "one")
    (tmp_path / "secret.png").write_bytes((run / "samples/step-000000/00_00_a.png").read_bytes())
    (run / "samples" / "link.png").symlink_to(tmp_path / "secret.png")
    (run / "mask.png").write_bytes((tmp_path / "secret.png").read_bytes())
    with watched(tmp_path / "runs") as address:
        status, content, headers = get(address, "/run/one/picture/samples/step-000004/00_00_a.png?side=8")
        assert (status, headers["Content-Type"], content[:4]) == (200, "image/png", b"\x89PNG")
        for path in (
            "samples/../../../secret.png",
            "samples/%2e%2e/%2e%2e/%2e%2e/secret.png",
            "samples/..%2f..%2f..%2fsecret.png",
            "/etc/hostname",
            "samples//etc/hostname",
            "samples/%2fetc/hostname",
            "samples/link.png",
            "mask.png",
            "metrics.jsonl",
            "samples",
            "",
        ):
            assert get(address, f"/run/one/picture/{path}")[0] == 404, path
        for path in ("/run/two/", "/run/one", "/run/../", "/nothing", "/run/one/samples/"):
            assert get(address, path)[0] == 404, path


def test_a_page_of_elsewhere_cannot_read_it_and_another_machine_needs_the_token(tmp_path):
    make_run(tmp_path / "one")
    with watched(tmp_path / "one") as address:
        assert get(address, "/run/one/")[0] == 200
        assert get(address, "/run/one/", Host="evil.example:80")[0] == 403
    with watched(tmp_path / "one", "0.0.0.0") as address:
        path = "/" + address.split("/", 3)[3]
        assert len(path) > 20 and get(address, path)[2]["Location"] == "run/one/"
        assert get(address, f"{path}run/one/")[0] == 200
        assert get(address, "/run/one/")[0] == get(address, "/")[0] == get(address, "/x/run/one/")[0] == 404


def test_a_page_is_made_again_only_where_something_has_changed(tmp_path):
    run = make_run(tmp_path / "one")
    with watched(tmp_path) as address:
        for path in ("/", "/run/one/"):
            _, _, headers = get(address, path)
            assert get(address, path, **{"If-None-Match": headers["ETag"]})[0] == 304
            with (run / "metrics.jsonl").open("a") as stream:
                stream.write('{"step": 9, "loss": 0.5}\n')
            assert get(address, path, **{"If-None-Match": headers["ETag"]})[0] == 200


def test_a_state_is_that_of_the_process_and_the_last_line(tmp_path):
    run = make_run(tmp_path / "one")
    with watched(run) as address:

        def shown() -> str:
            return get(address, "/run/one/")[1].decode().split('<div class="state ')[1].split("</div>")[0]

        assert shown().startswith("stopped")
        (run / "log.txt").write_text(
            "10:00:00 warning: a <b>\n10:00:01 train.py: error: out of memory; try less\n"
        )
        assert shown().startswith("failed") and "out of memory; try less" in shown()
        page = get(address, "/run/one/")[1].decode()
        assert '<div class="finding">a &lt;b&gt;' in page
        with (run / "log.txt").open("a") as log:
            log.write("10:05:00 started: process 3 on elsewhere, today\n10:05:02 loading the unet\n")
        assert shown().startswith("stopped") and "a &lt;b&gt;" not in get(address, "/run/one/")[1].decode()
        (run / "log.txt").write_text("10:00:01 train.py: error: out of memory; try less\n")
        (run / "data.json").write_text('{"steps": 10}')
        owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        import socket

        (run / ".lock_owner").write_text(
            f"process {owner.pid} on {socket.gethostname()} since 2026-01-01 10:00:00"
        )
        assert shown().startswith("running") and "step 4 of 10 · 2 s per step · 12 s left" in shown()
        owner.kill()
        owner.wait()
        assert shown().startswith("failed")  # the process was killed: its file is still there
        (run / ".lock_owner").write_text("process 1 on elsewhere since 2026-01-01 10:00:00")
        assert shown().startswith("running")
        (run / "pytorch_lora_weights.safetensors").touch()
        (run / ".lock_owner").unlink()
        assert shown().startswith("finished")


def test_runs_are_found_in_a_folder_and_one_below_the_newest_first(tmp_path):
    make_run(tmp_path / "a"), make_run(tmp_path / "night" / "b")
    (tmp_path / "a" / "checkpoint-4").mkdir()
    (tmp_path / "a" / "checkpoint-4" / "config.yaml").touch()
    (tmp_path / "empty").mkdir()
    assert set(find_runs(tmp_path)) == {"a", "night/b"}
    with watched(tmp_path) as address:
        assert b'href="run/night/b/"' in get(address, "/")[1]
        assert get(address, "/run/night/b/")[0] == 200
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_runs(tmp_path / "nowhere")


def test_a_taken_port_is_one_line(tmp_path):
    with watched(make_run(tmp_path / "one")) as address:
        port = address.split(":")[2].strip("/")
        command = [sys.executable, ROOT / "scripts/watch.py", tmp_path / "one", "--port", port]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"--port {port}: Address already in use" in result.stderr
