"""A small Hugging Face Hub on loopback, with faults on demand, for the real clients: HF_ENDPOINT=hub.url.

It speaks what `datasets` and `huggingface_hub` ask of https://huggingface.co to read: repositories with commits and
refs, api/…/revision, tree (in pages), paths-info, resolve with X-Repo-Commit and ETag, redirects of small files on the
Hub and of large files to another host, and ranges.
"""

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".parquet", ".gz", ".jsonl", ".safetensors")  # suffixes of files that redirect to another host
PAGE = 4  # entries in a page of a tree; the Hub has 1,000
REPOSITORY = r"/(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)"
FILE = r"/(?P<revision>[^/]+)/(?P<path>.+)"
ROUTES = {  # method of Handler: pattern of its addresses
    "info": rf"/api/(?P<kind>datasets|models){REPOSITORY}(/revision/(?P<revision>[^/]+))?",
    "tree": rf"/api/(?P<kind>datasets|models){REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?",
    "paths_info": rf"/api/(?P<kind>datasets|models){REPOSITORY}/paths-info/(?P<revision>[^/]+)",
    "resolve": rf"(/(?P<kind>datasets))?{REPOSITORY}/resolve{FILE}",
    "small": rf"/api/resolve-cache/(?P<kind>datasets|models){REPOSITORY}{FILE}",
    "large": rf"/lfs/(?P<kind>datasets|models){REPOSITORY}{FILE}",
}


class Fault:
    """What goes wrong with the next requests whose "METHOD address" has a pattern."""

    def __init__(self, pattern: str, kind: int | str, times: int, seconds: float, action: Callable):
        self.pattern, self.kind, self.times, self.seconds, self.action = pattern, kind, times, seconds, action
        self.hit = threading.Event()  # set by the first such request


