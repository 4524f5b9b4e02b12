"""A real HTTP server on the loopback interface, which serves files and can fail in the ways that servers do.

It also answers the requests of an S3 client: objects, parts of them, and lists.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs


class Server:
    """Serves `files` by their path, and folders of them as lists of links. `asked` counts requests by method and path.

    `query` is what an address has to end with, if set; `breaks` is how many of the next downloads end in the middle.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked = Counter[str]()
        self.query, self.breaks, self.tells = "", 0, True
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                owner.answer(self, with_body=False)

            def do_GET(self) -> None:
                owner.answer(self, with_body=True)

            def log_message(self, *_: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._http.server_port}"

    @property
    def address(self) -> str:
        return f"http://{self.host}"

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path, _, query = request.path.partition("?")
        self.asked[f"{request.command} {path}"] += 1
        inside = sorted(name for name in self.files if name.startswith(path.rstrip("/") + "/"))
        body = self.files.get(path)
        if body is None and inside:
            links = "".join(f'<a href="{name}">{name}</a>' for name in inside)
            body = f"<html>{links}</html>".encode()
        if "list-type=2" in query:
            body, status = self._listing(path, query), 200
        status = 403 if self.query and query != self.query else 404 if body is None else 200
        body = body if status == 200 and body is not None else b"no"
        if (part := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))) and path in self.files:
            status, body = 206, body[int(part[1]) : int(part[2]) + 1 if part[2] else None]
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        if path in self.files:
            if self.tells:
                request.send_header("ETag", hashlib.sha256(self.files[path]).hexdigest())
                request.send_header("Last-Modified", "Mon, 30 Nov 2026 12:00:00 GMT")
            if path.endswith(".gz"):  # as nginx's gzip_static and many buckets do
                request.send_header("Content-Encoding", "gzip")
        else:
            request.send_header("Content-Type", "text/html")
        request.end_headers()
        if not with_body:
            return
        if self.breaks and path in self.files:
            self.breaks -= 1
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
            return
        request.wfile.write(body)

    def _listing(self, bucket: str, query: str) -> bytes:
        """What S3 answers to ListObjectsV2 with a delimiter."""
        asked = {key: values[0] for key, values in parse_qs(query).items()}
        start = f"{bucket.rstrip('/')}/{asked.get('prefix', '')}"
        inside = [name for name in self.files if name.startswith(start)]
        objects = "".join(
            f"<Contents><Key>{name.removeprefix(bucket.rstrip('/') + '/')}</Key><Size>{len(self.files[name])}</Size>"
            "<LastModified>2026-11-30T12:00:00.000Z</LastModified></Contents>"
            for name in sorted(inside)
            if "/" not in name.removeprefix(start)
        )
        return f"<ListBucketResult><KeyCount>{len(inside)}</KeyCount>{objects}</ListBucketResult>".encode()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
