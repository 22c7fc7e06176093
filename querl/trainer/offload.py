"""A learner's tensors in the host's memory while an engine samples, and back for the update.

Each tensor stays the object that it was and only its data moves: tied weights stay tied, 4-bit
weights find their tables, the optimizer its moments, compiled layers what they were compiled for.
"""

from __future__ import annotations

import mmap
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# Below it a call to pin costs more than pinned memory saves.
LEAST_PINNED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Movable:
    """A tensor that an update needs on its device; ``changes`` where an update may write to it."""

    tensor: Tensor
    changes: bool = True


class Offload(Protocol):
    """Where a learner's tensors are while it sleeps."""

    def sleep(self, movables: Iterable[Movable]) -> None:
        """Give back what memory of the device they take; asleep already, nothing happens."""
        ...

    def wake(self) -> None:
        """Bring them back as they were; awake already, nothing happens."""
        ...


class NoOffload:
    """Implements ``Offload`` where they stay."""

    def sleep(self, movables: Iterable[Movable]) -> None:  # noqa: ARG002
        """They stay; what else an update took, and torch kept, is given back."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """They are there."""


class HostOffload:
    """Implements ``Offload`` by the host's memory, for tensors on ``device``.

    Asleep they can be read, from the CPU. The host's copies are kept: what never changes travels
    down once, and memory is pinned once, as many bytes as the tensors have on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: dict[tuple[int, ...], _Block] = {}
        self._is_asleep = False

    @torch.no_grad()
    def sleep(self, movables: Iterable[Movable]) -> None:
        """Copy what may have changed since the last time, and free the device's memory."""
        if self._is_asleep:
            return
        # anew each time: moments are made late, and a loaded checkpoint brings others
        blocks = {}
        for members in _by_storage(m for m in movables if m.tensor.device == self._device):
            key = tuple(id(member.tensor) for member in members)
            blocks[key] = self._blocks.get(key) or _Block(members)
        self._blocks = blocks
        for block in blocks.values():
            block.leave()
        self._settle()
        self._is_asleep = True

    @torch.no_grad()
    def wake(self) -> None:
        """Into new memory of the device."""
        if not self._is_asleep:
            return
        for block in self._blocks.values():
            block.come_back(self._device)
        self._settle()
        self._is_asleep = False

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the copies ran beside this thread
            # what another process saw, and has let go of
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


class _Block:
    """One storage, its bytes on the host, and the tensors that lie in it."""

    def __init__(self, members: Sequence[Movable]) -> None:
        self._tensors = [member.tensor for member in members]
        self._offsets = [tensor.storage_offset() for tensor in self._tensors]
        self._changes = any(member.changes for member in members)
        first = self._tensors[0]
        self._host = pinned_bytes(first.untyped_storage().nbytes(), first.device)
        self._is_copied = False

    def leave(self) -> None:
        if self._changes or not self._is_copied:
            self._host.copy_(_bytes_of(self._tensors[0]), non_blocking=True)
            self._is_copied = True
        self._put_into(self._host)

    def come_back(self, device: torch.device) -> None:
        self._put_into(
            torch.empty_like(self._host, device=device).copy_(self._host, non_blocking=True)
        )

    def _put_into(self, block: Tensor) -> None:
        storage = block.untyped_storage()
        for tensor, offset in zip(self._tensors, self._offsets, strict=True):
            empty = torch.empty(0, dtype=tensor.dtype, device=block.device)
            tensor.data = empty.set_(storage, offset, tensor.size(), tensor.stride())


def tensors_of(model: torch.nn.Module) -> Iterator[Movable]:
    """A model's weights, the tables of those in 4 bits, and its buffers."""
    for weight in model.parameters():
        yield Movable(weight, changes=weight.requires_grad)
        state = vars(weight).get("quant_state")  # bitsandbytes' own, of a weight in 4 bits
        if state is not None:
            nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            yield from (
                Movable(table, changes=False) for table in (state.absmax, state.code, *nested)
            )
    yield from map(Movable, model.buffers())


def pinned_bytes(num_bytes: int, device: torch.device) -> Tensor:
    """Memory of the host [num_bytes] that a GPU copies to and from at full speed.

    It is registered, not torch's own pinned memory, which comes in powers of two.
    """
    if device.type != "cuda" or num_bytes < LEAST_PINNED_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    # whole pages of its own, since a page can be registered only once
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(runtime.cudaHostRegister(buffer.data_ptr(), num_bytes, 0))
    release = weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
    release.atexit = False  # the process' end releases it anyway
    return buffer


def _by_storage(movables: Iterable[Movable]) -> list[list[Movable]]:
    """Each tensor once, those that share a storage together; empty ones are left out."""
    groups: dict[int, dict[int, Movable]] = {}
    for movable in movables:
        storage = movable.tensor.untyped_storage()
        if storage.nbytes():
            groups.setdefault(storage.data_ptr(), {})[id(movable.tensor)] = movable
    return [list(group.values()) for group in groups.values()]


def _bytes_of(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
