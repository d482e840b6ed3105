"""The routes: predictions, explanations, the Open Inference Protocol, pages; what the description promises."""

import json
import re

import httpx
import numpy as np
import pytest
import schemathesis
import tritonclient.http
from browser import Browser, find_chromium
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance
from server_data import CLASSES, encode, make_run, running

from vitreous.data import decode_image, resize_image
from vitreous.evaluation import softmax
from vitreous.explanation import METHODS, load_explainer
from vitreous.model import create_predict_function
from vitreous.server import ServerConfig
from vitreous.server.app import MapMethod
from vitreous.server.served import ServedModel
from vitreous.server.service import Service
from vitreous.server.uploads import Upload

PNG = encode()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("server") / "insects-1")


@pytest.fixture(scope="module")
def service(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    (folder / "wide.png").write_bytes(encode(size=(8, 900)))
    (folder / "zebra.jpg").write_bytes(encode("jpeg"))
    config = ServerConfig(threshold=0.9, top_k=2, max_images=3, max_megabytes=1.0, examples=folder)
    service = Service(run.path, config, backend="jax")
    yield service
    service.close()


def test_images_are_resized_as_in_prediction(run):
    served = ServedModel(run.path, ServerConfig(precision="bf16", top_k=3))
    data = encode(size=(57, 40))
    answer = served.predict(Upload("", data))
    (expected,) = served.engine.predict([data])
    assert answer.predictions == list(zip(expected.classes, expected.probabilities, strict=True))[:3]
    served.engine.resize = lambda image: np.zeros((*served.engine.input_spec.image_size, 3), "uint8")
    assert served.predict(Upload("", data)).predictions != answer.predictions
    served.close()


@pytest.fixture(scope="module")
def address(service):
    with running(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def send(client, data=PNG, path="/v1/predict", **options):
    return client.post(path, content=data, headers={"Content-Type": "image/png"}, **options)


@pytest.fixture(scope="module")
def expected(run):
    """A function from encoded images to the model's probabilities."""
    infer = create_predict_function(run.load_model(), run.input_spec)
    return lambda *images: softmax(
        infer(np.stack([resize_image(decode_image(image), run.input_spec) for image in images]))
    )


def test_one_image_as_the_body(client, expected):
    answer = send(client)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    (found,) = answer.json()
    (shares,) = expected(PNG)
    order = np.argsort(-shares)[:2]
    assert [each["class"] for each in found["predictions"]] == [CLASSES[k] for k in order]
    np.testing.assert_allclose([each["probability"] for each in found["predictions"]], shares[order], atol=1e-5)
    assert found["image"] == "0" and found["labels"] is None
    assert found["confidence"] == pytest.approx(shares.max(), abs=1e-5)
    assert found["is_sure"] is bool(shares.max() >= 0.9)


def test_several_images_as_a_form_in_their_order(client, expected):
    files = {"a.png": PNG, "b c ä.jpg": encode("jpeg", seed=1), "d.webp": encode("webp", seed=2)}
    answer = client.post("/v1/predict", files=[("image", (name, data)) for name, data in files.items()])
    assert answer.status_code == 200, answer.text
    assert [each["image"] for each in answer.json()] == list(files)
    for found, shares in zip(answer.json(), expected(*files.values()), strict=True):
        assert found["predictions"][0]["class"] == CLASSES[shares.argmax()]


def test_every_default_format_is_read(client):
    for format in ServerConfig().formats:
        assert "predictions" in send(client, encode(format)).text, format


def test_the_request_id_is_the_clients_or_made_here(client):
    assert send(client).headers["x-request-id"] != send(client).headers["x-request-id"]
    given = client.get("/v2", headers={"X-Request-Id": "mine-1.2"})
    assert given.headers["x-request-id"] == "mine-1.2"
    odd = client.get("/v2", headers={"X-Request-Id": 'a" b'})
    assert len(odd.headers["x-request-id"]) == 32


def test_what_the_model_is(client, run):
    found = client.get("/v1/model").json()
    assert found["name"] == "insects-1"
    assert found["classes"] == list(CLASSES)
    assert found["input"] == run.input_spec.to_dict()
    assert found["threshold"] == 0.9 and found["temperature"] == 1.0 and not found["is_multi_label"]
    assert found["architecture"] == {
        "name": "tiny",
        "num_blocks": 2,
        "num_heads": 2,
        "projection_dim": 32,
        "patch_size": [4, 4],
        "grid_size": [4, 4],
        "num_tokens": 17,
        "prefix_tokens": ["class"],
        "num_parameters": run.load_model().count_params(),
    }
    assert found["why_no_explanations"] is None
    assert found["examples"] == [{"name": "wide.png", "class": None}, {"name": "zebra.jpg", "class": None}]


def test_examples_are_small_pngs(client):
    answer = client.get("/v1/examples/0")
    assert answer.headers["content-type"] == "image/png"
    assert decode_image(answer.content).shape == (5, 512, 3)
    assert client.get("/v1/examples/2").status_code == 404
    assert "Expected an index below 2. Received: -1" in client.get("/v1/examples/-1").json()["error"]


# ----- explanations


def test_the_methods_offered_are_those_with_a_map():
    assert set(MapMethod.__args__) == {name for name, method in METHODS.items() if method.has_map}


def test_a_map_as_numbers(client, run):
    found = send(client, path="/v1/explain?class=bee").json()
    explainer = load_explainer(run)
    own = explainer.explain(decode_image(PNG), methods=["relevance"], target="bee")[0]
    assert found["class"] == "bee" and found["method"] == "relevance"
    np.testing.assert_allclose(found["map"], own.map, atol=1e-5)


def test_all_that_the_page_shows(client, expected):
    found = send(client, path="/v1/look?classes=bee&classes=cat").json()
    assert found["model"]["classes"] == list(CLASSES) and found["model"]["num_blocks"] == 2
    assert set(found["relevance"]) == {"bee", "cat"}
    assert found["image"].startswith("data:image/png;base64,")
    assert len(found["predictions"]) == 2
    best = found["predictions"][0]
    (shares,) = expected(PNG)
    assert (best["class"], best["probability"]) == (CLASSES[shares.argmax()], pytest.approx(shares.max(), abs=1e-4))
    assert found["is_sure"] is bool(shares.max() >= 0.9)
    assert "Unknown class" in send(client, path="/v1/look?classes=dog").json()["error"]


def test_a_map_as_a_picture(client):
    answer = send(client, path="/v1/explain?method=attention&block=0&head=1&format=png")
    assert answer.headers["content-type"] == "image/png"
    height, width, _ = decode_image(answer.content).shape
    assert height == width and height >= 16


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("class=dog", "Unknown class. Received: class='dog'"),
        ("class=7", "Expected an index from 0 to 2"),
        ("block=2", "Expected an index from -2 to 1. Received: block=2"),
        ("head=9&method=attention", "Received: head=9"),
        ("method=magic", "Cannot use method. Input should be 'attention'"),
        ("block=one", "Received: block='one'"),
    ],
)
def test_a_wrong_question_is_400(client, query, message):
    answer = send(client, path=f"/v1/explain?{query}")
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_one_image_is_explained_at_a_time(client):
    answer = client.post("/v1/explain", files=[("image", ("a.png", PNG))] * 2)
    assert (answer.status_code, "Expected one. Received: 2" in answer.text) == (400, True)


