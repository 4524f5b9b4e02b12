"""A tracker whose server goes away costs a run its uploads, never its end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distft.runs.folder import RunFolder

from ..distributed.conftest import finish, start
from ..distributed.test_artefacts import wandb_records
from ..distributed.test_guards import wait_for_step
from .conftest import STEPS, assert_gone, assert_same_run, begin, family, ranks, until

Whole = Callable[[str], RunFolder]

# The part of a W&B server that wandb needs when a run starts or resumes: it keeps the history of one run, and notes
# each request on stdout, with the steps of the history that it holds by then.
SERVER = """
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROJECT = {"id": "p", "name": "distft", "entity": {"id": "e", "name": "me"}}
BUCKET = {"id": "b", "name": "run", "displayName": "run", "config": "{}", "project": PROJECT, "tags": [],
          "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]", "wandbConfig": json.dumps({"t": 1})}
HISTORY = {}

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(content) if content.startswith(b"{") else {}  # wandb's telemetry is protobuf
        lines = asked.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        HISTORY.update(enumerate(lines["content"], lines["offset"]))
        last = HISTORY[max(HISTORY)] if HISTORY else "{}"
        bucket = BUCKET | {"historyLineCount": len(HISTORY), "historyTail": json.dumps([last]), "summaryMetrics": last}
        body = json.dumps({"data": {
            "viewer": {"id": "v", "entity": "me", "flags": "{}", "teams": {"edges": []}},
            "upsertBucket": {"bucket": bucket, "inserted": not HISTORY},
            "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []},
            "model": {"id": "p", "name": "distft", "bucket": bucket if HISTORY else None},
        }}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        rows = [json.loads(HISTORY[number]) for number in sorted(HISTORY)]
        steps = [[row["_step"], row.get("train/global_step"), "train/loss" in row] for row in rows]
        print(self.path, json.dumps(steps), flush=True)

    def log_message(self, *words):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def wandb_server(where: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """The file in which a server notes its requests, and the environment that sends wandb there."""
    requests = where / "requests"
    with requests.open("w") as output:
        server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=output)
    try:
        until(lambda: requests.read_text().endswith("\n"))
        port = requests.read_text().split()[0]
        yield (
            requests,
            {
                "WANDB_MODE": "online",
                "WANDB_API_KEY": "0" * 40,
                "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
            },
        )
    finally:
        server.kill()
        server.wait()


def assert_whole_history(requests: Path) -> None:
    """The server holds every step's loss once, in order, and W&B's own count without a gap."""
    rows = json.loads(requests.read_text().splitlines()[-1].split(" ", 1)[1])
    assert [row[0] for row in rows] == list(range(len(rows)))
    assert [row[1] for row in rows if row[2]] == list(range(1, STEPS + 1))


def test_a_server_that_dies_during_the_run(uninterrupted: Whole, tmp_path: Path) -> None:
    whole = uninterrupted("ddp")
    with wandb_server(tmp_path) as (requests, environment):
        process = begin(tmp_path, "ddp", "tracking.report_to=[wandb]", **environment)
        wait_for_step(tmp_path, 3)
        until(lambda: "file_stream" in requests.read_text())
    everyone = family(process)
    ended = finish(process, tmp_path)  # W&B is given a minute to upload what it has, and would try for days
    assert ended.code == 0, ended.stderr[-3000:]
    assert_same_run(ended.folder, whole)
    assert list(ended.folder.path.glob("wandb/run-*/*.wandb")), "kept for `wandb sync`"
    assert_gone(everyone)


def test_an_interrupted_run_is_not_shown_as_finished(tmp_path: Path) -> None:
    process = begin(tmp_path, "ddp", "tracking.report_to=[wandb]")
    folder = wait_for_step(tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    assert finish(process, tmp_path).code == 75
    (exit_record,) = wandb_records(folder.path / "wandb", "exit")
    assert exit_record["exit_code"] == 1


def test_restarts_are_one_wandb_run_offline(tmp_path: Path) -> None:
    """A rank is killed after steps that no checkpoint has: they are made again, and logged once."""
    process = begin(tmp_path, "ddp", "tracking.report_to=[wandb]", "training.save_steps=8")
    folder = wait_for_step(tmp_path, 12)
    ranks(process)[1].send_signal(signal.SIGKILL)
    ended = finish(process, tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    identity = json.loads(folder.wandb_run.read_text())["id"]
    assert [path.name.rpartition("-")[2] for path in folder.wandb.glob("offline-run-*")] == [identity] * 2
    assert f"wandb sync {folder.wandb.relative_to(tmp_path)}" in ended.stderr

    with wandb_server(tmp_path) as (requests, environment):
        command = [str(Path(sys.executable).parent / "wandb"), "sync", str(folder.wandb)]
        ended = finish(start(command, tmp_path, **environment), tmp_path)
        assert ended.code == 0, ended.stderr
        assert_whole_history(requests)


def test_restarts_are_one_wandb_run_online(tmp_path: Path) -> None:
    with wandb_server(tmp_path) as (requests, environment):
        process = begin(tmp_path, "single", "tracking.report_to=[wandb]", "training.save_steps=8", **environment)
        folder = wait_for_step(tmp_path, 12)
        ranks(process)[0].send_signal(signal.SIGKILL)
        ended = finish(process, tmp_path)
        assert ended.code == 0, ended.stderr[-3000:]
        assert len(list(folder.wandb.glob("run-*"))) == 2
        assert_whole_history(requests)


def test_a_signal_to_all_processes_costs_no_record(uninterrupted: Whole, tmp_path: Path) -> None:
    """As a scheduler sends it: W&B's own service gets it as well, and dies of it."""
    whole = uninterrupted("single")
    process = begin(tmp_path, "single", "tracking.report_to=[wandb]")
    folder = wait_for_step(tmp_path, 5)
    everyone = family(process)
    for member in [*(other for other in everyone if "wandb-core" in other.name()), *ranks(process).values()]:
        member.send_signal(signal.SIGTERM)
    stopped = finish(process, tmp_path)
    assert stopped.code == 75, stopped.stderr[-3000:]
    assert "Traceback" not in stopped.stderr and "warning: wandb" not in stopped.stderr
    again = finish(begin(tmp_path, "single", "tracking.report_to=[wandb]"), tmp_path)
    assert again.code == 0, again.stderr[-3000:]
    assert_same_run(folder, whole)
    assert_gone(everyone)
    with wandb_server(tmp_path) as (requests, environment):
        command = [str(Path(sys.executable).parent / "wandb"), "sync", str(folder.wandb)]
        ended = finish(start(command, tmp_path, **environment), tmp_path)
        assert ended.code == 0, ended.stderr
        assert_whole_history(requests)
