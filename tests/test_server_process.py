"""The server as a process: signals, logs, exit codes; an export without Keras; errors before it begins."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from server_data import ServerProcess, encode, make_run, wait_until

from vitreous.export import export_model

PNG = encode()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("server") / "insects-1")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export_model(run, format="onnx", out=tmp_path_factory.mktemp("export") / "insects.onnx").path


def events(server):
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def find(server, name):
    return [event for event in events(server) if event["event"] == name]


def post(address, data=PNG):
    return httpx.post(f"{address}/v1/predict", content=data, headers={"Content-Type": "image/png"}, timeout=30)


def test_sigterm_loses_nothing_and_leaves_nobody(exported, tmp_path):
    options = ("--drain-seconds", 0.3, "--deadline-seconds", 20)
    with ServerProcess(exported, tmp_path / "log", *options) as server:
        host, port = server.address.removeprefix("http://").split(":")
        lines = [f"POST /v1/predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: {len(PNG)}"]
        head = "\r\n".join([*lines, "", ""]).encode()
        connections = [socket.create_connection((host, int(port)), timeout=20) for _ in range(16)]
        for connection in connections:
            connection.sendall(head + PNG[:-1])
        wait_until(lambda: "vitreous_requests_in_flight 17.0" in httpx.get(f"{server.address}/metrics").text)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: find(server, "stopping"))
        ready = httpx.get(f"{server.address}/v2/health/ready")  # while load balancers take notice
        assert (ready.status_code, ready.json(), ready.headers["connection"]) == (503, {"ready": False}, "close")
        assert post(server.address).status_code == 200
        wait_until(lambda: not _listens(host, int(port)))
        for connection in connections:
            connection.sendall(PNG[-1:])
        for connection in connections:
            with connection:
                answer = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))
                assert answer.startswith(b"HTTP/1.1 200 OK") and b"predictions" in answer
        assert server.process.wait(20) == 0
        assert find(server, "stopped")
        with pytest.raises(ProcessLookupError):
            os.killpg(server.process.pid, 0)


def _listens(host, port):
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_sighup_loads_anew_while_it_answers_and_a_broken_file_changes_nothing(exported, tmp_path):
    import onnx

    path = tmp_path / "model.onnx"
    path.write_bytes(exported.read_bytes())
    with ServerProcess(path, tmp_path / "log", "--deadline-seconds", 5) as server:
        stop, statuses = threading.Event(), []

        def ask():
            while not stop.is_set():
                statuses.append(post(server.address).status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        model = onnx.load(path)
        for entry in model.metadata_props:
            entry.value = entry.value.replace('"bee"', '"wasp"')
        onnx.save(model, tmp_path / "new.onnx")
        os.replace(tmp_path / "new.onnx", path)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: find(server, "reloaded"))
        assert httpx.get(f"{server.address}/v1/model").json()["classes"] == ["ant", "wasp", "cat"]
        path.write_bytes(b"broken")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: find(server, "reload failed, the model stays"))
        assert httpx.get(f"{server.address}/v1/model").json()["classes"] == ["ant", "wasp", "cat"]
        num_asked = len(statuses)
        wait_until(lambda: len(statuses) > num_asked + 1)
        stop.set()
        thread.join()
        assert set(statuses) == {200}
        metrics = httpx.get(f"{server.address}/metrics").text
        assert 'vitreous_reloads_total{result="done"} 1.0' in metrics
        assert 'vitreous_reloads_total{result="failed"} 1.0' in metrics


def test_logs_are_json_and_say_nothing_of_the_image(exported, tmp_path):
    token = tmp_path / "token"
    token.write_text("a-token-of-some-length\n")
    with ServerProcess(exported, tmp_path / "log", "--token-file", token, "--name", "bugs") as server:
        secret = {"Authorization": "Bearer a-token-of-some-length", "X-Request-Id": "r-1"}
        files = [("image", ("my-private-cat.png", PNG))]
        answer = httpx.post(f"{server.address}/v1/predict?secret=1", files=files, headers=secret)
        assert answer.status_code == 200
        assert httpx.get(f"{server.address}/v2/health/live").status_code == 200
        wait_until(lambda: find(server, "request"))
        (line,) = find(server, "request")
        assert (line["request_id"], line["route"], line["status"], line["images"]) == ("r-1", "/v1/predict", 200, 1)
        assert line["ms"] > 0 and line["infer_ms"] > 0 and line["bytes"] > len(PNG)
        assert find(server, "ready")[0]["model"] == "bugs"
        text = server.log.read_text()
        assert all(word not in text for word in ("private", "a-token", "secret"))
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0


def test_an_export_is_served_without_keras(exported):
    code = f"""
import sys
from pathlib import Path
from vitreous.server import ServerConfig
from vitreous.server.process import Process
from vitreous.server.service import Service
Process(Service(Path({str(exported)!r}), ServerConfig()))
print(sorted({{"keras", "jax", "torch", "tensorflow"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_cannot_be_served_is_said_in_a_line(call, tmp_path, exported):
    code, _, error = call("serve", tmp_path / "none")
    assert code == 2 and "Cannot load the run" in error
    code, _, error = call("serve", exported, "--host", "0.0.0.0")
    assert code == 2 and "Expected a token, because 0.0.0.0 can be reached from other machines" in error
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, error = call("serve", exported, "--port", taken.getsockname()[1])
    assert code == 2 and "Cannot listen. Expected a free port" in error and "Address already in use" in error
    code, _, error = call("serve", exported, "--host", "192.0.2.1", "--token-file", tmp_path / "none")
    assert code == 2 and "Cannot read the token. Expected a file." in error


def test_a_missing_package_is_named_with_its_extra(call, exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    code, _, error = call("serve", exported)
    assert code == 2 and "pip install 'vitreous[serve]'" in error and "prometheus_client" in error
