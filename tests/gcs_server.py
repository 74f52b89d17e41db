"""As much of Google Cloud Storage's JSON API as gcsfs uses for a store, on the loopback; one bucket, `runs`.

What it says where (objects.insert, .get, .list, .delete; ifGenerationMatch=0 -> 412) is after the API's public reference. With
`lose_answers` every second write is done and then answered with 503: the client cannot tell.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class State:
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, tuple[str, bool, bytearray]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    lose_answers: bool = False
    requests: int = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *args: Any) -> None:
        """Not to the tests' output."""

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str) -> None:
        self.answer(status, {"error": {"code": status, "message": message}})

    def insert(self, name: str, data: bytes, only_new: bool) -> None:
        if only_new and name in self.state.objects:
            return self.refuse(412, "At least one of the pre-conditions you specified did not hold.")
        self.state.objects[name] = data
        if self.state.lose_answers and next(self.state.numbers) % 2:
            return self.refuse(503, "Backend Error")
        self.answer(200, about(name, data))

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        query, body = parse_qs(url.query), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.state.lock:
            self.state.requests += 1
            if not url.path.startswith("/upload/storage/v1/b/runs/o"):
                return self.refuse(404, "The specified bucket does not exist.")
            only_new = query.get("ifGenerationMatch") == ["0"]
            if "upload_id" in query:
                return self.chunk(query["upload_id"][0], body)
            if query["uploadType"] == ["multipart"]:
                boundary = re.search('boundary="(.*)"', self.headers["Content-Type"]).group(1).encode()
                _, meta, media, _ = body.split(b"--" + boundary)
                name = json.loads(meta.split(b"\n\n", 1)[1])["name"]
                return self.insert(name, media.split(b"\n\n", 1)[1].removesuffix(b"\n"), only_new)
            number = str(next(self.state.numbers))
            self.state.uploads[number] = (query["name"][0], only_new, bytearray())
            location = f"http://{self.headers['Host']}{url.path}?uploadType=resumable&upload_id={number}"
            self.answer(200, b"", Location=location)

    def chunk(self, number: str, body: bytes) -> None:
        name, only_new, data = self.state.uploads[number]
        start, size = (int(part) for part in re.fullmatch(r"bytes (\d+)-\d+/(\d+)", self.headers["Content-Range"]).groups())
        data[start:] = body
        if len(data) == size:
            return self.insert(name, bytes(data), only_new)
        self.answer(308, b"", Range=f"bytes=0-{len(data) - 1}")

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with self.state.lock:
            self.state.requests += 1
            if url.path.endswith("/b/runs/o"):
                return self.answer(200, listing(self.state.objects, query.get("prefix", ""), query.get("delimiter", "")))
            found = re.fullmatch(r"(/download)?/storage/v1/b/runs/o/(.+)", url.path)
            name = unquote(found.group(2)) if found else ""
            if found is None or name not in self.state.objects:
                return self.refuse(404, "Not Found")
            data = self.state.objects[name]
            if not found.group(1):
                return self.answer(200, about(name, data))
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                start, end = int(wanted.group(1)), int(wanted.group(2)) + 1
                if start >= len(data):
                    return self.refuse(416, "The requested range cannot be satisfied.")
                return self.answer(206, data[start:end])
            self.answer(200, data)

    def do_DELETE(self) -> None:
        with self.state.lock:
            self.state.requests += 1
            gone = self.state.objects.pop(unquote(urlsplit(self.path).path.split("/o/")[-1]), None)
            self.answer(204) if gone is not None else self.refuse(404, "Not Found")


def about(name: str, data: bytes) -> dict[str, Any]:
    return {"kind": "storage#object", "name": name, "bucket": "runs", "size": str(len(data)), "generation": "1"}


def listing(objects: dict[str, bytes], prefix: str, delimiter: str) -> dict[str, Any]:
    below = {name: data for name, data in sorted(objects.items()) if name.startswith(prefix)}
    deep = {name for name in below if delimiter and delimiter in name[len(prefix):]}
    plain = [about(name, data) for name, data in below.items() if name not in deep]
    folders = {prefix + name[len(prefix):].split(delimiter)[0] + delimiter for name in deep}
    return {"items": plain, "prefixes": sorted(folders)}


@contextlib.contextmanager
def start() -> Iterator[tuple[dict[str, str], State]]:
    """The environment of a client, and what the server holds."""
    state = State()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"state": state}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}, state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
