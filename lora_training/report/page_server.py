"""Serves the pages of scripts/watch.py. It only reads, and nothing outside the runs' folders."""

from __future__ import annotations

import contextlib
import functools
import secrets
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote

from lora_training.errors import UserError
from lora_training.report.live_pages import find_runs, fingerprint, live_overview, live_run_page
from lora_training.report.pictures import encode_within

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LOCAL_HOSTS = ("127.0.0.1", "localhost")
PICTURE_PLACES = ("samples", "training_pictures", "comparison.png")  # of a run; what else it has is not sent
PICTURE_BYTES, LARGEST_SIDE = 1_000_000, 2048
MESSAGE_PAGE = '<!doctype html><meta http-equiv="refresh" content="3"><title>no run yet</title><p>{}'


def make_server(folder: Path, host: str, port: int) -> tuple[ThreadingHTTPServer, str]:
    """(server, address of its first page). On another host than this machine's own the address has a token.

    port: 0 takes a free one. Errors: UserError for a folder that is not there, or an address that is taken.
    """
    find_runs(folder)
    token = "" if host in LOCAL_HOSTS else secrets.token_urlsafe(16)
    try:
        server = ThreadingHTTPServer((host, port), functools.partial(PageHandler, folder, token))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None
    server.daemon_threads = True
    port = server.server_address[1]
    return server, f"http://{host}:{port}/" + (f"{token}/" if token else "")


class PageHandler(BaseHTTPRequestHandler):
    """Answers a browser. folder: a run's, or one that holds several; token: what addresses begin with."""

    def __init__(self, folder: Path, token: str, *args) -> None:
        self.folder, self.token = folder, token
        super().__init__(*args)

    def do_GET(self) -> None:
        """Sends a page or a picture; 404 for all else."""
        host = self.headers.get("Host", "").partition(":")[0]
        if not self.token and host not in LOCAL_HOSTS:
            # by another name for this machine, a page of elsewhere could read this one
            return self.send_error(HTTPStatus.FORBIDDEN)
        path, _, query = self.path.partition("?")
        parts = [unquote(part) for part in path.split("/")[1:]]
        if self.token and not secrets.compare_digest(parts.pop(0).encode(), self.token.encode()):
            return self.send_error(HTTPStatus.NOT_FOUND)
        try:
            return self.answer(parts, parse_qs(query))
        except UserError as error:  # a folder that has just been made, or removed
            return self.send_page(functools.partial(MESSAGE_PAGE.format, escape(str(error))), "")

    def answer(self, parts: list[str], query: dict[str, list[str]]) -> None:
        """Sends what the parts of a path name: the first page, run/NAME/, or run/NAME/picture/FILE."""
        runs = find_runs(self.folder)
        is_single = list(runs.values()) == [self.folder]
        if parts == [""] and is_single:
            return self.redirect(f"run/{quote(next(iter(runs)))}/")
        if parts == [""]:
            title = self.folder.resolve().name
            page = functools.partial(live_overview, title, runs)
            return self.send_page(page, fingerprint([*runs.values()]))
        for name, folder in runs.items():
            prefix = ["run", *name.split("/")]
            rest = parts[len(prefix) :]
            if parts[: len(prefix)] == prefix and rest == [""]:
                page = functools.partial(live_run_page, folder, not is_single)
                return self.send_page(page, fingerprint([folder]))
            if parts[: len(prefix)] == prefix and rest[:1] == ["picture"]:
                return self.send_picture(folder, rest[1:], query)
        return self.send_error(HTTPStatus.NOT_FOUND)

    def send_picture(self, folder: Path, parts: list[str], query: dict[str, list[str]]) -> None:
        """Sends one of a run's pictures, made as small as the page asks for."""
        file = folder.joinpath(*parts).resolve()
        inside = parts[:1] and parts[0] in PICTURE_PLACES and file.is_relative_to(folder.resolve())
        side = query.get("side", [""])[0]
        side = min(int(side), LARGEST_SIDE) if side.isdecimal() and int(side) else LARGEST_SIDE
        picture = encode_within(file, PICTURE_BYTES, side) if inside and file.is_file() else None
        if picture is None:
            return self.send_error(HTTPStatus.NOT_FOUND)
        return self.send(picture.data, f"image/{picture.format}", {"Cache-Control": "max-age=86400"})

    def send_page(self, make: Callable[[], str], tag: str) -> None:
        """Sends a page, or that it is what the browser has; it is made only where it is sent."""
        if tag and self.headers.get("If-None-Match") == f'"{tag}"':
            self.send_response(HTTPStatus.NOT_MODIFIED)
            return self.end_headers()
        headers = {"Cache-Control": "no-cache"} | ({"ETag": f'"{tag}"'} if tag else {})
        return self.send(make().encode("utf-8", "replace"), "text/html; charset=utf-8", headers)

    def send(self, content: bytes, kind: str, headers: dict[str, str]) -> None:
        """Sends a whole answer."""
        self.send_response(HTTPStatus.OK)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")  # the address may have the token
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the browser has gone on
            self.wfile.write(content)

    def redirect(self, address: str) -> None:
        """Sends the browser on to a page below this one."""
        self.send_response(HTTPStatus.FOUND)
        self.send_header("Location", address)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_) -> None:
        """Nothing is printed for each request."""
