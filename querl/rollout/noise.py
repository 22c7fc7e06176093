"""Counted random numbers: a function of a request's key and a token's position, and nothing else.

SplitMix64 (Steele, Lea and Flood, 2014) in counter form: no state to save, none shared by rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from querl.rollout.engine import RequestKey

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def stream(key: RequestKey) -> int:
    """The 64-bit start of one request's numbers."""
    state = 0
    for part in (key.seed, key.step, key.group, key.sample, key.turn):
        mixed = _mix(np.array([(state ^ (part & _MASK)) + _GAMMA & _MASK], dtype=np.uint64))
        state = int(mixed[0])
    return state


def uniforms(streams: NDArray[np.uint64], first: int, count: int) -> NDArray[np.float64]:
    """[rows, count] numbers in [0, 1) for positions ``first`` onwards."""
    positions = np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    states = streams[:, None] + positions[None, :]
    mantissas: NDArray[np.float64] = (_mix(states) >> np.uint64(11)).astype(np.float64)
    return mantissas * 2.0**-53


def seed(key: RequestKey, first: int) -> int:
    """63 bits for a sampler elsewhere that draws the tokens of a request from ``first`` on."""
    position = np.array([stream(key) + (first + 1) * _GAMMA & _MASK], dtype=np.uint64)
    return int(_mix(position)[0] >> np.uint64(1))


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
