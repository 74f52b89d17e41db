"""An S3 server on the loopback (moto's), that misbehaves as told: for tests, demos and chaos runs.

    with s3_server.start(faults=Faults(seed=1, rate=0.1)) as server:
        os.environ.update(server.env)            # AWS_* and AWS_ENDPOINT_URL for any client
        open_store(f"s3://{server.bucket}/run")

    python tests/s3_server.py --port 9000 --faults 1:0.1 --log faults.jsonl      # prints the environment, serves until stopped

Faults are drawn from one generator seeded by `seed`, request by request: 503 instead of doing it, 500 after having done it (the
client cannot tell), an answer later than the client waits, a body cut short, a listing as it was some seconds ago.
GET /_faults answers {"requests": {kind: n}, "faults": {kind: n}, "bytes": {"in": n, "out": n}}; POST /_faults?SEED:RATE sets
others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import parse_qs
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

BUCKET = "runs"
_KEY, _SECRET = "loopback", "not-a-secret-of-anyone"


@dataclass(frozen=True)
class Faults:
    """`rate`: chance of a fault per request, 0..1; `kinds`: which; `slow`: seconds of a slow answer; `stale`: how many seconds
    old a listing may be."""

    seed: int = 0
    rate: float = 0.0
    kinds: tuple[str, ...] = ("before", "after", "slow", "cut", "stale")
    slow: float = 3.0
    stale: float = 5.0


@dataclass
class Middleware:
    """Between the HTTP server and moto: faults, counts, and one conditional write at a time (moto looks, then writes)."""

    app: WSGIApplication
    faults: Faults = field(default_factory=Faults)
    log: TextIO | None = None

    def __post_init__(self) -> None:
        self.requests: dict[str, int] = {}
        self.injected: dict[str, int] = {}
        self.bytes = {"in": 0, "out": 0}
        self._writing, self._counting = threading.Lock(), threading.Lock()
        self._draws = random.Random(self.faults.seed)
        self._listings: dict[str, list[tuple[float, str, list[tuple[str, str]], bytes]]] = {}

    def counts(self) -> dict[str, dict[str, int]]:
        with self._counting:
            return {"requests": dict(self.requests), "faults": dict(self.injected), "bytes": dict(self.bytes)}

    def set(self, faults: Faults) -> None:
        with self._counting:
            self.faults, self._draws = faults, random.Random(faults.seed)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/_faults":
            return self._own(environ, start_response)
        kind = _kind(environ)
        fault = self._draw(kind)
        with self._counting:
            self.bytes["in"] += int(environ.get("CONTENT_LENGTH") or 0)
        if fault == "before":
            _drain(environ)
            return _error(start_response, kind, "503 Service Unavailable", "SlowDown")
        status, headers, body = self._answer(environ, kind)
        if fault == "after":
            return _error(start_response, kind, "500 Internal Server Error", "InternalError")
        if fault == "slow":
            time.sleep(self.faults.slow)
        if fault == "stale":
            status, headers, body = self._earlier(environ, (status, headers, body))
        with self._counting:
            self.bytes["out"] += len(body)
        if fault == "cut":  # the announced length stays
            headers, body = [*headers, ("Connection", "close")], body[:len(body) // 2]
        start_response(status, headers)
        return [body]

    def _answer(self, environ: WSGIEnvironment, kind: str) -> tuple[str, list[tuple[str, str]], bytes]:
        got: list[Any] = []

        def take(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
            got[:] = [status, headers]
            return lambda data: None

        writing = environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE")
        with self._writing if writing else contextlib.nullcontext():
            answer = self.app(environ, take)
            body = b"".join(answer)
            if hasattr(answer, "close"):
                answer.close()
        if kind == "LIST":
            with self._counting:
                held = self._listings.setdefault(environ.get("QUERY_STRING", ""), [])
                held.append((time.monotonic(), got[0], got[1], body))
                del held[:-50]
        return got[0], got[1], body

    def _earlier(self, environ: WSGIEnvironment,
                 now: tuple[str, list[tuple[str, str]], bytes]) -> tuple[str, list[tuple[str, str]], bytes]:
        """The oldest answer to the same listing that is not older than `stale` seconds."""
        with self._counting:
            held = self._listings.get(environ.get("QUERY_STRING", ""), [])
            oldest = next((one for one in held if one[0] >= time.monotonic() - self.faults.stale), None)
        return oldest[1:] if oldest else now

    def _draw(self, kind: str) -> str | None:
        """The fault of this request, if any."""
        with self._counting:
            self.requests[kind] = self.requests.get(kind, 0) + 1
            chance, pick = self._draws.random(), self._draws.random()
            fits = [one for one in self.faults.kinds
                    if (one != "cut" or kind in ("GET", "LIST")) and (one != "stale" or kind == "LIST")]
            if chance >= self.faults.rate or not fits:
                return None
            fault = fits[int(pick * len(fits))]
            self.injected[fault] = self.injected.get(fault, 0) + 1
            if self.log is not None:
                line = {"request": sum(self.requests.values()), "kind": kind, "fault": fault}
                print(json.dumps(line), file=self.log, flush=True)
            return fault

    def _own(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            seed, rate = environ["QUERY_STRING"].split(":")
            self.set(Faults(seed=int(seed), rate=float(rate)))
        body = json.dumps(self.counts(), sort_keys=True).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


def _kind(environ: WSGIEnvironment) -> str:
    """GET, HEAD, PUT, CREATE (a conditional PUT), DELETE, LIST, or of a multipart upload: INITIATE, PART, COMPLETE, ABORT."""
    method, query = environ["REQUEST_METHOD"], parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    if method == "GET" and "list-type" in query:
        return "LIST"
    if method == "POST" and "uploads" in query:
        return "INITIATE"
    if "uploadId" in query:
        return {"PUT": "PART", "POST": "COMPLETE", "DELETE": "ABORT"}.get(method, method)
    return "CREATE" if method == "PUT" and environ.get("HTTP_IF_NONE_MATCH") else method


def _drain(environ: WSGIEnvironment) -> None:
    """Read the request's body: an unread one would reset the connection under the client's feet."""
    left = int(environ.get("CONTENT_LENGTH") or 0)
    while left > 0 and (block := environ["wsgi.input"].read(min(left, 2**20))):
        left -= len(block)


def _error(start_response: StartResponse, kind: str, status: str, code: str) -> Iterable[bytes]:
    xml = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
    body = b"" if kind == "HEAD" else xml.encode()
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


@dataclass(frozen=True)
class Server:
    """A server that runs: its endpoint, a bucket that is there, and what a client must have in its environment."""

    url: str
    middleware: Middleware
    bucket: str = BUCKET

    @property
    def env(self) -> dict[str, str]:
        return {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET,
                "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}

    def counts(self) -> dict[str, dict[str, int]]:
        """As GET /_faults."""
        return self.middleware.counts()


@contextlib.contextmanager
def start(port: int = 0, faults: Faults | None = None, log: TextIO | None = None) -> Iterator[Server]:
    """Serve on 127.0.0.1 (port 0: a free one) with an empty bucket `runs`."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as S3 does

        def log_request(self, *args: object) -> None:
            """Not to the tests' output."""

    for backend in s3_backends.values():  # moto's state belongs to the process: each server starts empty
        for region in backend.values():
            region.reset()
    middleware = Middleware(DomainDispatcherApplication(create_backend_app), log=log)
    http = make_server("127.0.0.1", port, middleware, threaded=True, request_handler=Quiet)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    server = Server(f"http://127.0.0.1:{http.server_port}", middleware)
    try:
        client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1",
                              aws_access_key_id=_KEY, aws_secret_access_key=_SECRET)
        client.create_bucket(Bucket=BUCKET)
        client.close()
        middleware.requests.clear()
        middleware.set(faults or Faults())
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join(5)


def main() -> None:
    parser = argparse.ArgumentParser(description="An S3 server on the loopback, with faults.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", metavar="SEED:RATE", default="0:0")
    parser.add_argument("--slow", type=float, default=Faults.slow, help="seconds of a slow answer")
    parser.add_argument("--log", type=Path, help="a line of JSON per fault")
    chosen = parser.parse_args()
    seed, rate = chosen.faults.split(":")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(chosen.log, "a")) if chosen.log else None
        server = stack.enter_context(start(chosen.port, Faults(int(seed), float(rate), slow=chosen.slow), log))
        for name, value in server.env.items():
            print(f"export {name}={value}")
        print(f"# bucket: s3://{server.bucket}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
