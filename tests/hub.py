"""A hub on this machine: data sets that the `datasets` library streams, and what can go wrong."""

import json
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from datasets import config
from huggingface_hub import constants

from mlsae_core.store import file_hash

FAULTS = ("503", "429", "reset", "cut", "slow", "stall")
COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Serves the files of one data set, whatever it is called.

    files: content by name. faults: what happens to the next requests for content, one each, of
    `FAULTS`; a last one of None goes on for ever with the one before it. read: bytes served by
    (token of the reader, file), since a reader's HF_TOKEN says who it is. stall: seconds.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], stall: float = 1.0):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files, self.stall = files, stall
        self.faults: list[str | None] = []
        self.met, self.read = [], Counter()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fault(self) -> str | None:
        with self.lock:
            if not self.faults:
                return None
            fault = self.faults[0] if self.faults[1:] == [None] else self.faults.pop(0)
            self.met.append(fault)
            return fault

    def handle_error(self, *_):
        """Readers that are killed are part of the tests."""


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        if match := re.match(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.+)", path):
            self.content(match[1])
        elif re.match(r"/api/datasets/[^/]+/[^/]+/tree/", path):
            self.json([self.entry(name) for name in self.server.files])
        elif match := re.match(r"/api/datasets/([^/]+/[^/]+)(/revision/.*)?$", path):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.json({"id": match[1], "sha": COMMIT, "siblings": siblings, "tags": []})
        else:
            self.answer(404)

    do_HEAD = do_GET

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = json.loads(asked)["paths"] if asked.startswith("{") else re.findall(
            r"paths=([^&]+)", asked)  # fmt: skip
        self.json([self.entry(name) for name in names if name in self.server.files])

    def entry(self, name: str) -> dict:
        size = len(self.server.files[name])
        return {"type": "file", "path": name, "size": size, "oid": COMMIT}

    def content(self, name: str):
        whole = self.server.files.get(name)
        if whole is None:
            return self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, headers=headers | {"Content-Length": str(len(whole))})
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = (int(wanted[1]), int(wanted[2] or len(whole) - 1)) if wanted else (0, 10**12)
        part = whole[start : end + 1]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(whole)}"
        with self.server.lock:
            reader = self.headers.get("Authorization", "").removeprefix("Bearer ")
            self.server.read[reader, name] += len(part)
        match self.server.fault():
            case "503" | "429" as status:
                self.answer(int(status))
            case "reset":
                linger = struct.pack("ii", 1, 0)  # closing then sends a reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                os.close(self.connection.detach())
            case "cut":
                self.answer(206, part[: len(part) // 2], headers, len(part))
                self.close_connection = True
            case "slow":
                self.answer(206, b"", headers, len(part))
                for at in range(0, len(part), 1 + len(part) // 10):
                    time.sleep(self.server.stall / 10)
                    self.wfile.write(part[at : at + 1 + len(part) // 10])
            case "stall":
                time.sleep(self.server.stall)
                self.close_connection = True
            case _:
                self.answer(206 if wanted else 200, part, headers)

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes = b"", headers=None, length: int | None = None):
        self.send_response(status)
        found = {"Content-Length": str(len(body) if length is None else length)} | (headers or {})
        for name, value in found.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def log_message(self, *_):
        pass


def use(url: str, cache: Path, reader: str = "reader", patient: bool = True):
    """Let this process take its data sets from the hub at `url`, whatever was imported already.

    patient: whether it tries again as often as the libraries do; never for long.
    """
    os.environ["HF_TOKEN"] = reader
    constants.ENDPOINT = config.HF_ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = config.HF_DATASETS_CACHE = str(cache)
    for name in ("", "SERVER_UNAVAILABLE_", "RATE_LIMIT_"):
        setattr(config, f"STREAMING_READ_{name}RETRY_INTERVAL", 0.1)
    if not patient:
        config.STREAMING_READ_MAX_RETRIES = 2


class Repositories:
    """`HfApi` of a hub that says in a folder what it holds: all of a commit, or nothing of it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool):
        (self.folder / repo).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        files = {path.name: file_hash(path) for path in sorted(Path(folder_path).iterdir())}
        new, head = (self.folder / repo_id / name for name in ("new.json", "head.json"))
        new.write_text(json.dumps({"message": commit_message, "files": files}))
        new.replace(head)
        return f"http://hub/{repo_id}"


@contextmanager
def serving(files: dict[str, bytes], **options):
    """A hub that answers while this is entered."""
    with Hub(files, **options) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
