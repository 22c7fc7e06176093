"""The tensors of one static batch: its key-value buffer, its rows, and how a column is sampled.

Axes: ``B`` rows, ``V`` vocabulary. Row ``i`` of the buffer holds its tokens in the columns from
``starts_B[i]`` on, so that the newest token of every row stands in the same column.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from querl.errors import EngineError
from querl.rollout.noise import stream, uniforms
from querl.types import Completion, FinishReason

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from querl.rollout.batching import Request
    from querl.rollout.engine import RequestKey
    from querl.rollout.stopping import StopStrings

GROWTH = 128  # columns that a buffer gains at a time
UNIFORMS_AHEAD = 64  # positions whose random numbers go to the device together
COMPACT_AT = 8  # rows move together once one in so many has ended


class _BufferLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of a cache that writes into a buffer; its base would copy all it has each time."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keys, self._values = keys, values
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        first, self._length = self._length, self._length + key_states.shape[-2]
        self._keys[:, :, first : self._length] = key_states
        self._values[:, :, first : self._length] = value_states
        return self._keys[:, :, : self._length], self._values[:, :, : self._length]

    def get_seq_length(self, *_: object) -> int:
        return self._length


@dataclass(slots=True)
class Buffer:
    """Each layer's keys and values [2, B, heads, columns, head size], ``width`` columns filled.

    What no token has written is zero: attention multiplies it by zero, and NaN would survive that.
    Layers lie apart, so that whatever copies them holds no more than one of them twice.
    """

    layers: list[Tensor]
    width: int

    @property
    def num_columns(self) -> int:
        """Filled ones and those that there is room for."""
        return self.layers[0].shape[-2]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.layers[0].device

    def cache(self, rows: slice, *, first: int, filled: int) -> Cache:
        """A cache over some rows from column ``first`` on, that goes on at column ``filled``."""
        return Cache(
            layers=[
                _BufferLayer(keys[rows, :, first:], values[rows, :, first:], filled - first)
                for keys, values in self.layers
            ]
        )

    def write_kept(self, row: int, kept: Kept, *, start: int, end: int) -> None:
        """Copy what was kept into the columns from ``start`` to ``end``."""
        for layer, states in zip(self.layers, kept.states, strict=True):
            layer[:, row, :, start:end] = states[:, :, : end - start]

    def copy_rows(self, sources: Sequence[int], rows: slice) -> None:
        """Fill some rows with what others hold."""
        for layer in self.layers:
            layer[:, rows, :, : self.width] = layer[:, sources, :, : self.width]

    def grow(self) -> None:
        """Make room for more columns."""
        for number, layer in enumerate(self.layers):
            *shape, columns, size = layer.shape
            self.layers[number] = layer.new_zeros((*shape, columns + GROWTH, size))
            self.layers[number][..., :columns, :] = layer


@dataclass(frozen=True, slots=True)
class Kept:
    """Each layer's keys and values [2, heads, tokens, head size] of an episode's tokens so far."""

    token_ids: tuple[int, ...]
    states: Sequence[Tensor]

    @property
    def num_bytes(self) -> int:
        """What they take; views of a buffer, once they are copied."""
        return sum(layer.nbytes for layer in self.states)


class KeptPrefixes:
    """What finished turns have computed, one entry an episode, within a budget in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = self._max_bytes = max_bytes
        self._kept: dict[RequestKey, Kept] = {}

    def put(self, key: RequestKey, seen: Kept) -> None:
        """Keep a copy, unless the budget is spent."""
        if seen.num_bytes <= self._free_bytes:
            self._free_bytes -= seen.num_bytes
            copies = [layer.clone() for layer in seen.states]
            self._kept[replace(key, turn=0)] = replace(seen, states=copies)

    def take(self, key: RequestKey, prompt_ids: tuple[int, ...]) -> Kept | None:
        """Hand over what this prompt begins with, if anything; it is kept no longer."""
        kept = self._drop(replace(key, turn=0))
        if kept is None:
            return None
        num_kept = len(kept.token_ids)
        fits = num_kept < len(prompt_ids) and prompt_ids[:num_kept] == kept.token_ids
        return kept if fits else None

    def keep_only(self, keys: Iterable[RequestKey]) -> None:
        """Forget all episodes but those of these keys."""
        for episode in self._kept.keys() - {replace(key, turn=0) for key in keys}:
            self._drop(episode)

    def _drop(self, episode: RequestKey) -> Kept | None:
        kept = self._kept.pop(episode, None)
        if kept is not None:
            self._free_bytes += kept.num_bytes
        return kept

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._free_bytes = self._max_bytes


@dataclass(slots=True)
class Prompt:
    """A prompt, what is already computed of it, and all that asked for it."""

    ids: tuple[int, ...]
    kept: Kept | None
    requests: list[Request]

    @property
    def num_new(self) -> int:
        """Tokens still to compute."""
        return len(self.ids) - (len(self.kept.token_ids) if self.kept else 0)


