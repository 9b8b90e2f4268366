"""A local server that speaks as much of the hub's protocol as downloads and uploads need, with faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    """Files of one repository, by name, and how access to it goes wrong."""

    files: dict[str, bytes]
    gated: bool = False
    revisions: tuple[str, ...] = ("main", COMMIT)


@dataclass
class Faults:
    """What the server does to requests for files.

    ``cut_after`` ends the next transfer of a file after so many bytes, once each; ``status`` answers everything so;
    ``delay_s`` waits before every answer.
    """

    cut_after: dict[str, int] = field(default_factory=dict)
    status: int | None = None
    delay_s: float = 0.0


@dataclass
class Seen:
    """One request: its method, the path, and its Range header or None."""

    method: str
    path: str
    range: str | None


class HubServer:
    """Serves repositories on a free port of 127.0.0.1 while used as a context manager.

    ``url`` is the endpoint for HF_ENDPOINT, ``seen`` lists all requests, ``sent`` counts the bytes of files sent.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults = Faults()
        self.seen: list[Seen] = []
        self.sent: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def etag(content: bytes) -> str:
    """The git blob hash, which the hub uses as ETag of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_PUT(self) -> None:
            """The content of a large file, under the address that the batch answer gave."""
            hub.seen.append(Seen(self.command, self.path, None))
            hub.blobs[self.path.rpartition("/")[2]] = self._body()
            self._send_json({}, with_body=True)

        def do_POST(self) -> None:
            """The steps of an upload: make the repository, ask how each file is sent, commit."""
            path, body = unquote(urlsplit(self.path).path).strip("/"), self._body()
            hub.seen.append(Seen(self.command, "/" + path, None))
            if hub.faults.status is not None:
                return self._refuse(hub.faults.status, "", True)
            if path.endswith("/commit/main"):
                return self._commit("/".join(path.split("/")[2:4]), [json.loads(x) for x in body.splitlines()])
            asked = json.loads(body)
            if path == "api/repos/create":
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                hub.repos.setdefault(name, Repo({}))
                return self._send_json({"url": f"{hub.url}/{name}", "id": name}, with_body=True)
            if path == "api/validate-yaml":
                return self._send_json({"errors": [], "warnings": []}, with_body=True)
            if path.endswith("/preupload/main"):
                modes = [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for f in asked["files"]
                ]
                return self._send_json({"files": modes}, with_body=True)
            if path.endswith("/objects/batch"):
                objects = [
                    o | {"actions": {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}} for o in asked["objects"]
                ]
                return self._send_json({"transfer": "basic", "objects": objects}, with_body=True)
            return self._refuse(404, "", True)

        def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
            repo = hub.repos[name]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repo.files[value["path"]] = hub.blobs[value["oid"]]
            self._send_json({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}, with_body=True)

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.seen.append(Seen(self.command, path, self.headers.get("Range")))
            time.sleep(hub.faults.delay_s)
            if hub.faults.status is not None:
                return self._refuse(hub.faults.status, "", with_body)
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self._api("/".join(parts[2:4]), parts[4:], with_body)
            if len(parts) > 4 and parts[2] == "resolve":
                return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body)
            return self._refuse(404, "", with_body)

        def _repo(self, name: str, revision: str, with_body: bool) -> Repo | None:
            repo = hub.repos.get(name)
            if repo is None:
                self._refuse(401, "RepoNotFound", with_body)
            elif revision not in repo.revisions:
                self._refuse(404, "RevisionNotFound", with_body)
            else:
                return repo
            return None

        def _api(self, name: str, rest: list[str], with_body: bool) -> None:
            revision = rest[1] if len(rest) > 1 else "main"
            repo = self._repo(name, revision, with_body)
            if repo is None:
                return
            if rest[:1] == ["tree"]:
                listing = [
                    {"type": "file", "path": n, "size": len(c), "oid": etag(c)} for n, c in sorted(repo.files.items())
                ]
                self._send_json(listing, with_body)
                return
            siblings = [{"rfilename": n} for n in sorted(repo.files)]
            self._send_json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}, with_body)

        def _file(self, name: str, revision: str, file: str, with_body: bool) -> None:
            repo = self._repo(name, revision, with_body)
            if repo is None:
                return
            if repo.gated:
                self._refuse(403, "GatedRepo", with_body)
                return
            if file not in repo.files:
                self._refuse(404, "EntryNotFound", with_body)
                return
            self._send_file(file, repo.files[file], with_body)

        def _send_file(self, name: str, content: bytes, with_body: bool) -> None:
            start, stop = 0, len(content)
            asked = self.headers.get("Range", "")
            if asked.startswith("bytes=") and asked[6:].split("-")[0]:
                first, _, last = asked[6:].partition("-")
                start, stop = int(first), min(int(last) + 1, stop) if last else stop
            part = content[start:stop]
            is_part = len(part) < len(content)
            self.send_response(206 if is_part else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{etag(content)}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            if is_part:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            self.end_headers()
            if not with_body:
                return
            cut = hub.faults.cut_after.pop(name, None)
            body = part if cut is None else part[:cut]
            hub.sent[name] = hub.sent.get(name, 0) + len(body)
            self.wfile.write(body)
            if cut is not None:
                self.close_connection = True

        def _refuse(self, status: int, code: str, with_body: bool) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send_json(self, value: object, with_body: bool) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    return Handler
