"""A server that says as much of Weights & Biases' protocol as its client needs to go on with a run."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PROJECT = {"id": "P", "name": "megallama", "entity": {"id": "E", "name": "me"}}
_BUCKET = {"id": "B", "name": "abc", "displayName": "d", "project": _PROJECT}


class Server(ThreadingHTTPServer):
    """Holds one run of `last_step` logged steps, 0 the first."""

    def __init__(self, *, last_step: int, can_rewind: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.last_step = last_step
        self.can_rewind = can_rewind
        self.rewound_to: list[int] = []
        """Steps to which the client asked to go back."""
        self.history: list[dict[str, Any]] = []
        """What was logged."""

    @property
    def url(self) -> str:
        """For WANDB_BASE_URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        """To a query or mutation of GraphQL."""
        if name == "RewindRun":
            self.rewound_to.append(variables["metricValue"])
            if not self.can_rewind:
                return {"errors": [{"message": "unknown field rewindRun"}]}
            return {
                "data": {
                    "rewindRun": {"rewoundRun": _BUCKET | {"historyLineCount": variables["metricValue"] + 1}}
                }
            }
        if name == "UpsertBucket":
            return {"data": {"upsertBucket": {"bucket": _BUCKET, "inserted": True}}}
        if name == "RunResumeStatus":
            last = json.dumps({"_step": self.last_step, "_runtime": 1})
            counts = {"historyLineCount": self.last_step, "logLineCount": 0, "eventsLineCount": 0}
            tails = {"historyTail": json.dumps([last]), "eventsTail": "[]", "summaryMetrics": last}
            settings = {"config": "{}", "wandbConfig": '{"t": 1}', "tags": []}
            return {"data": {"model": _PROJECT | {"bucket": _BUCKET | counts | tails | settings}}}
        if name == "CreateRunFiles":
            return {"data": {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": []}}}
        return {"data": {}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Silence."""

    def do_GET(self) -> None:  # noqa: N802
        self._reply({})

    do_PUT = do_GET  # noqa: N815

    def do_POST(self) -> None:  # noqa: N802
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        try:
            body = json.loads(content)
        except ValueError:
            return self._reply({})  # what it tells of itself
        if "file_stream" in self.path:
            lines = body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.server.history += [json.loads(line) for line in lines]
            return self._reply({"limits": {}})
        name = re.search(r"(?:query|mutation)\s+(\w+)", str(body.get("query")))
        return self._reply(self.server.answer(name[1] if name else "", body.get("variables") or {}))

    def _reply(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(400 if "errors" in body else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(*, last_step: int, can_rewind: bool) -> Iterator[Server]:
    """The server, for the block."""
    with Server(last_step=last_step, can_rewind=can_rewind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
