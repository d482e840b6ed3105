"""TLS: a server that speaks it, a certificate that is renewed, files that do not fit."""

import datetime
import errno
import importlib
import ipaddress
import json
import signal
import socket
import ssl
import sys
import time
import types
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from server_data import CLASSES, ServerProcess, encode, make_run, wait_until

from vitreous.errors import ConfigError, MissingPathError
from vitreous.export import export_model
from vitreous.server import ServerConfig
from vitreous.server.cluster import create_application
from vitreous.server.tls import create_context, read_certificate


def make_pair(folder, name="localhost", passphrase=None):
    """Writes a certificate of its own, for this machine, and its key; returns both paths."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    places = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(places), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(exist_ok=True)
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(pem, kind, lock))
    return paths


def common_name(address, trusted):
    """Returns whose certificate a server shows; it is checked against `trusted`."""
    host, port = address.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=trusted)
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        return dict(pair[0] for pair in secure.getpeercert()["subject"])["commonName"]


def test_a_server_speaks_tls_and_takes_a_new_certificate(tmp_path):
    exported = export_model(make_run(tmp_path / "insects-1"), format="onnx", out=tmp_path / "insects.onnx").path
    cert, key = make_pair(tmp_path / "own", "first")
    token = tmp_path / "token"
    token.write_text("a-token-of-some-length\n")
    options = ("--tls-cert", cert, "--tls-key", key, "--token-file", token, "--header-seconds", 1)
    with ServerProcess(exported, tmp_path / "log", *options) as server:
        assert server.address.startswith("https://127.0.0.1:")
        host, port = server.address.removeprefix("https://").split(":")
        headers = {"Content-Type": "image/png", "Authorization": "Bearer a-token-of-some-length"}
        with httpx.Client(verify=ssl.create_default_context(cafile=cert), timeout=30) as client:
            answer = client.post(f"{server.address}/v1/predict", content=encode(), headers=headers)
            assert answer.status_code == 200 and answer.json()[0]["predictions"][0]["class"] in CLASSES
            # The page's own requests name where it comes from.
            headers["Origin"] = server.address
            assert client.post(f"{server.address}/v1/predict", content=encode(), headers=headers).status_code == 200
            assert client.get(f"{server.address}/v1/model").status_code == 401
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{host}:{port}/v2/health/live")
        with socket.create_connection((host, int(port)), timeout=10) as silent:  # no TLS, and no word
            start = time.monotonic()
            assert silent.recv(1) == b""
            assert time.monotonic() - start < 8

        def events(name):
            return [line for line in map(json.loads, server.log.read_text().splitlines()) if line["event"] == name]

        assert common_name(server.address, cert) == "first"
        assert not events("no TLS")
        new = make_pair(tmp_path / "new", "second")
        cert.write_bytes(new[0].read_bytes())  # and still the old key
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: events("certificate not read, the old one stays"))
        assert (
            "the key is that of another certificate" in events("certificate not read, the old one stays")[0]["reason"]
        )
        wait_until(lambda: len(events("reloaded")) == 1)
        key.write_bytes(new[1].read_bytes())
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: events("certificate read"))
        assert common_name(server.address, new[0]) == "second"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_without_tls_the_log_says_what_travels_in_the_clear(monkeypatch, tmp_path):
    module = importlib.import_module("vitreous.server.serve")
    token = tmp_path / "token"
    token.write_text("a-token-of-some-length\n")
    said = []
    monkeypatch.setattr(module, "start_logs", lambda: None)
    monkeypatch.setattr(module, "log", lambda event, **fields: said.append((event, fields.get("reason", ""))))
    for host, words in (("0.0.0.0", "token and images travel in the clear: pass --tls-cert"), ("127.0.0.1", None)):
        with pytest.raises(MissingPathError):  # there is no such run
            module.serve(tmp_path / "none", ServerConfig(host=host, port=0, token_file=token))
        assert [event for event, _ in said] == ["no TLS"] * (words is not None)
        assert words is None or words in said.pop()[1]


def test_files_that_cannot_be_used(call, tmp_path):
    cert, key = make_pair(tmp_path / "one")
    other = make_pair(tmp_path / "other", passphrase=b"secret")
    both = tmp_path / "both.pem"
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    assert create_context(ServerConfig(tls_cert=both)) is not None
    assert create_context(ServerConfig()) is None
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    swapped = make_pair(tmp_path / "third")[1]
    for files, reason in (
        ((cert, swapped), "the key is that of another certificate"),
        ((other[0], other[1]), "a key with a passphrase"),
        ((junk, key), "no certificate in PEM"),
        ((cert, junk), "no private key in PEM"),
        ((cert, None), "no private key in PEM"),
    ):
        with pytest.raises(ConfigError, match=rf"Cannot use the certificate. Expected PEM .*: {reason}\. Pass --tls-c"):
            create_context(ServerConfig(tls_cert=files[0], tls_key=files[1]))
    for path, kind, reason in (
        (tmp_path, ConfigError, "Is a"),
        (tmp_path / "none", MissingPathError, "No such file or"),
    ):
        with pytest.raises(kind, match=rf"Received: tls_key='.*': {reason} directory\. Check the path, and who may"):
            create_context(ServerConfig(tls_cert=cert, tls_key=path))
    code, _, error = call("serve", tmp_path, "--tls-cert", cert, "--tls-key", tmp_path / "none")
    assert code == 2 and "Cannot read the certificate. Expected a file. Received: tls_key=" in error
    code, _, error = call("serve", tmp_path, "--tls-key", key)
    assert code == 2 and "Expected the certificate that a key is for. Received: tls_key=" in error


def test_a_file_that_may_not_be_read_is_named(monkeypatch, tmp_path):
    """As in /etc/letsencrypt/live, a folder of root's own; a reload then keeps what there was."""
    cert, key = make_pair(tmp_path / "one")
    context = create_context(ServerConfig(tls_cert=cert, tls_key=key))
    read = Path.read_bytes

    def refuse(path):
        if path == key:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        ConfigError, match=r"Expected a file\. Received: tls_key='.*key.pem': Permission denied\. Check"
    ):
        read_certificate(context, ServerConfig(tls_cert=cert, tls_key=key))


def test_ray_has_a_proxy_that_speaks_to_clients(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(serve=None))
    with pytest.raises(ConfigError, match=r"Expected a configuration without a certificate, since Ray's proxy"):
        create_application(tmp_path, ServerConfig(tls_cert=tmp_path / "cert.pem"))
