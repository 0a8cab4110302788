"""Means that are divided once, at the end: microbatches and processes add up exactly."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Array = Any  # a float, np.ndarray or jax.Array


class Mean(NamedTuple):
    """A mean that is not divided yet, so microbatches and hosts add up exactly.

    Source: the weighted metrics of google/tunix `tunix/sft/utils.py`.
    """

    sum: Array  # [] float32, sum of weight * value
    weight: Array  # [] float32, sum of the weights

    @property
    def value(self) -> Array:
        """`sum / weight`, and `sum` (0) at weight 0; traceable, its gradient stays finite."""
        return self.sum / (self.weight + (self.weight == 0))

    def __add__(self, other: "Mean") -> "Mean":  # pyrefly: ignore[bad-override]  # no concat
        if not isinstance(other, Mean):
            return NotImplemented
        return Mean(self.sum + other.sum, self.weight + other.weight)


def means_to_floats(metrics: Mapping[str, Mean | Array]) -> dict[str, float]:
    """Return every metric as a Python float: a Mean is divided, a scalar is taken as it is.

    Waits for the device; fetch the whole dict with one `jax.device_get` before the call. Raises
    ValueError naming the metric that is not one number.
    """
    floats = {}
    for name, metric in metrics.items():
        value = metric.value if isinstance(metric, Mean) else metric
        size = getattr(value, "size", 1)
        if size != 1:
            raise ValueError(f"metric {name!r}: got shape {value.shape}, want one number")
        floats[name] = float(value.reshape(()) if hasattr(value, "reshape") else value)
    return floats


def add_means(parts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Mean]:
    """Means of the same name added up; a process may lack some of them."""
    sums: dict[str, Mean] = {}
    for part in parts:
        for name, (total, weight) in part.items():
            sums[name] = sums.get(name, Mean(0.0, 0.0)) + Mean(total, weight)
    return sums
