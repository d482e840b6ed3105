"""TLS: the server's certificate and key, read at the start and once more at each reload."""

import ssl

from vitreous.errors import ConfigError, MissingPathError
from vitreous.server.settings import ServerConfig


def create_context(config: ServerConfig) -> ssl.SSLContext | None:
    """Returns what answers TLS 1.2 and 1.3 with the server's certificate; None for a server without one.

    Raises:
        MissingPathError: If a file does not exist.
        ConfigError: If the certificate and the key cannot be read or used, or do not belong together.
    """
    if config.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    read_certificate(context, config)
    return context


def read_certificate(context: ssl.SSLContext, config: ServerConfig) -> None:
    """Reads certificate and key into a context; connections from now on see them. Errors as for `create_context`."""
    paths = {"tls_cert": config.tls_cert, "tls_key": config.tls_key or config.tls_cert}
    texts = {}
    for name, path in paths.items():
        try:
            texts[name] = path.read_bytes()
        except OSError as error:
            kind = MissingPathError if isinstance(error, FileNotFoundError) else ConfigError
            raise kind(
                f"Cannot read the certificate. Expected a file. Received: {name}={str(path)!r}: "
                f"{error.strerror or error}. Check the path, and who may read it."
            ) from error
    try:
        trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # a half of a new pair must not reach the one that answers
        for each in (trial, context):
            each.load_cert_chain(paths["tls_cert"], paths["tls_key"], password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            "Cannot use the certificate. Expected PEM files: a certificate, with those between it and its root, and "
            f"its private key without a passphrase. Received: tls_cert={str(paths['tls_cert'])!r}, "
            f"tls_key={str(paths['tls_key'])!r}: {_reason(error, texts)}. Pass --tls-cert and --tls-key of one pair."
        ) from error


def _reason(error: Exception, texts: dict[str, bytes]) -> str:
    """Returns why OpenSSL would not have these files, in words."""
    code = getattr(error, "reason", None) or ""
    if code == "KEY_VALUES_MISMATCH":
        return "the key is that of another certificate"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError):
        return error.strerror or str(error)
    if b"ENCRYPTED" in texts["tls_key"]:
        return "a key with a passphrase"
    if b"-----BEGIN CERTIFICATE-----" not in texts["tls_cert"]:
        return "no certificate in PEM"
    if b"PRIVATE KEY-----" not in texts["tls_key"]:
        return "no private key in PEM"
    return str(error)
