"""Series of our own beside those of one of SGLang's metrics collectors.

They have its labels and its classes of gauges and counters: `prometheus_client`'s in
multiprocess mode, or what the operator has registered in their place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def make_gauge(collector: Any, name: str, text: str) -> Any:
    """Make a gauge with the collector's labels.

    Parameters
    ----------
    collector : SGLang's SchedulerMetricsCollector or TokenizerMetricsCollector.
    name : name with its prefix; once a process.
    text : what it says.

    Returns
    -------
    prometheus_client.Gauge
        The child with this process' labels: ``set(value)``.
    """
    # Imported late, as SGLang does: the library looks for PROMETHEUS_MULTIPROC_DIR.
    from prometheus_client import Gauge

    labels = collector.labels
    # Of several processes with the same labels the last one that wrote holds.
    gauge = (collector._gauge_cls or Gauge)(
        name=name,
        documentation=text,
        labelnames=list(labels),
        multiprocess_mode="mostrecent",
    )
    return gauge.labels(**labels)


def make_counters(
    collector: Any, name: str, text: str, label: str, values: Iterable[str]
) -> dict[str, Any]:
    """Make a counter for every value of a label; all of them are shown from 0 on.

    Parameters
    ----------
    collector, name, text : as for `make_gauge`.
    label, values : beside the collector's labels; empty: no label, one counter.

    Returns
    -------
    dict of str to prometheus_client.Counter
        By value, "" without a label: ``inc(amount)``.
    """
    from prometheus_client import Counter

    labels = collector.labels
    names = [*labels, label] if label else list(labels)
    make = collector._counter_cls or Counter
    counter = make(name=name, documentation=text, labelnames=names)
    if not label:
        return {"": counter.labels(**labels)}
    return {value: counter.labels(**labels, **{label: value}) for value in values}
