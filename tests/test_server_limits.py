"""What a server does not take on: hostile bodies, slow and greedy clients, strangers; and that it goes on answering."""

import contextlib
import io
import socket
import struct
import threading
import time
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image
from server_data import encode, make_run, running, wait_until

from vitreous.errors import ConfigError, MissingPathError, RequestError
from vitreous.server import ServerConfig
from vitreous.server.batching import Batcher
from vitreous.server.served import Answer
from vitreous.server.service import Service
from vitreous.server.uploads import Upload, read_image

PNG = encode()
TOKEN = b"a-token-of-some-length"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("server") / "insects-1")


def make_service(run, **options):
    return Service(run.path, ServerConfig(use_explain=False, **options), backend="jax")


@pytest.fixture(scope="module")
def service(run):
    options = {"max_megabytes": 0.5, "max_megapixels": 2.0, "max_images": 3, "header_seconds": 1.0}
    service = make_service(run, **options, body_seconds=1.0, deadline_seconds=2.0, num_slots=2)
    yield service
    service.close()


@pytest.fixture(scope="module")
def address(service):
    with running(service) as address:
        yield address


@pytest.fixture(autouse=True, scope="module")
def still_answers(address):
    yield
    answer = httpx.post(f"{address}/v1/predict", content=PNG, headers={"Content-Type": "image/png"})
    assert answer.status_code == 200


def post(address, data, kind="image/png", **headers):
    return httpx.post(f"{address}/v1/predict", content=data, headers={"Content-Type": kind, **headers}, timeout=30)


def connect(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_all(connection):
    """Returns all that a server sends until it closes the connection."""
    parts = []
    with connection:
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


# ----- bodies


def make_bomb(width, height):
    """Returns a PNG that claims a size, and holds a few bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def make_whole_bomb():
    """Returns a whole PNG of 400 megapixels in some 50 kB."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "png")
    return file.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("data", "kind", "status", "message"),
    [
        (b"no image", "image/png", 415, "Received: not an image in a known format"),
        (b"", "image/png", 400, "No image in the body"),
        (PNG[:-40], "image/png", 400, "Expected a whole one. Received: a truncated image"),
        (encode("jpeg", (300, 300))[:9000], "image/jpeg", 400, "Expected a whole one"),
        (make_bomb(20_000, 20_000), "image/png", 413, "Received: far more"),
        (make_bomb(9_000, 9_000), "image/png", 413, "at most 2 million. Received: 9000 × 9000"),
        (make_bomb(1_000, 1_500), "image/png", 400, "Expected a whole one"),
        (make_bomb(0, 5), "image/png", 415, "Expected an image"),
        (bytes(3_000_000), "image/png", 413, "Expected a body of at most 0.5 MB. Received: 3.0 MB"),
        (bytes(30_000_000), "image/png", 413, "Received: 30.0 MB"),
        (SVG, "image/svg+xml", 415, "Cannot read a drawing"),
        (SVG, "image/png", 415, "not an image in a known format"),
        (b"<!doctype html><script>alert(1)</script>", "text/html", 415, "Received: Content-Type='text/html'"),
        (b"<!doctype html><script>alert(1)</script>", "image/png", 415, "not an image in a known format"),
        (PNG, "", 415, "Expected Content-Type image/..."),
        (PNG, "application/json", 415, "curl --data-binary"),
        (encode("tiff"), "image/tiff", 415, "Received: tiff. Convert it, or start the server with --formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/png", 415, "not an image in a known format"),
        (b"[" * 100_000, "application/json", 415, "Expected Content-Type"),
        (PNG, "multipart/form-data", 400, "Missing boundary"),
        (PNG, "multipart/form-data; boundary=x", 400, "Cannot read the form"),
        (b"--x\r\n\r\n", "multipart/form-data; boundary=x", 400, "Cannot read the form"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400, "No image in the form"),
        (b"--x--\r\n", "multipart/form-data; boundary=" + "y" * 5000, 400, "Cannot read the form"),
    ],
)
def test_a_body_that_is_no_image_is_refused(address, data, kind, status, message):
    answer = post(address, data, kind)
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text


