"""--notify: what an address is told of a run."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from conftest import FAMILIES, SAMPLE, run_here

from lora_training.cli.types import web_address
from lora_training.console import LineLog, print_status
from lora_training.exits import exit_code
from lora_training.notify import Notifier
from lora_training.training.output_folder import hide_secrets

pytestmark = pytest.mark.run


@pytest.fixture
def receiver():
    """(address, the list of messages that it has got)."""
    messages = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/hook/secret-word", messages
    server.shutdown()


def test_a_run_tells_of_its_end_and_stores_no_address(receiver, tmp_path):
    url, messages = receiver
    output = tmp_path / "mine"
    flags = ("--notify", url, "--num_validation_images", 0, "--max_train_steps", 1, "-d", SAMPLE)
    assert run_here(FAMILIES["sd15"], output, *flags, "--resolution", 64) == 0
    assert [(m["event"], m["run"], m["folder"]) for m in messages] == [("finished", "mine", str(output))]
    assert messages[0]["text"] == messages[0]["content"] == "mine: finished"
    for file in output.rglob("*"):
        assert not file.is_file() or b"secret-word" not in file.read_bytes(), file


def test_a_command_line_that_others_keep_has_no_secret(receiver, tmp_path, monkeypatch):
    """W&B's metadata and crash.log have the program's command line."""
    url, _ = receiver
    argv = ["train.py", f"--notify={url}", "--hub_token", "hf_abc", "-o", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    hide_secrets(SimpleNamespace(notify=url, hub_token="hf_abc"))
    assert sys.argv is argv and argv[1:4] == ["--notify=…", "--hub_token", "…"] and argv[5] == str(tmp_path)


def test_warnings_and_the_error_that_ends_a_run_are_told(receiver, tmp_path, capsys):
    url, messages = receiver
    with exit_code("train.py") as outcome:
        LineLog.notifier = Notifier(url, tmp_path / "mine")
        print_status("warning: 3 captions are cut off")
        print_status("nothing of interest")
        raise MemoryError("CUDA out of memory")
    assert outcome.code == 1
    events = {m["event"]: m["message"] for m in messages}
    assert len(messages) == 2 and events["warning"] == "3 captions are cut off"
    assert events["failed"].startswith("out of memory; try") and LineLog.notifier is None


def test_an_address_that_does_not_answer_ends_no_run_and_is_not_shown(tmp_path, capsys):
    with exit_code("train.py") as outcome:
        LineLog.notifier = Notifier("http://127.0.0.1:9/secret-word", tmp_path / "mine")
        print_status("warning: one")
    printed = capsys.readouterr().out
    assert outcome.code == 0 and printed.count("note: --notify: 127.0.0.1 was not reached") == 1
    assert "secret-word" not in printed


@pytest.mark.parametrize("text", ["ftp://a.b", "hooks.slack.com/x", "https://", "http://["])
def test_other_texts_are_no_address(text):
    with pytest.raises(Exception, match="it is no address that begins with https"):
        web_address(text)
