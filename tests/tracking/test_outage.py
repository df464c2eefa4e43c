"""W&B outages: training neither waits nor stops if the server refuses connections or stalls, or if W&B crashes."""

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
TINY_RUN = [
    *("stage=vae", "autoencoder.model.block_out_channels=[32]", "data=image_folder", "data.path=pets"),
    *("data.resolution=16", "data.val_fraction=0.2", "batch_size=8", "trainer=cpu", "trainer.max_time=null"),
    *("trainer.max_steps=4", "trainer.precision=32-true", "trainer.log_every_n_steps=2"),
]


@contextmanager
def outage(kind: str):
    """Yield a port that refuses connections, or one that accepts every connection and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if kind == "stalling":
            server.listen(64)  # the operating system accepts connections into this queue
        yield server.getsockname()[1]


class Server(http.server.ThreadingHTTPServer):
    """Server with the part of W&B's API that a run needs to start. It stops answering once `stalled` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RequestHandler)
        self.stalled = threading.Event()
        self.requests: list[str] = []

    @contextmanager
    def serve(self):
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield self.server_port
        self.shutdown()
        thread.join()
        self.server_close()


class RequestHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.server.stalled.is_set():
            threading.Event().wait(60)
        request = json.loads(body) if self.path == "/graphql" else {}
        query, run = request.get("query", ""), request.get("variables", {}).get("name", "run")
        self.server.requests.append(query or self.path)
        project = {"id": "p", "name": "ldm", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": run, "displayName": run, "config": "{}", "project": project}
        data = {"upsertBucket": {"bucket": bucket, "inserted": True}} if "upsertBucket" in query else {}
        content = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_) -> None: ...


@pytest.fixture
def use_server(monkeypatch):
    """use_server(port): make W&B use a local server and a dummy API key."""

    def use_server(port: int) -> None:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()  # W&B reads its settings only once

    for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    yield use_server
    wandb.teardown()


@pytest.fixture
def train(tmp_path, make_images, call, monkeypatch):
    make_images(tmp_path / "pets", 24)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))

    def train(name: str, *options: str):
        result = call(ldm.train.main, *TINY_RUN, f"name={name}", *options)
        assert result.code == 0, result
        return result.out, load_file(f"runs/vae/{name}/autoencoder/diffusion_pytorch_model.safetensors")

    return train


@pytest.mark.parametrize("kind", ["refusing", "stalling"])
def test_training_yields_the_same_weights_without_the_server(train, use_server, kind):
    _, expected = train("without-wandb", "logger=csv")
    with outage(kind) as port:
        use_server(port)
        start = time.perf_counter()
        output, weights = train(kind, "logger.mode=online", "logger.timeout_s=1")
        assert time.perf_counter() - start < 15
    (line,) = [line for line in output.splitlines() if OUTAGE in line]
    record = next(Path("runs/vae", kind, "wandb").glob("offline-run-*"))
    assert "Continuing" in line and line.endswith(f"wandb sync --include-online {record}")
    assert weights.keys() == expected.keys() and all(weights[key].equal(expected[key]) for key in expected)
    assert read_entry_types(record) >= {"history", "artifact", "exit"}


def read_entry_types(record: Path) -> set[str]:
    return {entry["type"] for entry in Record(record).entries}


def start_run(folder: Path) -> WandbRun:
    return WandbRun(folder, {}, name="vae/demo", mode="online", timeout_s=4, finish_timeout_s=1)


@pytest.mark.parametrize("logs_artifact", [True, False], ids=["artifact", "finish"])
def test_stalling_server_delays_neither_artifacts_nor_finish(use_server, tmp_path, capsys, logs_artifact):
    server = Server()
    with server.serve() as port:
        use_server(port)
        run = start_run(tmp_path)
        assert run.mode == "online" and any("upsertBucket" in query for query in server.requests)
        server.stalled.set()
        start = time.perf_counter()
        run.log({"loss": 1.0}, 10)
        if logs_artifact:
            run.timeout_s = 1
            run.log_artifact(Artifact("autoencoder", "demo", "a" * 64))
            run.log({"loss": 0.5}, 20)
        run.finish()
        assert time.perf_counter() - start < 12
    output = capsys.readouterr().out
    assert output.count(OUTAGE) == 1
    records = output.strip().split("--include-online ")[1].split()
    online, *offline = (read_entry_types(tmp_path / record) for record in records)
    assert "history" in online and len(offline) == logs_artifact
    assert all(types >= {"history", "artifact"} for types in offline)


@pytest.mark.parametrize("kind", ["refusing", "stalling"])
def test_fetch_run_times_out_without_the_server(use_server, kind, monkeypatch):
    monkeypatch.setattr(ldm.tracking.comparison, "LOOKUP_TIMEOUT_S", 1.5)
    with outage(kind) as port:
        use_server(port)
        start = time.perf_counter()
        with pytest.raises(UserError, match="me/ldm/abc is not a run folder.*W&B"):
            fetch_run("me/ldm/abc")
        assert time.perf_counter() - start < 6


def test_training_continues_if_the_wandb_process_dies(tmp_path, capsys, monkeypatch):
    run = WandbRun(tmp_path, {"a": 1}, name="vae/demo", mode="offline")

    def lose_connection(*_, **__) -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(run.run, "log", lose_connection)
    run.log({"loss": 1.0}, 10)
    run.log({"loss": 0.5}, 20)
    run.finish()
    assert run.mode == "disabled" and capsys.readouterr().out.count("(Connection lost). Continuing") == 1


def test_online_mode_without_a_key_continues_offline_without_a_prompt(use_server, tmp_path, capsys, monkeypatch):
    use_server(9)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    wandb.teardown()
    run = start_run(tmp_path)
    run.finish()
    assert run.mode == "offline" and "no API key was found" in capsys.readouterr().out