def different_prompts(requests: Sequence[Request], kept: KeptPrefixes) -> list[Prompt]:
    """Each different prompt once, those with the fewest new tokens first."""
    prompts: dict[tuple[int, ...], Prompt] = {}
    for request in requests:
        ids = request.prompt_ids
        found = kept.take(request.key, ids)
        prompt = prompts.setdefault(ids, Prompt(ids, found, []))
        prompt.kept = prompt.kept or found
        prompt.requests.append(request)
    return sorted(prompts.values(), key=lambda prompt: (prompt.num_new, len(prompt.ids)))


@dataclass(slots=True, kw_only=True)
class Batch:
    """Rows that decode in step. Arrays on the host, but for what sampling needs on the device."""

    requests: list[Request]
    stops: list[StopStrings]
    buffer: Buffer
    starts_B: NDArray[np.int64]
    limits_B: NDArray[np.int64]
    streams_B: NDArray[np.uint64]
    is_alive_B: NDArray[np.bool_]
    tokens_BC: NDArray[np.int64]
    logprobs_BC: NDArray[np.float64]
    temperature_B1: Tensor  # 1 where greedy
    is_greedy_B: Tensor
    top_p_B1: Tensor
    cuts_tail: bool  # whether any row has top_p < 1
    mask_BS: Tensor = field(init=False)
    uniforms_BU: Tensor = field(init=False)
    num_sampled: int = 0

    def __post_init__(self) -> None:
        self._remake_mask()

    @classmethod
    def of(
        cls,
        requests: list[Request],
        stops: list[StopStrings],
        buffer: Buffer,
        limits_B: NDArray[np.int64],
    ) -> Batch:
        """A batch whose prompts are in the buffer and which has sampled nothing."""
        samplings = [request.sampling for request in requests]
        device = buffer.device
        temperature = torch.tensor([s.temperature or 1.0 for s in samplings], device=device)
        top_p = torch.tensor([s.top_p for s in samplings], device=device)
        shape = (len(requests), int(limits_B.max()))
        lengths = np.array([len(request.prompt_ids) for request in requests])
        return cls(
            requests=requests,
            stops=stops,
            buffer=buffer,
            starts_B=buffer.width - lengths,
            limits_B=limits_B,
            streams_B=np.array([stream(request.key) for request in requests], dtype=np.uint64),
            is_alive_B=np.ones(len(requests), dtype=np.bool_),
            tokens_BC=np.zeros(shape, dtype=np.int64),
            logprobs_BC=np.zeros(shape, dtype=np.float64),
            temperature_B1=temperature[:, None],
            is_greedy_B=torch.tensor([s.temperature == 0 for s in samplings], device=device),
            top_p_B1=top_p[:, None],
            cuts_tail=any(s.top_p < 1 for s in samplings),
        )

    def sample(self, logits_BV: Tensor) -> Tensor:
        """One token a row and its log-probability: [2, B] float64, so that one copy brings both."""
        offset = self.num_sampled % UNIFORMS_AHEAD
        if offset == 0:
            ahead = uniforms(self.streams_B, self.num_sampled, UNIFORMS_AHEAD)
            self.uniforms_BU = torch.from_numpy(ahead).to(logits_BV.device)
        logprobs_BV = (logits_BV.float() / self.temperature_B1).log_softmax(-1)
        if self.cuts_tail:
            logprobs_BV = _nucleus(logprobs_BV, self.top_p_B1)
        drawn_B = _draw(logprobs_BV, self.uniforms_BU[:, offset])
        ids_B = torch.where(self.is_greedy_B, logprobs_BV.argmax(-1), drawn_B)
        chosen_B = logprobs_BV.gather(1, ids_B[:, None])[:, 0]
        return torch.stack([ids_B.double(), chosen_B.double()])

    def record(self, sampled_2B: NDArray[np.float64]) -> None:
        """Note a sampled column. Raises EngineError when a log-probability is no number."""
        if not np.isfinite(sampled_2B[1][self.is_alive_B]).all():
            row = int(np.flatnonzero(self.is_alive_B & ~np.isfinite(sampled_2B[1]))[0])
            raise EngineError(
                f"the model's logits are not numbers, for {self.requests[row].key}: "
                "the weights may have diverged, set a smaller learning rate"
            )
        self.tokens_BC[:, self.num_sampled] = sampled_2B[0]
        self.logprobs_BC[:, self.num_sampled] = sampled_2B[1]
        self.num_sampled += 1

    def ended(self, is_end_V: NDArray[np.bool_]) -> list[tuple[int, FinishReason]]:
        """The rows that the newest token ends, and why; they are alive no longer."""
        newest_B = self.tokens_BC[:, self.num_sampled - 1]
        is_end_B = is_end_V[newest_B]
        is_full_B = self.limits_B == self.num_sampled
        may_stop_B = np.fromiter(
            (stop.can_end[token] for stop, token in zip(self.stops, newest_B, strict=True)),
            dtype=np.bool_,
            count=len(self.stops),
        )
        ended = []
        suspects = np.flatnonzero(self.is_alive_B & (is_end_B | is_full_B | may_stop_B))
        for row in suspects.tolist():
            if is_end_B[row]:
                ended.append((row, FinishReason.END))
            elif may_stop_B[row] and self.stops[row].is_complete(self.said(row)):
                ended.append((row, FinishReason.STOP))
            elif is_full_B[row]:
                ended.append((row, FinishReason.LENGTH))
        self.is_alive_B[[row for row, _ in ended]] = False
        self.is_alive_B &= [not request.is_cancelled for request in self.requests]
        return ended

    def said(self, row: int) -> list[int]:
        """The tokens that a row has sampled."""
        said: list[int] = self.tokens_BC[row, : self.num_sampled].tolist()
        return said

    def completion(self, row: int, reason: FinishReason, version: int) -> Completion:
        """What a row has sampled."""
        return Completion(
            token_ids=tuple(self.said(row)),
            logprobs=tuple(self.logprobs_BC[row, : self.num_sampled].tolist()),
            versions=(version,) * self.num_sampled,
            finish_reason=reason,
        )

    def states(self, row: int) -> list[Tensor]:
        """The keys and values of a row, of all its tokens but the newest, still unread."""
        start = int(self.starts_B[row])
        return [layer[:, row, :, start : self.buffer.width] for layer in self.buffer.layers]

    def compact(self, ids_B: Tensor) -> Tensor:
        """Move living rows together once enough have ended; the newest ids of those that stay."""
        num_rows, num_alive = len(self.requests), int(self.is_alive_B.sum())
        if (num_rows - num_alive) * COMPACT_AT < num_rows:
            return ids_B
        order = np.arange(num_alive)
        holes = np.flatnonzero(~self.is_alive_B[:num_alive])
        order[holes] = movers = num_alive + np.flatnonzero(self.is_alive_B[num_alive:])
        for number, layer in enumerate(self.buffer.layers):
            layer[:, holes] = layer[:, movers]
            self.buffer.layers[number] = layer[:, :num_alive]
        self.requests = [self.requests[row] for row in order]
        self.stops = [self.stops[row] for row in order]
        self.starts_B, self.limits_B = self.starts_B[order], self.limits_B[order]
        self.streams_B, self.is_alive_B = self.streams_B[order], self.is_alive_B[order]
        self.tokens_BC, self.logprobs_BC = self.tokens_BC[order], self.logprobs_BC[order]
        self.temperature_B1, self.top_p_B1 = self.temperature_B1[order], self.top_p_B1[order]
        self.is_greedy_B, self.uniforms_BU = self.is_greedy_B[order], self.uniforms_BU[order]
        self._remake_mask()
        return ids_B[order]

    def next_column(self) -> tuple[Tensor, Tensor, Cache]:
        """Mask [B, columns], positions [B, 1] and cache with which the newest tokens are read."""
        width = self.buffer.width
        if width == self.buffer.num_columns:
            self.buffer.grow()
            self._remake_mask()
        positions_B = torch.from_numpy(width - self.starts_B).to(self.mask_BS.device)
        cache = self.buffer.cache(slice(None), first=0, filled=width)
        self.buffer.width += 1
        return self.mask_BS[:, : width + 1], positions_B[:, None], cache

    def _remake_mask(self) -> None:
        device = self.buffer.device
        columns = torch.arange(self.buffer.num_columns, device=device)
        starts_B = torch.from_numpy(self.starts_B).to(device)
        self.mask_BS = (columns >= starts_B[:, None]).long()


def _draw(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Inverse-CDF sampling [B]; summed in float64, or a large vocabulary's tail would be lost."""
    cdf_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
    # a hair under 1, so that rounding cannot step past the last token of any weight
    targets_B1 = uniforms_B[:, None].clamp(max=1 - 1e-12) * cdf_BV[:, -1:]
    drawn_B: Tensor = torch.searchsorted(cdf_BV, targets_B1, right=True)[:, 0]
    return drawn_B.clamp(max=logprobs_BV.shape[-1] - 1)


def _nucleus(logprobs_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    """The fewest likeliest tokens that reach ``top_p``, renormalised (Holtzman et al., 2020)."""
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
    is_cut_BV = torch.empty_like(before_BV, dtype=torch.bool)
    is_cut_BV.scatter_(1, order_BV, (before_BV >= top_p_B1) & (top_p_B1 < 1))
    kept_BV = logprobs_BV.masked_fill(is_cut_BV, -torch.inf)
    return torch.where(top_p_B1 < 1, kept_BV.log_softmax(-1), logprobs_BV)
