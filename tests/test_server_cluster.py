"""The server as an application of Ray Serve, on a local Ray. VITREOUS_TEST_RAY=1 asks for it: Ray starts slowly."""

import json
import os
import subprocess
import sys

import pytest
from server_data import CLASSES, make_run

from vitreous.errors import MissingDependencyError
from vitreous.export import export_model
from vitreous.server.cluster import create_application

SCRIPT = """
import json, socket, sys
import httpx, ray
from ray import serve
from server_data import encode
from vitreous.server import ServerConfig
from vitreous.server.cluster import create_application

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
try:
    serve.start(http_options={"port": port})
    serve.run(create_application(sys.argv[1], ServerConfig(max_megabytes=0.1), num_replicas=1, num_cores=0.5))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        png = {"Content-Type": "image/png"}
        whole = client.post("/v1/predict", content=encode(), headers=png)
        found = {
            "answer": whole.json(),
            "statuses": [
                whole.status_code,
                client.get("/v2/health/ready").status_code,
                client.post("/v1/predict", content=b"no image", headers=png).status_code,
                client.post("/v1/predict", content=bytes(200_000), headers=png).status_code,
                client.get("/v1/model", headers={"Host": "evil.example"}).status_code,
            ],
        }
finally:
    serve.shutdown()
    ray.shutdown()
print(json.dumps(found))
"""


@pytest.mark.skipif(os.environ.get("VITREOUS_TEST_RAY") != "1", reason="takes long; set VITREOUS_TEST_RAY=1")
def test_a_local_ray_answers_as_the_server_does(tmp_path):
    exported = export_model(make_run(tmp_path / "insects-1"), format="onnx", out=tmp_path / "insects.onnx").path
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(exported)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["statuses"] == [200, 200, 415, 413, 421]
    assert found["answer"][0]["predictions"][0]["class"] in CLASSES


def test_without_ray_its_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"Expected the package ray\[serve\].*vitreous\[ray\]"):
        create_application(tmp_path)
