"""How one kind of server is spoken to; ``http_engine.py`` does what all have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Module

    from querl.rollout.engine import Sampling
    from querl.rollout.http import Http
    from querl.types import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What a server sampled for one request [C]; it is cut short where ``finish`` is None.

    A pause cuts requests short; the engine asks for the rest when it wakes.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason | None


class Weights(Protocol):
    """What servers, which have weights of their own, load."""

    @property
    def is_adapter(self) -> bool:
        """Whether only an adapter is trained."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights by their names in a Hugging Face folder, tied ones once, adapters left out.

        On whatever device they lie; valid until the next update.
        """
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as PEFT does. Only where ``is_adapter``."""
        ...


@runtime_checkable
class ModuleWeights(Weights, Protocol):
    """What a learner publishes: weights for servers, and its module for an engine beside it."""

    @property
    def module(self) -> Module:
        """What is trained."""
        ...


class Dialect(Protocol):
    """The routes of one kind of server. All calls raise EngineError for what it refuses."""

    @property
    def name(self) -> str:
        """As ``engine.kind`` spells it, for messages."""
        ...

    def command(self, *, python: str, port: int) -> Sequence[str]:
        """The command that starts such a server on 127.0.0.1."""
        ...

    def environment(self) -> Mapping[str, str]:
        """What that command needs beside this process's own environment."""
        ...

    async def is_ready(self, http: Http) -> bool:
        """Whether it takes requests; False, or an EngineError of ``http``, while it is starting."""
        ...

    def request(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int
    ) -> tuple[str, dict[str, Any]]:
        """Route and body of one completion."""
        ...

    def piece(self, answer: Mapping[str, Any]) -> Piece:
        """What the server's answer to ``request`` says."""
        ...

    async def check_alive(self, http: Http, *, timeout_s: float) -> None:
        """Ask what computes, which answers between two batches, however many requests wait."""
        ...

    async def pause(self, http: Http) -> None:
        """Cut what runs: each open request is answered with what it has; new ones wait."""
        ...

    async def resume(self, http: Http) -> None:
        """Go on after ``pause``."""
        ...

    async def sleep(self, http: Http, *, keeps_weights: bool) -> None:
        """Give the GPU's memory back; paused. The base of an adapter is kept in host memory."""
        ...

    async def wake_weights(self, http: Http) -> None:
        """Take the weights' memory again, so that they can be loaded."""
        ...

    async def wake_cache(self, http: Http) -> None:
        """Take the memory of the key-value cache again."""
        ...

    async def load(self, http: Http, weights: Weights) -> None:
        """Load weights or adapter, and forget every cached prefix. Paused, weights awake."""
        ...
