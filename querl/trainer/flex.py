"""Attention of a packed row by FlexAttention: one fused kernel over the blocks that matter.

A token is seen by a stretch of the row, from itself to the end of what follows from its segment. So
whether a block of queries meets a block of keys is told from the ends alone, block by block: the
mask of the row is never evaluated. (FlexAttention: arXiv 2412.05496; the wiring and the traps were
read off a prototype.)
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from querl.algorithm.pack import longest_path, subtree_ends

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    from torch import Tensor
    from torch.nn.attention.flex_attention import BlockMask

    from querl.algorithm.pack import Segment

    Ints = npt.NDArray[np.int64]
    Bools = npt.NDArray[np.bool_]

BLOCK = 128  # tokens; the kernel's own block size
LEAST_HEAD_WIDTH = 16  # of the kernel; only the models of tests have narrower heads
_WIDE = 256  # bytes; of wider heads FlexAttention's own tiles take up to 128 KiB
_MUCH_SHARED_MEMORY = 128 * 2**10  # bytes a block of a kernel's threads may have
# Kernels that a process may compile, by types, shapes, windows and whether gradients are wanted.
# After eight, torch would go on uncompiled, with the whole matrix of scores.
_MOST_KERNELS = 64


def has_newer_kernels(device: torch.device) -> bool:
    """Whether FlexAttention and flash attention run there: on GPUs of capability 8.0 or above.

    A T4 (7.5) has too little shared memory for the one, and no kernel of the other.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def has_small_tiles(head_bytes: int, device: torch.device) -> bool:
    """Whether FlexAttention's own tiles of heads with so many bytes a token are too large there.

    GPUs of capability 8.6, 8.9 and 12.x (3090, A10, 4090, L4, 5090) have 99 KiB of shared memory a
    block. Heads of 256 numbers, as Gemma-3's, take 112 in the backward pass; by their sizes tiles
    of 128 numbers in float32 take 128 in the forward pass.
    """
    if head_bytes <= _WIDE:
        return False
    properties: Any = torch.cuda.get_device_properties(device)  # torch types not all of them
    return bool(properties.shared_memory_per_block_optin < _MUCH_SHARED_MEMORY)


def small_tiles(item_bytes: int) -> dict[str, int]:
    """FlexAttention's options for them: tiles of 32 tokens in 16 bits, of 16 in float32.

    In the backward pass they are the fastest that fit (pytorch/pytorch#198224).
    """
    names = ("fwd_BLOCK_M", "fwd_BLOCK_N", *(f"bwd_BLOCK_{of}" for of in ("M1", "N1", "M2", "N2")))
    stages = {"fwd_num_stages": 2, "bwd_num_stages": 2}
    return dict.fromkeys(names, 64 // item_bytes) | stages


class FlexRow:
    """A row's attention on a GPU, padded to whole blocks; a mask for each window of the model."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.longest = longest_path(segments)
        self._ends, self._positions = lay_out(segments)
        self.num_padding = len(self._ends) - sum(segment.length for segment in segments)
        self._device = device
        self._masks: dict[int | None, BlockMask] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, window: int | None
    ) -> Tensor:
        """Scaled dot-product attention [1, heads, T, D] of a row, to [1, T, heads, D]."""
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        has_small = has_small_tiles(query.shape[-1] * query.element_size(), self._device)
        compiled = _in_small_tiles() if has_small else _flex_attention()
        dynamo: Any = torch._dynamo.config  # no type of it says what it holds
        with dynamo.patch(recompile_limit=_MOST_KERNELS):
            result: Tensor = compiled(
                query,
                key,
                value,
                block_mask=self._masks[window],
                scale=scale,
                enable_gqa=query.shape[1] > key.shape[1],
            )
        return result.transpose(1, 2)

    def _mask(self, window: int | None) -> BlockMask:
        from torch.nn.attention.flex_attention import BlockMask

        some, whole = block_relations(self._ends, self._positions, window)
        ends_T = torch.from_numpy(self._ends).to(self._device, torch.int32)
        positions_T = torch.from_numpy(self._positions).to(self._device, torch.int32)
        sees = _sees_back(ends_T) if window is None else _sees_window(ends_T, positions_T, window)
        mask: BlockMask = BlockMask.from_kv_blocks(
            *self._listed(some & ~whole),
            *self._listed(whole),
            BLOCK_SIZE=BLOCK,
            mask_mod=sees,
            seq_lengths=(len(self._ends), len(self._ends)),
        )
        return mask

    def _listed(self, met: Bools) -> tuple[Tensor, Tensor]:
        """How many blocks of keys each block of queries meets, and which, those first."""
        counts = torch.from_numpy(met.sum(1, dtype=np.int32))
        which = torch.from_numpy(np.argsort(~met, axis=1, kind="stable").astype(np.int32))
        return counts[None, None].to(self._device), which[None, None].to(self._device)


def lay_out(segments: Sequence[Segment]) -> tuple[Ints, Ints]:
    """Where the stretch ends that sees each token, and its position; padded to whole blocks.

    A token of the padding is seen by itself alone: a softmax over nothing has no value.
    """
    num_tokens = sum(segment.length for segment in segments)
    padded = -(-num_tokens // BLOCK) * BLOCK
    ends, positions = np.arange(1, padded + 1), np.zeros(padded, np.int64)
    lasts: list[int] = []  # the position after each segment
    for segment, end in zip(segments, subtree_ends(segments), strict=True):
        first = lasts[segment.parent] if segment.parent >= 0 else 0
        lasts.append(first + segment.length)
        place = slice(segment.start, segment.start + segment.length)
        ends[place], positions[place] = end, np.arange(first, first + segment.length)
    return ends, positions


def block_relations(ends: Ints, positions: Ints, window: int | None) -> tuple[Bools, Bools]:
    """[blocks of queries, blocks of keys]: whether any query sees any key, and whether all see all.

    With a window the first may say yes where none does, which costs time and changes nothing.
    """
    block_ends, block_positions = ends.reshape(-1, BLOCK), positions.reshape(-1, BLOCK)
    first_query = np.arange(len(block_ends))[:, None] * BLOCK
    is_before = first_query > first_query.T
    some = np.eye(len(block_ends), dtype=bool) | (is_before & (block_ends.max(1) > first_query))
    whole = is_before & (block_ends.min(1) >= first_query + BLOCK)
    if window is not None:
        lowest, highest = block_positions.min(1), block_positions.max(1)
        some &= lowest[:, None] - highest < window
        whole &= highest[:, None] - lowest < window
    return some, whole


# Mask functions must live in an imported module: Dynamo skips those of the script that runs.
def _sees_back(ends_T: Tensor) -> Callable[..., Tensor]:
    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends_T[key])

    return sees


def _sees_window(ends_T: Tensor, positions_T: Tensor, window: int) -> Callable[..., Tensor]:
    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_near = positions_T[query] - positions_T[key] < window
        return (key <= query) & (query < ends_T[key]) & is_near

    return sees


@functools.cache
def _flex_attention() -> Any:
    """FlexAttention, compiled on first use; uncompiled it would make the whole matrix of scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _in_small_tiles() -> Any:
    """The same with ``small_tiles``."""
    from torch.nn.attention.flex_attention import flex_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Any:
        # made in here: of options that come from without the compiler makes numbers that may change
        options: Any = small_tiles(query.element_size())
        return flex_attention(query, key, value, kernel_options=options, **how)

    return torch.compile(attention, dynamic=True)
