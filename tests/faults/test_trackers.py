"""A tracker whose server goes away costs a run its uploads, never its end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from distft.run import RunFolder

from ..distributed.conftest import finish
from ..distributed.test_artefacts import wandb_records
from ..distributed.test_guards import wait_for_step
from .conftest import assert_gone, assert_same_run, begin, family, until

Whole = Callable[[str], RunFolder]

# As much of a W&B server as wandb asks for when a run begins; it notes each request on stdout.
SERVER = """
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROJECT = {"id": "p", "name": "distft", "entity": {"id": "e", "name": "me"}}
BUCKET = {"id": "b", "name": "run", "displayName": "run", "config": "{}", "project": PROJECT, "historyLineCount": 0}
ANSWER = {
    "viewer": {"id": "v", "entity": "me", "flags": "{}", "teams": {"edges": []}},
    "upsertBucket": {"bucket": BUCKET, "inserted": True},
    "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []},
}

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.dumps({"data": ANSWER}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        print(self.path, flush=True)

    def log_message(self, *words):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_a_server_that_dies_during_the_run(uninterrupted: Whole, tmp_path: Path) -> None:
    whole = uninterrupted("ddp")
    requests = tmp_path / "requests"
    with requests.open("w") as output:
        server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=output)
    try:
        until(lambda: requests.read_text().endswith("\n"))
        port = requests.read_text().split()[0]
        process = begin(
            tmp_path, "ddp", "tracking.report_to=[wandb]", WANDB_MODE="online", WANDB_API_KEY="0" * 40,
            WANDB_BASE_URL=f"http://127.0.0.1:{port}",
        )  # fmt: skip
        wait_for_step(tmp_path, 3)
        until(lambda: "file_stream" in requests.read_text())
    finally:
        server.kill()
        server.wait()
    everyone = family(process)
    killed = time.monotonic()
    ended = finish(process, tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    assert time.monotonic() - killed < 150, "W&B is given a minute to upload what it has"
    assert_same_run(ended.folder, whole)
    assert list(ended.folder.path.glob("wandb/run-*/*.wandb")), "kept for `wandb sync`"
    assert_gone(everyone)


def test_an_interrupted_run_is_not_shown_as_finished(tmp_path: Path) -> None:
    process = begin(tmp_path, "ddp", "tracking.report_to=[wandb]")
    folder = wait_for_step(tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    assert finish(process, tmp_path).code == 75
    (exit_record,) = [record.exit for record in wandb_records(folder.path / "wandb") if record.HasField("exit")]
    assert exit_record.exit_code == 1
