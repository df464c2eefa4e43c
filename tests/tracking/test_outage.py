"""W&B's server refuses, stalls or goes away: training neither waits nor ends, and says so once."""

import http.server
import json
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import wandb
from safetensors.torch import load_file

import ldm.tracking.comparison
import ldm.train
from ldm.errors import UserError
from ldm.tracking.artifact import Artifact
from ldm.tracking.comparison import fetch_run
from ldm.tracking.run import WandbRun
from tests.tracking.test_run import Record

OUTAGE = "W&B is not available"
TINY = [
    *("stage=vae", "autoencoder.model.block_out_channels=[32]", "data=image_folder", "data.path=pets"),
    *("data.resolution=16", "data.val_fraction=0.2", "batch_size=8", "trainer=cpu", "trainer.max_time=null"),
    *("trainer.max_steps=4", "trainer.precision=32-true", "trainer.log_every_n_steps=2"),
]


@contextmanager
def outage(kind: str):
    """A port on which nobody listens, or one that takes every connection and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if kind == "stalling":
            listening.listen(64)  # the system itself accepts what waits in this queue
        yield listening.getsockname()[1]


class Server(http.server.ThreadingHTTPServer):
    """Answers as much of W&B's interface as a run needs to start, until it stalls."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.stalled = threading.Event()
        self.asked: list[str] = []

    @contextmanager
    def serving(self):
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield self.server_port
        self.shutdown()
        thread.join()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.server.stalled.is_set():
            threading.Event().wait(60)
        asked = json.loads(body) if self.path == "/graphql" else {}
        query, run = asked.get("query", ""), asked.get("variables", {}).get("name", "run")
        self.server.asked.append(query or self.path)
        project = {"id": "p", "name": "ldm", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": run, "displayName": run, "config": "{}", "project": project}
        found = {"upsertBucket": {"bucket": bucket, "inserted": True}} if "upsertBucket" in query else {}
        content = json.dumps({"data": found}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_) -> None: ...


@pytest.fixture
def at(monkeypatch):
    """at(port): W&B's server is there, and a key is at hand."""

    def at(port: int) -> None:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()  # settings are read once

    for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    yield at
    wandb.teardown()


@pytest.fixture
def train(tmp_path, make_images, call, monkeypatch):
    make_images(tmp_path / "pets", 24)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))

    def train(name: str, *options: str):
        ended = call(ldm.train.main, *TINY, f"name={name}", *options)
        assert ended.code == 0, ended
        return ended.out, load_file(f"runs/vae/{name}/autoencoder/diffusion_pytorch_model.safetensors")

    return train


@pytest.mark.parametrize("kind", ["refusing", "stalling"])
def test_training_does_not_depend_on_the_server(train, at, kind):
    _, alone = train("alone", "logger=csv")
    with outage(kind) as port:
        at(port)
        start = time.perf_counter()
        said, weights = train(kind, "logger.mode=online", "logger.timeout_s=1")
        assert time.perf_counter() - start < 15
    (line,) = [line for line in said.splitlines() if OUTAGE in line]
    record = next(Path("runs/vae", kind, "wandb").glob("offline-run-*"))
    assert "Continuing" in line and line.endswith(f"wandb sync --include-online {record}")
    assert weights.keys() == alone.keys() and all(weights[key].equal(alone[key]) for key in alone)
    assert types_in(record) >= {"history", "artifact", "exit"}


def types_in(record: Path) -> set[str]:
    return {found["type"] for found in Record(record).found}


def start(folder: Path) -> WandbRun:
    return WandbRun(folder, {}, name="vae/demo", mode="online", timeout_s=4, finish_timeout_s=1)


@pytest.mark.parametrize("leaves", [True, False], ids=["an artifact", "the end"])
def test_a_server_that_stalls_holds_up_neither_artifacts_nor_the_end(at, tmp_path, capsys, leaves):
    server = Server()
    with server.serving() as port:
        at(port)
        run = start(tmp_path)
        assert run.mode == "online" and any("upsertBucket" in query for query in server.asked)
        server.stalled.set()
        began = time.perf_counter()
        run.log({"loss": 1.0}, 10)
        if leaves:
            run.timeout_s = 1
            run.leave(Artifact("autoencoder", "demo", "a" * 64))
            run.log({"loss": 0.5}, 20)
        run.finish()
        assert time.perf_counter() - began < 12
    said = capsys.readouterr().out
    assert said.count(OUTAGE) == 1
    online, *offline = (types_in(tmp_path / record) for record in said.strip().split("--include-online ")[1].split())
    assert "history" in online and len(offline) == leaves and all(types >= {"history", "artifact"} for types in offline)


@pytest.mark.parametrize("kind", ["refusing", "stalling"])
def test_a_comparison_does_not_wait_for_the_server(at, kind, monkeypatch):
    monkeypatch.setattr(ldm.tracking.comparison, "LOOK_UP_S", 1.5)
    with outage(kind) as port:
        at(port)
        began = time.perf_counter()
        with pytest.raises(UserError, match="me/ldm/abc is no run folder here, and W&B gave no run of that path"):
            fetch_run("me/ldm/abc")
        assert time.perf_counter() - began < 6


def test_a_process_of_wandb_that_dies_ends_no_training(tmp_path, capsys, monkeypatch):
    run = WandbRun(tmp_path, {"a": 1}, name="vae/demo", mode="offline")

    def dies(*_, **__) -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(run.run, "log", dies)
    run.log({"loss": 1.0}, 10)
    run.log({"loss": 0.5}, 20)
    run.finish()
    assert run.mode == "disabled" and capsys.readouterr().out.count("(Connection lost). Continuing") == 1


def test_online_without_a_key_asks_nobody(at, tmp_path, capsys, monkeypatch):
    at(9)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    wandb.teardown()
    run = start(tmp_path)
    run.finish()
    assert run.mode == "offline" and "no API key was found" in capsys.readouterr().out
