"""The same server on many machines, as an application of Ray Serve: replicas that Ray starts, watches and balances.

    import ray.serve
    from vitreous.server import ServerConfig
    from vitreous.server.cluster import create_application

    ray.serve.run(create_application("/shared/runs/photos-1", ServerConfig(use_explain=False), num_replicas=4))

Ray's proxy stands in front and speaks HTTP: connections and headers are its business, everything from the Host header
on is the guard's, in every replica.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitreous.errors import ConfigError, MissingDependencyError
from vitreous.server.settings import ServerConfig

if TYPE_CHECKING:
    from ray.serve import Application


def create_application(
    path: str | Path,
    config: ServerConfig | None = None,
    *,
    num_replicas: int = 2,
    num_cores: float = 1.0,
    backend: str | None = None,
) -> "Application":
    """Creates an application for `ray.serve.run`.

    Args:
        path: A run or an export, under a path that every machine sees.
        config: Limits, of each replica; `token_file` is read on each machine. Default: `ServerConfig()`. Its host and
            port are Ray's to choose; where Ray listens on more than this machine, pass a token and `host="0.0.0.0"`.
        num_replicas: Processes that answer.
        num_cores: CPU cores that Ray sets aside for each.
        backend: Keras backend. Default: as for `Engine`.

    Raises:
        ConfigError: If the configuration has a certificate.
        MissingDependencyError: If Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingDependencyError("ray[serve]", "ray", "The application") from error
    limits = config or ServerConfig()
    if limits.tls_cert is not None:
        raise ConfigError(
            "Cannot serve on Ray. Expected a configuration without a certificate, since Ray's proxy speaks to clients. "
            f"Received: tls_cert={str(limits.tls_cert)!r}. Give it to Ray's proxy, or to one in front of it."
        )
    if limits.num_threads is None:
        limits = limits.replace(num_threads=max(1, int(num_cores)))

    def build() -> Any:
        """Loads the model; runs in each replica."""
        from vitreous.server.app import create_app
        from vitreous.server.guard import Guard
        from vitreous.server.logs import start_logs
        from vitreous.server.service import Service

        start_logs()
        service = Service(Path(path), limits, backend=backend)
        service.set_ready(True)
        return Guard(create_app(service), limits, service.metrics, limits.read_token(), lambda: service.is_ready)

    deployment = serve.deployment(
        name="vitreous",
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": num_cores},
        max_ongoing_requests=limits.num_slots + 8,  # the slots refuse sooner, with Retry-After; health needs a place
    )
    return deployment(serve.ingress(build)()).bind()