class Hub:
    """The server, in a thread of this process: `with Hub() as hub`."""

    def __init__(self):
        self.commits: dict[tuple, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> path -> content
        self.refs: dict[tuple, dict[str, str]] = {}  # repository -> branch, tag or ref -> commit
        self.requests: list[str] = []  # "METHOD address"
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub, self.port = self, self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def push(self, name: str, files: Mapping[str, bytes], kind: str = "datasets", ref: str = "main") -> str:
        """Commits these files, and no others, to a repository. Returns the commit."""
        digest = hashlib.sha1(f"{kind} {name}".encode())
        for path, content in sorted(files.items()):
            digest.update(f"{path} {len(content)} ".encode() + content)
        repository, commit = (kind, *name.split("/")), digest.hexdigest()
        self.commits.setdefault(repository, {})[commit] = dict(files)
        self.refs.setdefault(repository, {})[ref] = commit
        return commit

    def fault(self, pattern: str, kind: int | str, times: int = 1, seconds: float = 0, action=lambda: None) -> Fault:
        """The next `times` requests: an HTTP status (429, 500), "cut" in the middle of the body, or "slow"."""
        self.faults.append(Fault(pattern, kind, times, seconds, action))
        return self.faults[-1]

    def take_fault(self, request: str) -> Fault | None:
        """Notes a request. Returns what goes wrong with it."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    fault.action()
                    fault.hit.set()
                    return fault
        return None


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Clients that go away are what the tests are about."""


class Missing(Exception):
    """What the Hub says in X-Error-Code."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        request = f"{self.command} {self.path}"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault, self.cut = self.server.hub.take_fault(request), False
        if fault:
            time.sleep(fault.seconds)
            self.cut = fault.kind == "cut"
            if isinstance(fault.kind, int):
                self.answer(fault.kind, {"Retry-After": "1"} if fault.kind == 429 else {}, b"a fault on demand")
                return
        try:
            self.route(body)
        except Missing as error:
            code = str(error)
            self.answer(401 if code == "RepoNotFound" else 404, {"X-Error-Code": code, "X-Error-Message": code})

    do_HEAD = do_POST = do_GET

    def route(self, body: bytes) -> None:
        address = urlsplit(self.path)
        for method, pattern in ROUTES.items():
            if match := re.fullmatch(pattern, address.path):
                found = {name: unquote(value or "") for name, value in match.groupdict().items()}
                self.repository = (found.get("kind") or "models", found["owner"], found["name"])
                self.commit, self.files = self.find(found["revision"] or "main")
                query = {name: values[-1] for name, values in parse_qs(address.query).items()}
                getattr(self, method)(found.get("path") or "", query, body)
                return
        raise Missing("EntryNotFound")

    def find(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """The commit that a revision names, and its files."""
        hub = self.server.hub
        if self.repository not in hub.commits:
            raise Missing("RepoNotFound")
        commit = hub.refs[self.repository].get(revision, revision)
        if commit not in hub.commits[self.repository]:
            raise Missing("RevisionNotFound")
        return commit, hub.commits[self.repository][commit]

    def answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.cut else content)
            self.close_connection |= self.cut

    def answer_json(self, value, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.answer(200, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())

    def entry(self, path: str) -> dict:
        """A file as a tree and paths-info describe it."""
        content = self.files[path]
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def info(self, path: str, query: dict, body: bytes) -> None:
        name = "/".join(self.repository[1:])
        about = {"_id": "0", "id": name, "author": self.repository[1], "sha": self.commit, "private": False}
        about |= {"gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0, "modelId": name}
        about["siblings"] = [{"rfilename": path} for path in sorted(self.files)]
        self.answer_json(about)

    def tree(self, path: str, query: dict, body: bytes) -> None:
        prefix = path and path + "/"
        entries = {}
        for file in sorted(self.files):
            if file.startswith(prefix):
                parts = file[len(prefix) :].split("/")
                for depth in range(1, len(parts)):
                    folder = prefix + "/".join(parts[:depth])
                    if depth == 1 or query["recursive"] == "true":
                        oid = blob(folder.encode())
                        entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
                if len(parts) == 1 or query["recursive"] == "true":
                    entries[file] = self.entry(file)
        if prefix and not entries:
            raise Missing("EntryNotFound")
        first = int(query.get("cursor", 0))
        address = f"{self.server.hub.url}{urlsplit(self.path).path}?recursive={query['recursive']}"
        following = {"Link": f'<{address}&expand={query["expand"]}&cursor={first + PAGE}>; rel="next"'}
        more = first + PAGE < len(entries)
        self.answer_json(list(entries.values())[first : first + PAGE], following if more else {})

    def paths_info(self, path: str, query: dict, body: bytes) -> None:
        entries = []
        for path in parse_qs(body.decode()).get("paths", []):
            if path in self.files:
                entries.append(self.entry(path))
            elif any(file.startswith(path + "/") for file in self.files):
                entries.append({"type": "directory", "path": path, "oid": blob(path.encode()), "size": 0})
        self.answer_json(entries)

    def resolve(self, path: str, query: dict, body: bytes) -> None:
        headers = {"X-Repo-Commit": self.commit}
        if path not in self.files:
            raise Missing("EntryNotFound")
        address = "/".join((*self.repository, self.commit, quote(path)))
        if path.endswith(LARGE):
            entry = self.entry(path)
            headers["X-Linked-Etag"], headers["X-Linked-Size"] = f'"{entry["lfs"]["oid"]}"', str(entry["size"])
            headers["Location"] = f"http://localhost:{self.server.hub.port}/lfs/{address}"  # another host to the client
            self.answer(302, headers)
        else:
            self.answer(307, headers | {"Location": f"/api/resolve-cache/{address}"})

    def small(self, path: str, query: dict, body: bytes) -> None:
        self.send_file(self.files[path], {"X-Repo-Commit": self.commit, "ETag": f'"{blob(self.files[path])}"'})

    def large(self, path: str, query: dict, body: bytes) -> None:
        self.send_file(self.files[path], {"ETag": f'"{hashlib.sha256(self.files[path]).hexdigest()}"'})

    def send_file(self, content: bytes, headers: dict[str, str]) -> None:
        """The content, or the range of it that the client asks for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self.answer(200, headers | {"Accept-Ranges": "bytes"}, content)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first >= len(content):
            self.answer(416, headers | {"Content-Range": f"bytes */{len(content)}"})
        else:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, headers, content[first : last + 1])


def blob(content: bytes) -> str:
    """The object id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serving(datasets: Mapping[str, Mapping[str, bytes]]):
    """A Hub that has these datasets: {name: {path: content}}."""
    with Hub() as hub:
        for name, files in datasets.items():
            hub.push(name, files)
        yield hub