def test_an_export_or_a_server_without_explanations_says_so(service, client, monkeypatch):
    monkeypatch.setattr(service.current.explanations, "run", None)
    for path in ("/v1/explain", "/v1/look"):
        answer = send(client, path=path)
        assert answer.status_code == 501
        assert "an export, which holds no layers" in answer.json()["error"]
    monkeypatch.setattr(service.current.explanations, "config", ServerConfig(use_explain=False))
    assert "switched off" in send(client, path="/v1/explain").json()["error"]
    assert "switched off" in client.get("/v1/model").json()["why_no_explanations"]


# ----- version 2


@pytest.fixture(scope="module")
def triton(address):
    client = tritonclient.http.InferenceServerClient(address.removeprefix("http://"), network_timeout=60)
    yield client
    client.close()


def test_a_triton_client_works_as_it_is(triton, run, expected):
    assert triton.is_server_live() and triton.is_server_ready() and triton.is_model_ready("insects-1")
    assert triton.is_model_ready("insects-1", "1") and not triton.is_model_ready("other")
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = triton.get_model_metadata("insects-1")
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}]
    assert [output["name"] for output in metadata["outputs"]] == ["logits", "probabilities"]
    sent = [PNG, encode(seed=3)]
    images = np.stack([resize_image(decode_image(image), run.input_spec) for image in sent])
    for is_binary in (True, False):
        tensor = tritonclient.http.InferInput("images", [2, 16, 16, 3], "UINT8")
        tensor.set_data_from_numpy(images, binary_data=is_binary)
        found = triton.infer("insects-1", [tensor], request_id="r1")
        np.testing.assert_allclose(found.as_numpy("probabilities"), expected(*sent), atol=1e-5)
        np.testing.assert_allclose(softmax(found.as_numpy("logits")), expected(*sent), atol=1e-5)
        assert found.get_response()["id"] == "r1" and found.get_response()["model_name"] == "insects-1"
    wanted = [tritonclient.http.InferRequestedOutput("probabilities", binary_data=False)]
    found = triton.infer("insects-1", [tensor], outputs=wanted).get_response()["outputs"]
    assert [output["name"] for output in found] == ["probabilities"]
    assert found[0]["shape"] == [2, 3] and len(found[0]["data"]) == 6


