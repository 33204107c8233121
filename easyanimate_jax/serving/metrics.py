"""The figures of a server for Prometheus: jobs in each state, and how long they took."""

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric, SummaryMetricFamily

from easyanimate_jax.serving.store import Store


class Metrics:
    """Reads all figures from the queue at each call, so they survive a restart."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, store: Store):
        self.store = store
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the figures; the registry calls it."""
        jobs = GaugeMetricFamily("easyanimate_jobs", "Jobs in each state", labels=["status"])
        for status, count in self.store.counts().items():
            jobs.add_metric([status], count)
        yield jobs
        count, sampling, waiting = self.store.times()
        yield SummaryMetricFamily(
            "easyanimate_sampling_seconds",
            "Seconds of sampling of each completed job",
            count_value=count,
            sum_value=sampling,
        )
        yield SummaryMetricFamily(
            "easyanimate_waiting_seconds",
            "Seconds that each completed job waited in the queue",
            count_value=count,
            sum_value=waiting,
        )
