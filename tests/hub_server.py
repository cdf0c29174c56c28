"""A small hub: the endpoints of Hugging Face's that fetching and pushing use, over HTTP."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """commits: by hash, oldest first. refs: branches and tags."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, ref: str = "main") -> str:
        """The hash of a new state of a branch."""
        told = repr((len(self.commits), ref, sorted(files))).encode()
        sha = hashlib.sha1(told).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def at(self, revision: str) -> str | None:
        """The hash that a revision names."""
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


class Hub:
    """Serves `repositories` at `url` until `close`. `requests`: those that came, in order."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.large: Files = {}  # what came beside commits, by its sha256
        self.gated: set[str] = set()
        self.claimed: dict[str, int] = {}  # sizes that are told and not true
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Answer nothing more."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, body, **found.groupdict())
        return self._send(404, {"error": "no such endpoint"})

    def _send(self, status: int, data: object, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _find(self, repo: str, revision: str = "main") -> tuple[str, Files] | None:
        """The commit and its files, or None where an error was answered."""
        kept = self.served.repositories.get(repo)
        if kept is None:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif repo in self.served.gated:
            self._send(403, {"error": "ask first"}, X_Error_Code="GatedRepo")
        elif (sha := kept.at(revision)) is None:
            self._send(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        else:
            return sha, kept.commits[sha]
        return None

    def _info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if found := self._find(repo, revision or "main"):
            names = [{"rfilename": name} for name in found[1]]
            private = self.served.repositories[repo].private
            self._send(200, {"id": repo, "sha": found[0], "private": private, "siblings": names})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        if found := self._find(repo, revision):
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                for name, data in found[1].items()
            ]
            self._send(200, listed)

    def _file(self, body: bytes, repo: str, revision: str, name: str) -> None:
        if not (found := self._find(repo, revision)):
            return
        sha, files = found
        if name not in files:
            self._send(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
            return
        data = files[name]
        told = {"X_Repo_Commit": sha, "ETag": f'"{_oid(data)}"'}
        if name in self.served.claimed:
            told["X_Linked_Size"] = str(self.served.claimed[name])
        self._send(200, data, **told)

    def _create(self, body: bytes) -> None:
        given = json.loads(body)
        repo = f"{given['organization']}/{given['name']}" if "organization" in given else "?"
        told = {"url": f"{self.served.url}/{repo}"}
        if repo in self.served.repositories:
            self._send(409, told | {"error": "it is there"})
            return
        made = Repository(private=given.get("visibility") == "private")
        made.commit({".gitattributes": b""})
        self.served.repositories[repo] = made
        self._send(200, told)

    def _branch(self, body: bytes, repo: str, branch: str) -> None:
        kept = self.served.repositories[repo]
        if branch in kept.refs:
            self._send(409, {"error": "it is there"})
            return
        kept.refs[branch] = kept.refs["main"]
        self._send(200, {})

    def _yaml(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self._find(repo, revision):
            asked = [each["path"] for each in json.loads(body)["files"]]
            modes = [
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for path in asked
            ]
            self._send(200, {"files": modes})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.served.url}/large/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _take(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.served.large[oid] = body
        self._send(200, {})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        if not (found := self._find(repo, revision)):
            return
        files = dict(found[1])
        for line in body.splitlines():
            act = json.loads(line)
            if act["key"] == "file":
                files[act["value"]["path"]] = base64.b64decode(act["value"]["content"])
            elif act["key"] == "lfsFile":
                files[act["value"]["path"]] = self.served.large[act["value"]["oid"]]
            elif act["key"] == "deletedFile":
                del files[act["value"]["path"]]
        sha = self.served.repositories[repo].commit(files, revision)
        url = f"{self.served.url}/{repo}/commit/{sha}"
        self._send(200, {"success": True, "commitUrl": url, "commitOid": sha})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    (rf"GET /api/models/{_REPO}(/revision/(?P<revision>.+))?", _Handler._info),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)/?", _Handler._tree),
    (rf"(GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler._file),
    (r"POST /api/repos/create", _Handler._create),
    (rf"POST /api/models/{_REPO}/branch/(?P<branch>.+)", _Handler._branch),
    (r"POST /api/validate-yaml", _Handler._yaml),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler._preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"PUT /large/(?P<oid>\w+)", _Handler._take),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler._commit),
)


def _oid(data: bytes) -> str:
    """As git names what it keeps."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