def infer_body(**changes):
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 16, 16, 3], "data": [7] * 768} | changes
    return json.dumps({"inputs": [tensor]}).encode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "Expected JSON"),
        (b"\xff\xfe", "Expected JSON"),
        (b"[" * 100_000, "Received: too deep a nesting"),
        (b"[]", "Expected a request as a JSON object. Received: a list"),
        (b"{}", "Expected one input, images"),
        (b'{"inputs": [1]}', "Expected an input as a JSON object"),
        (infer_body(name="x"), "Received: name='x'"),
        (infer_body(datatype="FP32"), "datatype='FP32'"),
        (infer_body(shape=[1, 3, 16, 16]), "Expected an input 'images' of UINT8, shape [B, 16, 16, 3]"),
        (infer_body(shape=[True, 16, 16, 3]), "shape=a list"),
        (infer_body(shape=[]), "shape=a list"),
        (infer_body(shape=[0, 16, 16, 3]), "shape=a list"),
        (infer_body(data=[7] * 767), "Received: 767 values"),
        (infer_body(data=[256] * 768), "Expected 768 whole numbers from 0 to 255"),
        (infer_body(data=[-1] * 768), "Expected 768 whole numbers from 0 to 255"),
        (infer_body(data=[0.5] * 768), "768 values of float64"),
        (infer_body(data=[10**30] * 768), "768 values of object"),
        (infer_body(data=[[1], [1, 2]]), "1 values of object"),
        (infer_body(data=None), "1 values of object"),
        (infer_body(parameters={"binary_data_size": 768}), "binary_data_size=768 and 0 bytes"),
        (infer_body(parameters=[]), "Expected parameters as a JSON object"),
        (infer_body()[:-1] + b', "outputs": [{"name": "x"}]}', "Expected an output among logits, probabilities"),
        (infer_body()[:-1] + b', "outputs": 5}', "Received: outputs=5"),
        (infer_body()[:-1] + b', "id": 5}', "Received: id=5"),
    ],
)
def test_a_wrong_tensor_is_400(client, body, message):
    answer = client.post("/v2/models/insects-1/infer", content=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_too_much_is_413_and_another_model_404(client):
    assert client.post("/v2/models/insects-1/infer", content=infer_body(shape=[4, 16, 16, 3])).status_code == 413
    assert client.post("/v2/models/other/infer", content=infer_body()).status_code == 404
    assert client.post("/v2/models/insects-1/versions/2/infer", content=infer_body()).status_code == 404
    for length in ("x", "99999999", "-1", "²"):
        answer = client.post(
            "/v2/models/insects-1/infer",
            content=infer_body(),
            headers=[(b"inference-header-content-length", length.encode("latin-1"))],
        )
        assert (answer.status_code, "Inference-Header-Content-Length of at most" in answer.text) == (400, True)


# ----- pages


def test_the_reference_is_ours_and_needs_no_script(client):
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/predict" in page.text and "insects-1" in page.text
    assert "<script" not in page.text and "style=" not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert client.get("/static/reference.css").headers["content-type"].startswith("text/css")


def test_the_page_and_its_parts(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    parts = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
    assert len(parts) >= 2
    for part in parts:
        assert client.get(f"/{part}").headers["content-type"].startswith(("text/css", "text/javascript"))


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
def test_the_page_works_in_a_browser(address, tmp_path):
    (tmp_path / "photo.png").write_bytes(PNG)
    with Browser(tmp_path / "profile") as browser:
        tab = browser.open(f"{address}/")
        tab.wait("document.querySelectorAll('#examples button').length == 2")
        tab.drop("#drop", tmp_path / "photo.png")
        tab.wait("!document.getElementById('walk').hidden && document.getElementById('status').hidden")
        assert tab.text("#verdict").startswith(CLASSES)
        (tmp_path / "photo.png").write_bytes(b"no image")
        tab.drop("#drop", tmp_path / "photo.png")
        tab.wait("!document.getElementById('error').hidden")
        assert "not an image in a known format" in tab.text("#error")
        assert [each for each in tab.complaints() if "415" not in each] == []
        assert [url for url in tab.requests() if not url.startswith((address, "data:", "blob:"))] == []


def test_metrics_count_what_was_asked(client):
    def count(name):
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before = count("vitreous_images_total")
    send(client)
    assert count("vitreous_images_total") == before + 1
    assert count('vitreous_requests_total{route="/v1/predict",status="200"}') > 0
    assert count('vitreous_stage_seconds_count{stage="infer"}') > 0
    assert count("process_resident_memory_bytes") > 0
    assert count('vitreous_model_info{engine="Keras on jax') == 1


@pytest.mark.parametrize("path", ["/nothing", "/static/none.js", "/static/..%2fapp.py", "/static/%2e%2e%2fapp.py"])
def test_what_is_not_there_is_404(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"].startswith(("Nothing at GET", "No such file"))


def test_another_method_is_405(client):
    assert client.put("/v1/predict", content=PNG).status_code == 405
    assert client.get("/v1/predict").status_code == 405


def test_answers_are_as_described(address):
    described = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [result.ok() for result in described.get_all_operations()]
    assert len(operations) == 14
    for operation in operations:

        @settings(
            max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy())
        def check(case):
            case.call_and_validate(excluded_checks=[positive_data_acceptance])  # bytes of any kind are no image

        check()


def test_a_bug_is_500_without_its_text(service, client, monkeypatch):
    def fail(upload):
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(service.current.model, "predict", fail)
    answer = client.post("/v1/predict", content=PNG, headers={"Content-Type": "image/png", "X-Request-Id": "bug-1"})
    assert answer.status_code == 500
    assert answer.json() == {"error": "The server failed. The log says why, at bug-1."}


def test_a_turned_photo_is_read_as_the_library_reads_it(client, expected, tmp_path):
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 60, 3)).astype("uint8"))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    data = (tmp_path / "turned.jpg").read_bytes()
    found = send(client, data).json()[0]["predictions"][0]["probability"]
    assert found == pytest.approx(float(expected(data).max()), abs=1e-5)
