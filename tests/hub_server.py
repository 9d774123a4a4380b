"""A small Hub on the loopback, in memory: as much of it as huggingface_hub needs to create, push to and load from."""

import base64
import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import close_session, constants, hf_api
from transformers.utils import hub as transformers_hub

TOKEN = "hf_loopback"
MAX_BODY = 1 << 20


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        tree = {**self.commits[self.branches[branch]], **files}
        oid = hashlib.sha1(json.dumps([len(self.commits), sorted(tree)]).encode()).hexdigest()
        self.commits[oid] = tree
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """Its state, and what tests do to it behind the client's back."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.requests: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.find(revision)]

    def put(self, repo_id: str, files: dict[str, bytes]) -> None:
        self.repos.setdefault(repo_id, Repo()).commit("main", files)


@contextlib.contextmanager
def serve():
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join(5)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    server: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer_get()

    def do_GET(self):
        self.answer_get()

    def answer_get(self):
        path = self.take_path()
        if path[:2] == ["api", "models"] and path[4:5] == ["tree"]:
            repo, oid = self.look_up("/".join(path[2:4]), path[5])
            if oid:
                self.reply_tree(repo.commits[oid], "/".join([*path[6:], ""]))
        elif path[:2] == ["api", "models"]:
            repo, oid = self.look_up("/".join(path[2:4]), path[5] if path[4:5] == ["revision"] else "main")
            if oid:
                names = [{"rfilename": name} for name in repo.commits[oid]]
                self.reply({"id": "/".join(path[2:4]), "sha": oid, "private": repo.private, "siblings": names})
        elif path[2:3] == ["resolve"]:
            repo, oid = self.look_up("/".join(path[:2]), path[3])
            if oid:
                self.reply_file(repo.commits[oid].get("/".join(path[4:])), oid)
        else:
            self.reply({"error": "Not found"}, 404)

    def do_PUT(self):
        digest, blob = self.take_path()[-1], self.take_body()
        if hashlib.sha256(blob).hexdigest() != digest:
            return self.reply({"error": "Another SHA-256"}, 400)
        self.server.blobs[digest] = blob
        self.reply({})

    def do_POST(self):
        path, body = self.take_path(), self.take_body()
        if not self.is_authorized():
            return self.reply({"error": "Invalid username or password."}, 401)
        if path == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if path == ["api", "validate-yaml"]:
            metadata = next(yaml.safe_load_all(json.loads(body)["content"]))
            return self.reply({"errors": [], "warnings": []}, 200 if isinstance(metadata, dict) else 400)
        if path[2:] == ["info", "lfs", "objects", "batch"]:
            return self.start_lfs(json.loads(body)["objects"])
        repo_id, action, name = "/".join(path[2:4]), path[4], path[5]
        repo, oid = self.look_up(repo_id, "main" if action == "branch" else name)
        if not oid:
            return None
        if action == "branch":
            is_new = name not in repo.branches
            repo.branches.setdefault(name, oid)
            return self.reply({}, 200 if is_new else 409)
        if action == "preupload":
            modes = [
                (file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular")
                for file in json.loads(body)["files"]
            ]
            return self.reply({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        return self.commit(repo_id, repo, name, [json.loads(line) for line in body.splitlines()])

    def create(self, asked):
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.endpoint}/{repo_id}"}
        if repo_id in self.server.repos:
            return self.reply({"error": "You already created this model repo", **url}, 409)
        self.server.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        self.reply(url)

    def start_lfs(self, objects):
        href = self.server.endpoint + "/lfs/"
        actions = [{**o, "actions": {"upload": {"href": href + o["oid"]}}} for o in objects]
        self.reply({"transfer": "basic", "objects": actions})

    def commit(self, repo_id, repo, branch, lines):
        values = [(line["key"], line["value"]) for line in lines]
        files = {v["path"]: base64.b64decode(v["content"]) for key, v in values if key == "file"}
        files |= {v["path"]: self.server.blobs[v["oid"]] for key, v in values if key == "lfsFile"}
        oid = repo.commit(branch, files)
        self.reply({"commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    def look_up(self, repo_id, revision):
        """The repository and the commit; answers by itself if there is none."""
        repo = self.server.repos.get(repo_id)
        if repo and repo.private and not self.is_authorized():
            repo = None
        oid = repo.find(revision) if repo else None
        if not oid:
            code = "RevisionNotFound" if repo else "RepoNotFound"
            self.reply({"error": code}, 404, {"X-Error-Code": code})
        return repo, oid

    def is_authorized(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def take_path(self):
        url = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {url}")
        return [unquote(part) for part in url.strip("/").split("/")]

    def take_body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(min(size, MAX_BODY)))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(min(int(self.headers.get("Content-Length", 0)), MAX_BODY))

    def reply(self, content, status=200, headers=None):
        body = json.dumps(content).encode()
        self.send(status, body, {"Content-Type": "application/json", **(headers or {})})

    def reply_tree(self, files, folder):
        found = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
        if found := [file for file in found if file["path"].startswith(folder)]:
            return self.reply(found)
        self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def reply_file(self, content, oid):
        if content is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}
            return self.reply({"error": "Entry not found"}, 404, headers)
        self.send(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": oid})

    def send(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def serve_instead(monkeypatch, folder):
    """Serves a Hub that huggingface_hub asks instead of the real one, without a token and with an empty cache."""
    with serve() as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)  # it has a client of its own, made once
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the loopback speaks LFS only
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        close_session()
        yield hub
        close_session()
