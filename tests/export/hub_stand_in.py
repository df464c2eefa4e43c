"""A stand-in for the Hugging Face Hub on this machine: uploads and downloads of models over HTTP, without LFS."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "c" * 40


@dataclass
class HubStandIn:
    """Repositories by name, each with its files and its visibility."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    visibility: dict[str, str] = field(default_factory=dict)
    may_write: bool = True

    def use(self, monkeypatch: Any, cache: Path) -> None:
        """Let huggingface_hub connect to the stand-in in this process, with a new cache."""
        template = f"{self.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        constants = {"ENDPOINT": self.address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)}
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """Serve a stand-in while the block runs."""
    hub = HubStandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def reply(self, content: Any, code: int = 200, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def do_POST(self) -> None:  # noqa: N802
            content = self.body()
            repository = "/".join(self.path.split("/")[3:5])
            if self.path == "/api/repos/create" and not hub.may_write:
                self.reply({"error": "You have read access only"}, 403)
            elif self.path == "/api/repos/create":
                request = json.loads(content)
                repository = f"{request['organization']}/{request['name']}"
                hub.files.setdefault(repository, {})
                hub.visibility.setdefault(repository, request["visibility"])
                self.reply({"url": f"{hub.address}/{repository}", "name": repository})
            elif self.path == "/api/validate-yaml":
                self.reply({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(content)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                self.reply({"files": modes})
            else:
                entries = [json.loads(line) for line in content.splitlines()]
                values = [entry["value"] for entry in entries if entry["key"] == "file"]
                hub.files[repository] |= {value["path"]: base64.b64decode(value["content"]) for value in values}
                self.reply({"commitUrl": f"{hub.address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})

        def do_GET(self) -> None:  # noqa: N802
            path = self.path.split("?")[0]
            if path.startswith("/api/models/"):
                repository = "/".join(path.split("/")[3:5])
                files = hub.files.get(repository)
                if files is None:
                    self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                elif "/tree/" in path:
                    entries = [
                        {"type": "file", "path": name, "size": len(x), "oid": _sha1(x)} for name, x in files.items()
                    ]
                    self.reply(entries)
                else:
                    siblings = [{"rfilename": name} for name in files]
                    is_private = hub.visibility.get(repository) == "private"
                    content = {"id": repository, "modelId": repository, "sha": COMMIT, "private": is_private}
                    self.reply({**content, "siblings": siblings})
                return
            repository, _, rest = path[1:].partition("/resolve/")
            content = hub.files.get(repository, {}).get(rest.partition("/")[2])
            if content is None:
                self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            else:
                self.reply(content, ETag=f'"{_sha1(content)}"')

        do_HEAD = do_GET  # noqa: N815

    return Handler


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
