"""Weights to another process of the same machine: a buffer that both see, filled again and again.

Its other end is ``worker/querl_vllm.py``. Memory is bounded by the buffer, and a learner's weights
may lie anywhere: those in the host's memory are copied up part by part.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from querl.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

BUFFER_BYTES = 2**30
ALIGNMENT = 256  # of a tensor's first byte: enough for every dtype, and for fast copies
SHARED_MEMORY = Path("/dev/shm")  # files in it are memory; not every system has it


class SharedBuffer:
    """Bytes that another process of this machine sees by ``address``, which is JSON."""

    def __init__(self, bytes_: Tensor, address: Mapping[str, Any]) -> None:
        self._bytes = bytes_
        self._file = Path(address["file"]) if "file" in address else None
        self.address = json.dumps(address)

    def hide(self) -> None:
        """All see it that shall: its name may go, so that no memory stays if we are killed."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def release(self) -> None:
        """Let the memory go, whoever still holds this object."""
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Put as many tensors in as there is room for, again and again.

        Each time what lies there is told as JSON, and stays there until the next is asked for.
        """
        contents: list[dict[str, Any]] = []
        end = 0
        for name, tensor in tensors:
            start = -(-end // ALIGNMENT) * ALIGNMENT
            if contents and start + tensor.nbytes > self._bytes.nbytes:
                yield self._told(contents)
                contents, start = [], 0
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            end = start + flat.nbytes
            self._bytes[start:end].copy_(flat, non_blocking=flat.is_cuda and self._bytes.is_cuda)
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape = list(tensor.shape)
            contents.append({"name": name, "dtype": dtype, "shape": shape, "start": start})
        if contents:
            yield self._told(contents)

    def _told(self, contents: Sequence[dict[str, Any]]) -> str:
        if self._bytes.is_cuda:
            torch.cuda.synchronize(self._bytes.device)  # the other process has streams of its own
        return json.dumps(contents)


def buffer_bytes(tensors: Sequence[tuple[str, Tensor]]) -> int:
    """A size for all at once, at most ``BUFFER_BYTES`` unless one tensor needs more."""
    every = [tensor.nbytes for _, tensor in tensors]
    return max(min(BUFFER_BYTES, sum(size + ALIGNMENT for size in every)), *every)


@contextmanager
def gpu_buffer(num_bytes: int, device: torch.device) -> Iterator[SharedBuffer]:
    """On a GPU, for a process that computes on the same one.

    When it closes, the other process must have let go of it: the memory is then given back.
    """
    try:
        bytes_ = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        shared = bytes_.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"no {num_bytes / 2**30:.1f} GiB of GPU memory are free to hand the weights over: "
            "set a smaller engine.memory_share"
        ) from error
    _, handle, storage_bytes, offset, counter, counter_offset, event, needs_event = shared
    address = {
        "gpu": str(torch.cuda.get_device_properties(device).uuid),
        "num_bytes": num_bytes,
        "handle": _text(handle),
        "storage_bytes": storage_bytes,
        "offset": offset,
        "counter": _text(counter),
        "counter_offset": counter_offset,
        "event": _text(event),
        "needs_event": needs_event,
    }
    buffer = SharedBuffer(bytes_, address)
    del bytes_
    try:
        yield buffer
    finally:
        buffer.release()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # an engine on the same GPU takes its cache next


@contextmanager
def host_buffer(num_bytes: int) -> Iterator[SharedBuffer]:
    """In the host's memory, for processes that compute elsewhere. Raises EngineError where full."""
    descriptor, name = tempfile.mkstemp(prefix="querl-weights-", dir=memory_folder(num_bytes))
    try:
        _reserve(descriptor, num_bytes, Path(name).parent)
        bytes_ = torch.from_file(name, shared=True, size=num_bytes, dtype=torch.uint8)
        buffer = SharedBuffer(bytes_, {"file": name, "num_bytes": num_bytes})
        del bytes_
        try:
            yield buffer
        finally:
            buffer.release()
    finally:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)


def _reserve(descriptor: int, num_bytes: int, folder: Path) -> None:
    """Make a file of that size. Raises EngineError where there is no room for it."""
    try:
        if sys.platform == "linux":
            # a mapped file without its memory would end this process where memory runs out
            os.posix_fallocate(descriptor, 0, num_bytes)
        else:
            os.ftruncate(descriptor, num_bytes)
    except OSError as error:
        raise EngineError(
            f"no {num_bytes / 2**30:.1f} GiB are free in {folder} to hand the weights over: "
            f"{error.strerror}"
        ) from error


def memory_folder(num_bytes: int) -> Path:
    """Where files are memory and so much of it is free, else where temporary files are."""
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > num_bytes
    return SHARED_MEMORY if has_room else Path(tempfile.gettempdir())


def _text(handle: bytes) -> str:
    return base64.b64encode(handle).decode()
