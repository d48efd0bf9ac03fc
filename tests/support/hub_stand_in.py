"""A hub on this machine: the few answers of Hugging Face's HTTP interface that the real client asks for."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repo, files, large=(), claimed=None):
    """Serve one repository; yields (address, list of files fetched).

    ``large`` names are published as LFS files with their sha256, or with the one in ``claimed``.
    """
    fetched = []
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()} | (claimed or {})

    def entry(name):
        lfs = {"sha256": sha256[name], "oid": sha256[name], "size": len(files[name]), "pointerSize": 1}
        return {"size": len(files[name])} | ({"lfs": lfs} if name in large else {})

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            name = path.removeprefix(f"/{repo}/resolve/{COMMIT}/")
            revisions = (f"/api/models/{repo}/revision/{revision}" for revision in ("main", COMMIT))
            if path in (f"/api/models/{repo}", *revisions):
                siblings = [{"rfilename": name, "blobId": "0" * 40, **entry(name)} for name in files]
                self.answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
            elif path == f"/api/models/{repo}/tree/{COMMIT}":
                tree = [{"type": "file", "path": name, "oid": "0" * 40, **entry(name)} for name in files]
                self.answer(json.dumps(tree).encode())
            elif name in files:
                if self.command == "GET":
                    fetched.append(name)
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256[name]}"'}
                if name in large:
                    headers |= {"X-Linked-Etag": f'"{sha256[name]}"', "X-Linked-Size": str(len(files[name]))}
                self.answer(files[name], headers=headers)
            else:
                self.answer(b'{"error": "Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"})

        def answer(self, body, status=200, headers=None):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
