"""What ``stats`` counts, for Prometheus. Needs the extra ``metrics``; nothing else in serving imports this module.

    import minilm_exact, minilm_bf16
    from prometheus_client import REGISTRY
    from dks.dispatch.metrics import Collector

    REGISTRY.register(Collector(minilm_exact, minilm_bf16))

A call costs the same with and without it: everything is read when somebody asks, in the asking thread, and a sink
that blocks or fails holds up nobody else. Every label's values are bounded: by the operators, the outcomes of
``reasons`` and the table's own candidates; any other name is ``other``. Many workers: see ``metrics_shared``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Thread
from types import ModuleType
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector as BaseCollector

from dks.dispatch import metrics_shared
from dks.dispatch.metrics_read import FAMILIES, Family, Labels, read
from dks.dispatch.runtime import Runtime


class Collector(BaseCollector):
    """Reads the tables of one or several packages, one label ``table`` each.

    With ``PROMETHEUS_MULTIPROC_DIR`` set it reads those of all workers, and from when it is made this process
    writes its own there: make one in each worker.

    Args:
        packages: generated packages, or their runtimes.

    Raises:
        TypeError: something else, or none.
        ValueError: two of one name.
    """

    def __init__(self, *packages: ModuleType | Runtime) -> None:
        if not packages:
            raise TypeError("Collector: found no package, expected at least one, such as Collector(minilm_exact)")
        runtimes = [_runtime(package) for package in packages]
        self._runtimes = {runtime.name: runtime for runtime in runtimes}
        if len(self._runtimes) < len(packages):
            names = ", ".join(runtime.name for runtime in runtimes)
            raise ValueError(f"Collector: found {names}, expected each package once")
        self._is_shared = metrics_shared.wanted()
        if self._is_shared:
            metrics_shared.share(runtimes)

    def describe(self) -> list[Metric]:
        """The names alone, so that a registry reads no table to learn them, and refuses a second collector."""
        return [_metric(family, ()) for family in FAMILIES]

    def collect(self) -> Iterator[Metric]:
        """The numbers as they are now; of other workers as they were within the last second."""
        values = (metrics_shared.read_all if self._is_shared else read)(self._runtimes.values())
        for family in FAMILIES:
            yield _metric(family, values[family].items())


def serve_metrics(*packages: ModuleType | Runtime, port: int, addr: str = "127.0.0.1") -> tuple[WSGIServer, Thread]:
    """Answer scrapes of these packages on ``http://ADDR:PORT/metrics``, from a thread of its own.

    Args: as those of ``Collector``.
        port: 0 takes a free one; the server's ``server_port`` says which.
        addr: who may ask; ``0.0.0.0`` is everybody who reaches this machine.

    Returns:
        The server and its thread; ``server.shutdown()`` ends both.

    Raises:
        OSError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(Collector(*packages))
    return start_http_server(port, addr, registry)


def _runtime(package: object) -> Runtime:
    found = getattr(package, "_runtime", package)
    if not isinstance(found, Runtime):
        raise TypeError(f"Collector: found {package!r}, expected a package that dks-codegen generated")
    return found


def _metric(family: Family, values: Iterable[tuple[Labels, float]]) -> Metric:
    metric = Metric(family.name, family.text, family.kind)
    for labels, value in values:
        metric.add_sample(family.sample, dict(zip(family.labels, labels, strict=True)), value)
    return metric
