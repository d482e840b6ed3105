"""`ServerConfig`: where a server listens, whom it answers, and how much it takes on."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from vitreous.errors import ConfigError, MissingPathError
from vitreous.spec import Record, check, check_minimum

FORMATS = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "jpeg2000", "ppm", "qoi")
"""Formats of images that a server can be told to read."""

_TOKEN = re.compile(r"[!-~]{16,}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class ServerConfig(Record):
    """Where a server listens, whom it answers, and how much it takes on.

    Args:
        host: Address to listen on. Any but this machine's own (127.0.0.1, ::1, localhost) needs `token_file`.
            Default: 127.0.0.1.
        port: TCP port; 0 for a free one, which is logged. Default: 8000.
        token_file: File with the token that requests must show, of 16 characters or more:
            `Authorization: Bearer TOKEN`, or as the password of HTTP basic authentication, which browsers ask for.
            Default: none, for this machine alone.
        tls_cert: PEM file with the server's certificate and those between it and its root: the server then speaks
            HTTPS. Default: none; beyond this machine, a proxy that does should then stand in front.
        tls_key: PEM file with its private key, without a passphrase. Default: the key is in `tls_cert` too.
        allowed_hosts: Names under which the server may be addressed (the Host header). Default: this machine's own
            where it listens on those; any name elsewhere, since a token is needed there.
        name: Name of the model in answers and addresses. Default: that of the run or the file.
        top_k: Classes named for each image, at most. Default: 5.
        threshold: Probability in [0, 1] below which an answer is not sure. Default: none; `is_sure` is then null.
        formats: Formats of images that are read: jpeg, png, webp, gif, bmp, tiff, avif, jpeg2000, ppm, qoi.
            Default: the first five.
        max_megabytes: Largest body of a request, in units of 1,000,000 bytes. Default: 10.
        max_megapixels: Largest image, in units of 1,000,000 pixels. Default: 50.
        max_images: Images in one request, at most. Default: 16.
        num_slots: Requests for predictions that wait or are computed, at most; others are answered 503 at once.
            Default: 32.
        num_explain_slots: The same for explanations, which are computed one at a time. Default: 4.
        max_connections: Open connections, at most. Default: 1000.
        max_buffered_megabytes: Bodies held in memory, all together, in units of 1,000,000 bytes. Default: 256.
        header_seconds: Time in which the headers of a request must arrive, and TLS be agreed on. Default: 5.
        body_seconds: Time in which its body must arrive. Default: 10.
        deadline_seconds: Time in which a prediction must be ready, from its slot on. Default: 10.
        explain_seconds: The same for an explanation; the first one loads and compiles the model. Default: 120.
        drain_seconds: Time between SIGTERM, when the server says that it is not ready, and the end of listening: as
            long as load balancers take to notice. Default: 1.
        use_explain: Whether explanations are answered. They need a run, and Keras. Default: True.
        examples: Folder of images, or one, to offer on the page. Default: images that the run was measured on, where
            its data are still there and no token is needed; none elsewhere.
        precision: `"fp32"` or `"bf16"`, for a run on a CPU. Default: fp32.
        num_threads: Images decoded and computed side by side. Default: one for each core that this process may use.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path = None  # type: ignore[assignment]
    tls_cert: Path = None  # type: ignore[assignment]
    tls_key: Path = None  # type: ignore[assignment]
    allowed_hosts: tuple[str, ...] = ()
    name: str = None  # type: ignore[assignment]
    top_k: int = 5
    threshold: float = None  # type: ignore[assignment]
    formats: tuple[str, ...] = FORMATS[:5]
    max_megabytes: float = 10.0
    max_megapixels: float = 50.0
    max_images: int = 16
    num_slots: int = 32
    num_explain_slots: int = 4
    max_connections: int = 1000
    max_buffered_megabytes: float = 256.0
    header_seconds: float = 5.0
    body_seconds: float = 10.0
    deadline_seconds: float = 10.0
    explain_seconds: float = 120.0
    drain_seconds: float = 1.0
    use_explain: bool = True
    examples: Path = None  # type: ignore[assignment]
    precision: str = None  # type: ignore[assignment]
    num_threads: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Checks ranges, and that nobody but this machine can ask without a token."""
        what = "Cannot serve."
        check(0 <= self.port < 65536, what, "a port from 0 to 65535", f"port={self.port}", "Pass for example 8000.")
        check_minimum(
            1,
            top_k=self.top_k,
            max_images=self.max_images,
            num_slots=self.num_slots,
            num_explain_slots=self.num_explain_slots,
            max_connections=self.max_connections,
            num_threads=1 if self.num_threads is None else self.num_threads,
        )
        for name in (
            *("max_megabytes", "max_megapixels", "max_buffered_megabytes"),
            *("header_seconds", "body_seconds", "deadline_seconds", "explain_seconds"),
        ):
            value = getattr(self, name)
            check(value > 0, what, f"{name} above 0", f"{name}={value}", "Pass a positive number.")
        check(
            self.drain_seconds >= 0,
            what,
            "drain_seconds of 0 or more",
            f"drain_seconds={self.drain_seconds}",
            "Pass 1.",
        )
        check(
            self.threshold is None or 0 <= self.threshold <= 1,
            *(what, "a probability in [0, 1]", f"threshold={self.threshold}", "Pass for example 0.8."),
        )
        unknown = [name for name in self.formats if name not in FORMATS]
        check(
            bool(self.formats) and not unknown,
            *(what, f"formats among {', '.join(FORMATS)}", f"formats={self.formats}", "Pass one or more of them."),
        )
        check(
            self.name is None or bool(_NAME.fullmatch(self.name)),
            *(what, "a name of letters, digits, '.', '_' and '-'", f"name={self.name!r}", "Pass for example photos."),
        )
        check(
            self.tls_key is None or self.tls_cert is not None,
            *(
                what,
                "the certificate that a key is for",
                f"tls_key={str(self.tls_key)!r} alone",
                "Pass --tls-cert too.",
            ),
        )
        check(
            self.token_file is not None or is_loopback(self.host),
            *(what, f"a token, because {self.host} can be reached from other machines", "no token_file"),
            "Write one (python -c 'import secrets; print(secrets.token_urlsafe())' > token) and pass --token-file "
            "token, or listen on 127.0.0.1.",
        )

    @property
    def max_bytes(self) -> int:
        """Bytes of the largest body."""
        return int(self.max_megabytes * 1e6)

    @property
    def max_pixels(self) -> int:
        """Pixels of the largest image."""
        return int(self.max_megapixels * 1e6)

    def read_token(self) -> bytes | None:
        """Returns the token; None if requests need none.

        Raises:
            MissingPathError: If the file does not exist.
            ConfigError: If it holds no token.
        """
        if self.token_file is None:
            return None
        if not self.token_file.is_file():
            raise MissingPathError(
                f"Cannot read the token. Expected a file. Received: token_file={str(self.token_file)!r}, which does "
                "not exist. Check the path."
            )
        token = self.token_file.read_text(encoding="utf-8", errors="replace").strip()
        if not _TOKEN.fullmatch(token):
            raise ConfigError(
                "Cannot use the token. Expected 16 or more letters, digits and signs, without spaces. "
                f"Received: {len(token)} characters in {self.token_file}. Write one: "
                "python -c 'import secrets; print(secrets.token_urlsafe())' > token"
            )
        return token.encode()


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