def test_a_whole_bomb_is_refused_without_being_decoded(address):
    start = time.perf_counter()
    assert post(address, make_whole_bomb()).status_code == 413
    assert time.perf_counter() - start < 5  # decoded, it would take 400 MB


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b.png", "a\\b.png", "..", "a\x00b.png", "a\nb.png", "\x1b[2J"])
def test_odd_file_names_are_refused(address, name):
    part = f'--x\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
    answer = post(address, part + PNG + b"\r\n--x--\r\n", "multipart/form-data; boundary=x")
    assert answer.status_code == 400
    assert "Cannot use a file name" in answer.text or "Cannot read the form" in answer.text


def test_a_form_with_too_many_images_or_an_empty_one(address):
    for count, status in ((3, 200), (4, 413)):
        files = [("image", (f"{i}.png", PNG)) for i in range(count)]
        assert httpx.post(f"{address}/v1/predict", files=files).status_code == status
    empty = httpx.post(f"{address}/v1/predict", files=[("image", ("a.png", b""))])
    assert (empty.status_code, "No image in the file a.png" in empty.text) == (400, True)
    long = httpx.post(f"{address}/v1/predict", data={"note": "x" * 9000}, files=[("image", ("a.png", PNG))])
    assert long.status_code == 400


def test_a_body_must_say_its_length_and_be_plain(address):
    chunked = httpx.post(f"{address}/v1/predict", content=iter([PNG]), headers={"Content-Type": "image/png"})
    assert (chunked.status_code, "Expected a Content-Length header" in chunked.text) == (411, True)
    packed = post(address, zlib.compress(PNG), **{"Content-Encoding": "deflate"})
    assert (packed.status_code, "Received: Content-Encoding='deflate'" in packed.text) == (415, True)
    for lengths in (
        "Content-Length: -5",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 9999999999999999999999",
    ):
        connection = connect(address)
        connection.sendall(f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n{lengths}\r\n\r\n".encode())
        assert read_all(connection).split()[1] in (b"400", b"413")


def test_every_damage_to_an_image_is_an_answer_or_a_refusal():
    """A thousand damaged files of each format: the decoder never fails in another way."""
    config = ServerConfig(max_megapixels=1.0)
    rng = np.random.default_rng(0)
    outcomes = set()
    for format in config.formats:
        whole = np.frombuffer(encode(format, (24, 16)), "uint8")
        for _ in range(200):
            data = whole.copy()
            places = rng.integers(0, len(data), rng.integers(1, 9))
            data[places] = rng.integers(0, 256, len(places))
            if rng.random() < 0.3:
                data = data[: rng.integers(1, len(data))]
            try:
                image = read_image(Upload("0", data.tobytes()), 3, config)
            except RequestError as error:
                assert error.status in (400, 413, 415)
                outcomes.add(error.status)
            else:
                assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
                assert image.shape[0] * image.shape[1] <= 1_000_000
                outcomes.add(200)
    assert outcomes == {200, 400, 413, 415}


# ----- slow and greedy clients


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"POST /v1/predict HTTP/1.1\r\nHost: loc", b"Request Timeout"),
        (
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 400\r\n\r\nabc",
            b"Received: 3 of 400 bytes",
        ),
    ],
    ids=["headers", "body"],
)
def test_200_slow_clients_do_not_stop_others(address, service, sent, message):
    connections = [connect(address) for _ in range(200)]
    for connection in connections:
        connection.sendall(sent)
    start = time.perf_counter()
    assert post(address, PNG).status_code == 200
    assert time.perf_counter() - start < 5
    assert service.slots.num_used == 0
    answer = read_all(connections[0])
    assert answer.startswith(b"HTTP/1.1 408") and message in answer
    for connection in connections[1:]:
        connection.close()


def test_endless_headers_are_refused(address):
    connection = connect(address)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
    num_sent = 0
    with contextlib.suppress(OSError):  # the server closes while the client still writes
        while num_sent < 10_000_000:
            num_sent += connection.send(b"X-More: " + b"x" * 1000 + b"\r\n")
    assert num_sent < 10_000_000
    connection.close()


