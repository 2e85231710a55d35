"""A stand-in of the Hugging Face Hub's HTTP API on this machine: as much of it as pushing and pulling a bundle takes."""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories by name, each with its files; ``commits`` counts what was written."""

    def __init__(self):
        self.files = {}
        self.commits = 0
        self.seen = []

    def sha(self, name):
        known = sorted((path, hash(content)) for path, content in self.files[name].items())  # which bytes remember
        return hashlib.sha1(repr(known).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, body, status=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.seen.append(("POST", path))
        here = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}" if made.get("organization") else made["name"]
            self.hub.files.setdefault(name, {})
            self._answer({"url": f"{here}/{name}", "id": name, "name": name})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.*", path):
            names = [one["path"] for one in json.loads(body)["files"]]
            self._answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.*", path):
            files = self.hub.files[found[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    files.pop(value["path"])
            self.hub.commits += 1
            oid = self.hub.sha(found[1])
            self._answer({"success": True, "commitOid": oid, "commitUrl": f"{here}/{found[1]}/commit/{oid}"})
        else:
            self._answer({"error": path}, 404)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append((self.command, path))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.*", path):
            files = self.hub.files[found[1]]
            self._answer(
                [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files.items()]
            )
        elif (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.*)?", path)) and found[1] in self.hub.files:
            siblings = [{"rfilename": name} for name in self.hub.files[found[1]]]
            self._answer({"id": found[1], "sha": self.hub.sha(found[1]), "siblings": siblings})
        elif (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path)) and found[1] in self.hub.files:
            content = self.hub.files[found[1]][found[2]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._answer(content, ETag=etag, X_Repo_Commit=self.hub.sha(found[1]))
        else:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@contextmanager
def hub_on_loopback():
    """A hub, and the address that it answers at."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def asking(address, home):
    """The environment of a process that may ask the Hub at ``address``, and keeps what it gets in ``home``."""
    return {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": "hf_of_nobody",
            "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
