"""Log-probabilities of chosen tokens that never hold [tokens, vocabulary] for all tokens.

The head runs in chunks, forward and again backward; only hidden states, targets and one number a
token are kept between the two.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# below some hundred rows a matrix product no longer fills a device
MIN_CHUNK_TOKENS = 512


def selected_logprobs(
    hidden_M: Tensor,
    head_weight: Tensor,
    target_ids_M: Tensor,
    *,
    temperature: float = 1.0,
    chunk_elements: int = 2**25,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs [M] of the targets and entropies [M], natural logs, float32; both differentiable.

    ``hidden_M`` [M, d] holds the trained positions only, ``head_weight`` [V, d]. Logits come out of
    the product in float32 whatever its inputs are (pass both in float32 for a float32 head); so
    does the sum of the head's gradient. Chunks are of about ``chunk_elements`` logits. ``fused``
    compiles what is done to a chunk: worth its minute on a GPU. A frozen head's gradient is not
    made: with an adapter below it, that is a third of the arithmetic and two float32 heads.
    """
    chunk_tokens = max(chunk_elements // head_weight.shape[0], MIN_CHUNK_TOKENS)
    # A head in another dtype than the hidden states is a choice of the caller; autograd casts back.
    hidden_M = hidden_M.to(head_weight.dtype)
    result: tuple[Tensor, Tensor] = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_M, head_weight, target_ids_M, temperature, chunk_tokens, fused
    )
    return result


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_M: Tensor,
        head_weight: Tensor,
        target_ids_M: Tensor,
        temperature: float,
        chunk_tokens: int,
        fused: bool,
    ) -> tuple[Tensor, Tensor]:
        read = _compiled(read_logits) if fused else read_logits
        num_tokens = hidden_M.shape[0]
        logprobs_M = torch.empty(num_tokens, device=hidden_M.device)
        entropies_M, normalisers_M = torch.empty_like(logprobs_M), torch.empty_like(logprobs_M)
        for first in range(0, num_tokens, chunk_tokens):
            part = slice(first, first + chunk_tokens)
            logits = float32_product(hidden_M[part], head_weight.T)
            logprobs_M[part], entropies_M[part], normalisers_M[part] = read(
                logits, target_ids_M[part], 1 / temperature
            )
            del logits  # before the next chunk's: nothing in an update is larger
        ctx.save_for_backward(hidden_M, head_weight, target_ids_M, normalisers_M, entropies_M)
        ctx.temperature, ctx.chunk_tokens, ctx.fused = temperature, chunk_tokens, fused
        # so that entropies that nothing hangs on, which is the rule, cost nothing
        ctx.set_materialize_grads(False)
        return logprobs_M, entropies_M

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_M: Tensor | None, grad_entropy_M: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_M, head_weight, target_ids_M, normalisers_M, entropies_M = ctx.saved_tensors
        differentiate = _compiled(logit_gradients) if ctx.fused else logit_gradients
        by_entropy = _compiled(entropy_gradients) if ctx.fused else entropy_gradients
        scale = 1 / ctx.temperature
        grad_M = torch.zeros_like(normalisers_M) if grad_M is None else grad_M
        grad_hidden_M = torch.empty_like(hidden_M)
        grad_weight: Tensor | None = None
        if ctx.needs_input_grad[1]:
            # float32, since many chunks add up in it
            grad_weight = torch.zeros_like(head_weight, dtype=torch.float32)
        for first in range(0, hidden_M.shape[0], ctx.chunk_tokens):
            part = slice(first, first + ctx.chunk_tokens)
            logits = float32_product(hidden_M[part], head_weight.T)
            found = differentiate(
                logits, normalisers_M[part], target_ids_M[part], grad_M[part], scale
            )
            if grad_entropy_M is not None:
                found = found + by_entropy(
                    logits, normalisers_M[part], entropies_M[part], grad_entropy_M[part], scale
                )
            grad_logits = found.to(head_weight.dtype)
            del logits, found  # as above, and before the next summand of the head's gradient
            grad_hidden_M[part] = grad_logits @ head_weight
            if grad_weight is not None:
                grad_weight += float32_product(grad_logits.T, hidden_M[part])
            del grad_logits
        if grad_weight is not None:
            grad_weight = grad_weight.to(head_weight.dtype)
        return grad_hidden_M, grad_weight, None, None, None, None


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product in float32: products of halves are exact in it, so nothing is rounded."""
    if left.device.type == "cuda" and left.dtype in (torch.bfloat16, torch.float16):
        product: Tensor = torch.mm(left, right, out_dtype=torch.float32)
        return product
    return left.float() @ right.float()


def read_logits(
    logits: Tensor, target_ids_M: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and normalisers [M] of logits [M, V] times ``scale``."""
    logits = logits * scale
    normalisers_M = logits.logsumexp(-1)
    chosen_M = logits.gather(-1, target_ids_M[:, None]).squeeze(-1)
    # not normaliser - sum(p * logit): where one token is all but sure, nothing would be left of it
    log_softmax = logits - normalisers_M[:, None]
    entropies_M = -log_softmax.exp().mul_(log_softmax).sum(-1)
    return chosen_M - normalisers_M, entropies_M, normalisers_M


def logit_gradients(
    logits: Tensor, normalisers_M: Tensor, target_ids_M: Tensor, grad_M: Tensor, scale: float
) -> Tensor:
    """What logits [M, V] get of a gradient [M] of log-probs: (1 at the target, less p) of it."""
    probabilities = (logits * scale - normalisers_M[:, None]).exp()
    is_target = torch.arange(logits.shape[1], device=logits.device) == target_ids_M[:, None]
    return (is_target.float() - probabilities) * (grad_M * scale)[:, None]


def entropy_gradients(
    logits: Tensor, normalisers_M: Tensor, entropies_M: Tensor, grad_M: Tensor, scale: float
) -> Tensor:
    """What logits [M, V] get of a gradient [M] of entropies: -p (log p + H) of it."""
    log_softmax = logits * scale - normalisers_M[:, None]
    slopes = log_softmax.exp() * (log_softmax + entropies_M[:, None])
    return -slopes * (grad_M * scale)[:, None]


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
