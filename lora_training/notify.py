"""--notify: tells a web address how a run goes, as JSON. Nothing of it delays the training or ends it."""

from __future__ import annotations

import json
import threading
import urllib.request
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lora_training.console import print_status

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 10  # that the address has to answer
WARNING, ERROR = "warning: ", ": error: "


class Notifier:
    """Sends what a run prints as warnings, and how it ends.

    Each message has `event` (warning, finished, failed, stopped), `run`, `folder` and `message`; Slack reads
    its `text`, Discord its `content`.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder, self.error = url, folder.resolve(), ""
        self.threads: list[threading.Thread] = []
        self.has_failed = False

    def receive(self, line: str) -> None:
        """Takes a line that the run has printed."""
        if line.startswith(WARNING):
            self.send("warning", line.removeprefix(WARNING))
        elif ERROR in line:
            self.error = line.partition(ERROR)[2]

    def end(self, code: int) -> None:
        """Tells how the run has ended, and waits until everything is sent. code: the program's exit code."""
        event = "finished" if code == 0 else "stopped" if code > 128 else "failed"
        self.send(event, self.error)
        for thread in self.threads:
            thread.join(SECONDS)

    def send(self, event: str, message: str) -> None:
        """Sends a message in a thread of its own."""
        text = f"{self.folder.name}: {event}" + (f": {message}" if message else "")
        content = {"event": event, "run": self.folder.name, "folder": str(self.folder), "message": message}
        content |= {"text": text, "content": text[:2000]}  # Discord takes no more
        self.threads.append(threading.Thread(target=self.post, args=(content,), daemon=True))
        self.threads[-1].start()

    def post(self, content: dict[str, str]) -> None:
        """Sends one message; says once if nobody takes it, without the address, which may be a secret."""
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "lora_training"}
        try:
            request = urllib.request.Request(self.url, body, headers, method="POST")
            urllib.request.urlopen(request, timeout=SECONDS).close()
        except (OSError, ValueError) as error:
            if not self.has_failed:
                self.has_failed = True
                reason = getattr(error, "reason", None) or error
                print_status(f"note: --notify: {urlsplit(self.url).hostname} was not reached: {reason}")
