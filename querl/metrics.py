"""Numbers that carry their own reduction, timers, and the file they go to.

A ``Metrics`` object can be added to another: means stay means over all items, maxima stay maxima.
So microbatches, ranks and groups merge without anybody remembering how each number was made.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from querl import durable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Reduction(Protocol):
    """A number that knows how to merge with another of its kind."""

    def merge(self, other: Reduction) -> Reduction:
        """The two as one. Raises TypeError when they are of different kinds."""
        ...

    @property
    def value(self) -> float:
        """The number to report."""
        ...


@dataclass(frozen=True, slots=True)
class Mean:
    """``total / count``; nan where nothing was counted."""

    total: float
    count: float = 1.0

    def merge(self, other: Reduction) -> Mean:
        """Sums and counts add up."""
        if not isinstance(other, Mean):
            raise TypeError(f"cannot merge {other} into {self}")
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean."""
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True, slots=True)
class Max:
    """The largest value seen."""

    largest: float

    def merge(self, other: Reduction) -> Max:
        """The larger of the two."""
        if not isinstance(other, Max):
            raise TypeError(f"cannot merge {other} into {self}")
        return Max(max(self.largest, other.largest))

    @property
    def value(self) -> float:
        """The maximum."""
        return self.largest


@dataclass(frozen=True, slots=True)
class Sum:
    """A total."""

    total: float

    def merge(self, other: Reduction) -> Sum:
        """Totals add up."""
        if not isinstance(other, Sum):
            raise TypeError(f"cannot merge {other} into {self}")
        return Sum(self.total + other.total)

    @property
    def value(self) -> float:
        """The total."""
        return self.total


class Metrics:
    """Reductions. Names are ``room/what_unit``: ``time/update_s``, ``policy/clip_fraction``."""

    def __init__(self) -> None:
        self._entries: dict[str, Reduction] = {}

    def put(self, name: str, entry: Reduction) -> None:
        """Merge one reduction under a name."""
        known = self._entries.get(name)
        self._entries[name] = entry if known is None else known.merge(entry)

    def add_mean(self, name: str, total: float, count: float = 1.0) -> None:
        """Count ``count`` items that sum to ``total``."""
        self.put(name, Mean(total, count))

    def add_max(self, name: str, value: float) -> None:
        """Keep the larger."""
        self.put(name, Max(value))

    def add_sum(self, name: str, value: float) -> None:
        """Add to the total."""
        self.put(name, Sum(value))

    def add(self, other: Metrics) -> None:
        """Merge all of another's entries."""
        for name, entry in other._entries.items():
            self.put(name, entry)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to ``time/<name>_s``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_sum(f"time/{name}_s", time.perf_counter() - start)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> float:
        return self._entries[name].value

    def values(self) -> dict[str, float]:
        """All numbers, by name, in alphabetical order."""
        return {name: self._entries[name].value for name in sorted(self._entries)}


class JsonlSink:
    """One JSON object a line; each line is flushed, so that a killed run keeps what it measured."""

    DIGITS = 6  # after the point

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append ``{"step": ..., name: value}``; values that are no finite number become null."""
        finite = {
            k: (round(v, self.DIGITS) if math.isfinite(v) else None) for k, v in values.items()
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def truncate_after(self, step: int) -> None:
        """Cut off what was written after a step: a resumed run makes those lines again."""
        durable.truncate_after(self._path, step)

    def read(self) -> list[dict[str, float]]:
        """Every line, oldest first; empty where nothing was written yet."""
        return durable.read_lines(self._path)
