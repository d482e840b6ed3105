"""What Prometheus reads of a server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from vitreous import __version__

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters, gauges and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter("vitreous_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "vitreous_request_seconds",
            "From the headers of a request to its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "vitreous_stage_seconds", "Parts of a prediction.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self.images = Counter("vitreous_images", "Images classified.", registry=registry)
        self.refused = Counter(
            "vitreous_refused", "Requests refused because all slots were taken.", ["queue"], registry=registry
        )
        self.in_flight = Gauge(
            "vitreous_requests_in_flight", "Requests that are being read or answered.", registry=registry
        )
        self.buffered_bytes = Gauge("vitreous_buffered_bytes", "Bytes of request bodies in memory.", registry=registry)
        self.is_ready = Gauge("vitreous_ready", "Whether the server takes requests.", registry=registry)
        self.reloads = Counter(
            "vitreous_reloads", "Times that the model was loaded again.", ["result"], registry=registry
        )
        self.model = Gauge(
            "vitreous_model_info", "The model that answers.", ["name", "engine", "version"], registry=registry
        )

    def describe_model(self, name: str, engine: str) -> None:
        """Says which model answers."""
        self.model.clear()
        self.model.labels(name, engine, __version__).set(1)

    def render(self) -> bytes:
        """Returns all of it in the text format."""
        return generate_latest(self.registry)