def test_a_silent_connection_is_closed(address):
    assert read_all(connect(address)) == b""


def test_a_broken_request_is_400(address):
    connection = connect(address)
    connection.sendall(b"\x00\x01\x02 nonsense\r\n\r\n")
    assert b"400" in read_all(connection).split(b"\r\n")[0]


def test_beyond_the_most_connections_new_ones_are_closed(run):
    service = make_service(run, max_connections=3)
    with running(service) as address:
        connections = [connect(address) for _ in range(3)]
        time.sleep(0.2)
        assert not _answers(address)
        for connection in connections:
            connection.close()
        wait_until(lambda: _answers(address))
    service.close()


def _answers(address):
    try:
        return httpx.get(f"{address}/v2").status_code == 200
    except httpx.TransportError:
        return False


class Gate:
    """Stands for the model: an answer once the gate is opened."""

    def __init__(self):
        self.opened = threading.Event()
        self.num_begun = 0

    def __call__(self, upload):
        self.num_begun += 1
        self.opened.wait(10)
        return Answer(upload.name, [("ant", 1.0)], None, 1.0, 0.0, 0.0)


@pytest.fixture
def gate(service, monkeypatch):
    gate = Gate()
    monkeypatch.setattr(service.current.model, "predict", gate)
    yield gate
    gate.opened.set()


def test_who_finds_no_slot_is_sent_away_at_once(address, service, gate):
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(post(address, PNG).status_code)) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: service.slots.num_used == 2)
    refused = post(address, PNG)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "Expected at most 2 predictions at a time" in refused.json()["error"]
    gate.opened.set()
    for thread in threads:
        thread.join()
    assert statuses == [200, 200]
    assert 'vitreous_refused_total{queue="predict"} 1.0' in httpx.get(f"{address}/metrics").text


def test_a_late_answer_is_504_and_its_slot_is_free(address, service, gate):
    late = post(address, PNG)
    assert (late.status_code, "Expected an answer within 2 s" in late.text) == (504, True)
    wait_until(lambda: service.slots.num_used == 0)


def test_a_client_that_leaves_frees_its_slot(address, service, gate):
    connection = connect(address)
    head = (
        f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(PNG)}\r\n\r\n"
    )
    connection.sendall(head.encode() + PNG)
    wait_until(lambda: gate.num_begun == 1)
    connection.close()
    wait_until(lambda: service.slots.num_used == 0, 1.5)  # before the deadline
    wait_until(lambda: 'route="/v1/predict",status="499"' in httpx.get(f"{address}/metrics").text)


def test_bodies_in_memory_are_bounded(run):
    service = make_service(run, max_buffered_megabytes=0.001)
    with running(service) as address:
        answer = post(address, encode(size=(64, 64)))
        assert (answer.status_code, "0.001 MB of bodies at a time" in answer.text) == (503, True)
        assert httpx.get(f"{address}/v2").status_code == 200
        assert "vitreous_buffered_bytes 0.0" in httpx.get(f"{address}/metrics").text
    service.close()


# ----- strangers


@pytest.fixture(scope="module")
def guarded(service):
    with running(service, token=TOKEN) as address:
        yield address


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/metrics", "/openapi.json", "/v1/model", "/v1/examples/0", "/static/page.js", "/v2", "/no"]
)
def test_nothing_but_health_is_shown_without_the_token(guarded, path):
    answer = httpx.get(guarded + path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic realm=")
    assert httpx.get(f"{guarded}/v2/health/ready").status_code == 200


@pytest.mark.parametrize(
    "shown",
    [
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {TOKEN.decode()}x",
        f"Bearer {TOKEN.decode()[:-1]}",
        "Basic x",
        "Basic eDp5",
        f"Digest {TOKEN.decode()}",
        "Bearer \xff\xfe",
    ],
)
def test_a_wrong_token_is_401(guarded, shown):
    headers = [(b"authorization", shown.encode("latin-1")), (b"content-type", b"image/png")]
    answer = httpx.post(f"{guarded}/v1/predict", content=PNG, headers=headers)
    assert answer.status_code == 401
    assert TOKEN.decode() not in answer.text


def test_the_token_is_accepted_as_bearer_and_as_password(guarded):
    shown = {"Authorization": f"Bearer {TOKEN.decode()}"}
    assert post(guarded, PNG, **shown).status_code == 200
    assert httpx.get(f"{guarded}/v2", auth=("anyone", TOKEN.decode())).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "[::2]", "127.0.0.1.evil:80"])
