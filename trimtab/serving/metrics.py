"""What the server counts, for Prometheus. No adapter's name is a label: ten thousand would be ten thousand series."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trimtab.serving.guard import State
from trimtab.serving.service import Answer, Service, Times

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counters of requests, and the totals of store and engine as they are when somebody asks."""

    def __init__(self, service: Service, state: State) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Totals(service, state))
        # TEI's names, so that its dashboards work.
        self._success = Counter("te_request_success", "Requests that were answered.", registry=self.registry)
        self._failure = Counter("te_request_failure", "Requests that were not.", ["err"], registry=self.registry)
        self._texts = Counter("te_request_inputs", "Texts that were answered.", registry=self.registry)
        self._tokens = Counter("te_request_tokens", "Tokens that were answered.", registry=self.registry)
        self._duration = self._histogram("te_request_duration", "Seconds from a request's body to its answer.")
        self._tokenization = self._histogram("te_request_tokenization_duration", "Seconds of making tokens.")
        self._inference = self._histogram("te_request_inference_duration", "Seconds of waiting and computing.")

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, buckets=_SECONDS, registry=self.registry)

    def answered(self, answers: Sequence[Answer], times: Times) -> None:
        """Counts a request that was answered."""
        self._success.inc()
        self._texts.inc(len(answers))
        self._tokens.inc(sum(answer.tokens for answer in answers))
        self._duration.observe(times.total)
        self._tokenization.observe(times.tokenization)
        self._inference.observe(times.queue_and_inference)

    def failed(self, kind: str) -> None:
        """Counts a request that was not, by TEI's error type."""
        self._failure.labels(err=kind).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Totals(Collector):
    def __init__(self, service: Service, state: State) -> None:
        self.service, self.state = service, state

    def collect(self) -> Iterator[Metric]:
        """The figures of this moment."""
        store, engine = self.service.store, self.service.engine
        totals, counts, computed = store.totals(), store.counts, engine.totals
        for name, what, value in (
            ("adapters_registered", "Adapters that can be asked.", totals["registered"]),
            ("adapters_resident", "Adapters in memory.", totals["resident"]),
            ("adapters_pinned", "Adapters that stay in memory.", totals["pinned"]),
            ("adapter_bytes", "Memory of adapters, of versions in use too.", totals["bytes"]),
            ("adapter_budget_bytes", "Memory that adapters may take.", store.budget_bytes),
            ("te_queue_size", "Texts that wait.", engine.backlog[0]),
            ("te_queue_tokens", "Tokens that wait.", engine.backlog[1]),
        ):
            yield GaugeMetricFamily(name, what, value=value)
        for name, what, amount in (
            ("adapter_cache_hits", "Requests that found their adapter in memory.", counts.hits),
            ("adapter_cache_misses", "Requests that waited for their adapter.", counts.misses),
            ("adapter_cache_evictions", "Adapters that made room for others.", counts.evictions),
            ("adapter_loads", "Adapters that were read.", counts.loads),
            ("adapter_load_seconds", "Seconds of reading adapters.", counts.load_seconds),
            ("te_batches", "Batches that were computed.", computed.batches),
            ("te_batch_rows", "Texts in all batches.", computed.rows),
            ("te_batch_tokens", "Tokens in all batches.", computed.tokens),
            ("te_batch_adapters", "Distinct adapters, summed over batches.", computed.adapters),
            ("te_batch_seconds", "Seconds of computing.", computed.seconds),
            ("te_batch_failures", "Batches in which something went wrong.", computed.failures),
            ("te_rows_dropped", "Texts whose caller had gone, or whose time was over.", computed.dropped),
        ):
            yield CounterMetricFamily(name, what, value=amount)
        failures = CounterMetricFamily("adapter_load_failures", "Adapters that could not be used.", labels=["code"])
        for code, times in list(counts.failures.items()):
            failures.add_metric([code], times)
        yield failures
        refused = CounterMetricFamily("guard_refusals", "Requests that came to no route.", labels=["err"])
        for kind, times in list(self.state.failures.items()):
            refused.add_metric([kind], times)
        yield refused