def test_another_host_is_421(address, host):
    answer = httpx.get(f"{address}/v1/model", headers={"Host": host})
    assert (answer.status_code, "Wrong host" in answer.text) == (421, True)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:8000", "[::1]:5"])
def test_this_machines_names_are_accepted(address, host):
    assert httpx.get(f"{address}/v2", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://["}, {"Sec-Fetch-Site": "cross-site"}],
)
def test_pages_of_other_sites_are_refused(address, headers):
    answer = post(address, PNG, **headers)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_the_servers_own_page_and_a_link_to_it_are_not(address):
    own = {"Origin": address, "Sec-Fetch-Site": "same-origin"}
    assert post(address, PNG, **own).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert httpx.get(f"{address}/docs", headers=link).status_code == 200


# ----- configuration, batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "Expected a token, because 0.0.0.0 can be reached from other machines"),
        ({"host": "example.org"}, "Received: no token_file"),
        ({"port": 70000}, "Expected a port from 0 to 65535. Received: port=70000"),
        ({"num_slots": 0}, "Received: num_slots=0"),
        ({"num_threads": 0}, "Received: num_threads=0"),
        ({"threshold": 1.5}, "Expected a probability in [0, 1]. Received: threshold=1.5"),
        ({"formats": ("svg",)}, "Expected formats among jpeg, png"),
        ({"formats": ()}, "Expected formats among jpeg, png"),
        ({"name": "a/b"}, "Received: name='a/b'"),
        ({"body_seconds": 0.0}, "Expected body_seconds above 0"),
        ({"drain_seconds": -1.0}, "Received: drain_seconds=-1.0"),
    ],
)
def test_a_configuration_that_cannot_work(options, message):
    with pytest.raises(ConfigError) as error:
        ServerConfig(**options)
    assert message in str(error.value)


def test_a_token_is_read_from_a_file(tmp_path):
    file = tmp_path / "token"
    config = ServerConfig(host="0.0.0.0", token_file=file)
    with pytest.raises(MissingPathError, match=r"Cannot read the token\. Expected a file\."):
        config.read_token()
    file.write_text("short\n")
    with pytest.raises(ConfigError, match=r"Expected 16 or more .* Received: 5 characters"):
        config.read_token()
    file.write_bytes(TOKEN + b"\n")
    assert config.read_token() == TOKEN


def test_a_batcher_computes_together_what_came_meanwhile():
    first, sizes = threading.Event(), []

    def compute(images):
        sizes.append(len(images))
        if len(sizes) == 1:
            first.wait(10)
        if (images == 13).any():
            raise ValueError("13")
        return images.sum(axis=(1, 2, 3))

    batcher = Batcher(compute, 4)
    found = {}

    def ask(value):
        try:
            found[value] = batcher(np.full((1, 2, 2, 1), value, "int64"))[0]
        except ValueError as error:
            found[value] = str(error)

    threads = []
    for value in (1, 2, 3, 4, 5, 6):
        threads.append(threading.Thread(target=ask, args=(value,)))
        threads[-1].start()
        wait_until(lambda: sizes)
    wait_until(lambda: batcher.waiting.qsize() == 5)
    first.set()
    for thread in threads:
        thread.join(10)
    assert found == {value: 4 * value for value in (1, 2, 3, 4, 5, 6)}
    assert sizes == [1, 4, 1]
    ask(13)
    assert found[13] == "13"
    batcher.close()
    assert not batcher.thread.is_alive()
