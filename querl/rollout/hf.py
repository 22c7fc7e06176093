"""Sampling with any Hugging Face causal model, in process: static batches, exact log-probs.

Rows of a batch are padded on the left, so that all of them write the same column of one key-value
buffer. A prompt that several rows share is computed once; a later turn starts from what its episode
has already computed. Random numbers are counted, not drawn: a row's depend on its key alone.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from querl.errors import EngineError
from querl.rollout.batching import StaticBatches
from querl.rollout.dialect import ModuleWeights
from querl.rollout.hf_batch import (
    GROWTH,
    Batch,
    Buffer,
    Kept,
    KeptPrefixes,
    different_prompts,
)
from querl.rollout.stopping import stop_strings
from querl.types import Completion, FinishReason

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

    from querl.rollout.batching import Request
    from querl.rollout.dialect import Weights
    from querl.rollout.engine import RequestKey, Sampling
    from querl.rollout.hf_batch import Prompt


class HfEngine:
    """Samples from ``model``: the learner's own, or a copy where it shall have weights of its own.

    Between batches the model is as it was found. ``end_ids`` are added to the end tokens that model
    and tokenizer name. ``reuse_bytes`` bounds what is kept of finished turns, ``prefill_tokens``
    the tokens of one prefill pass. Raises EngineError when closed, out of memory, or when logits
    are not numbers.
    """

    num_restarts = 0  # there is no server of ours that could end

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch: int = 256,
        end_ids: frozenset[int] = frozenset(),
        reuse_bytes: int = 2**31,
        prefill_tokens: int = 16384,
    ) -> None:
        self._model = model
        self._prefill_tokens = prefill_tokens
        self._version = 0
        self._kept = KeptPrefixes(reuse_bytes)
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, torch.nn.Embedding)
        self._is_end_V = np.zeros(embedding.num_embeddings, dtype=np.bool_)
        self._is_end_V[sorted(end_ids | _named_end_ids(model, tokenizer))] = True
        self._stop_strings = stop_strings(tokenizer, len(self._is_end_V))
        self._context = int(model.config.get_text_config().max_position_embeddings)
        self._kv_shape: tuple[int, int, int] | None = None
        self._batches = StaticBatches(
            self._decode, max_batch=max_batch, on_round=self._forget_the_ended
        )

    @property
    def version(self) -> int:
        """The policy step of the weights now loaded."""
        return self._version

    async def generate(
        self, prompt_ids: tuple[int, ...], sampling: Sampling, key: RequestKey
    ) -> Completion:
        """Sample one completion; the model's context bounds it as ``max_tokens`` does."""
        return await self._batches.submit(prompt_ids, sampling, key)

    def enter(self, num_episodes: int) -> None:
        """Announce live episodes: a batch waits until all of them ask."""
        self._batches.enter(num_episodes)

    def leave(self, num_episodes: int) -> None:
        """Take back ``enter``; after the last one nothing is kept of their turns."""
        self._batches.leave(num_episodes)
        if self._batches.num_live == 0:
            self._kept.clear()

    async def load_weights(self, weights: Weights, version: int) -> None:
        """Copy a module's trained weights, or, for the shared module, note that it has changed."""
        if not isinstance(weights, ModuleWeights):
            raise EngineError(f"the hf engine loads modules, and {type(weights).__name__} has none")
        async with self._batches.paused():
            if weights.module is not self._model:
                self._copy_trained(weights.module)
            self._kept.clear()
            self._version = version

    async def sleep(self) -> None:
        """Forget kept prefixes; the weights stay, since a learner may be using them."""
        self._kept.clear()

    async def wake(self) -> None:
        """Nothing has to be taken back."""

    async def close(self) -> None:
        """End what runs and free what is kept."""
        await self._batches.close()
        self._kept.clear()

    @torch.no_grad()
    def _copy_trained(self, module: torch.nn.Module) -> None:
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                self._model.get_parameter(name).copy_(weight)

    def _forget_the_ended(self, requests: Sequence[Request]) -> None:
        """Free what is kept of episodes that are not in this round: it holds all that live.

        Not when they leave, though that is sooner: queries take as long as they take, and what is
        kept, which decides the last bit of a later turn, must not depend on it.
        """
        self._kept.keep_only([request.key for request in requests])

    def _decode(self, requests: Sequence[Request]) -> None:
        """Answer one batch; runs in the decoding thread."""
        with _sampling_mode(self._model), torch.no_grad():
            try:
                roomy = self._with_room(requests)
                if roomy:
                    batch, logits_BV = self._prefill(roomy)
                    self._run(batch, logits_BV)
            except torch.OutOfMemoryError as error:
                raise EngineError("the GPU is out of memory: set a smaller max_batch") from error

    def _with_room(self, requests: Sequence[Request]) -> list[Request]:
        """Those with room for a token; the others are answered with nothing."""
        for request in requests:
            if self._limit(request) <= 0:
                request.resolve(
                    Completion(
                        token_ids=(), logprobs=(), versions=(), finish_reason=FinishReason.LENGTH
                    )
                )
        return [request for request in requests if self._limit(request) > 0]

    def _limit(self, request: Request) -> int:
        return min(request.sampling.max_tokens, self._context - len(request.prompt_ids))

    def _prefill(self, requests: Sequence[Request]) -> tuple[Batch, Tensor]:
        """Compute all prompts, each different one once; the batch and its next logits [B, V]."""
        prompts = different_prompts(requests, self._kept)
        ordered = [prompt.requests[0] for prompt in prompts]
        ordered += [request for prompt in prompts for request in prompt.requests[1:]]
        sources = [i for i, prompt in enumerate(prompts) for _ in prompt.requests[1:]]
        limits = np.array([self._limit(request) for request in ordered])
        buffer = self._new_buffer(
            len(ordered),
            width=max(len(request.prompt_ids) for request in ordered),
            room=min(int(limits.max()), GROWTH),
        )
        logits = [self._prefill_some(buffer, rows, prompts) for rows in self._cut(prompts)]
        if sources:
            buffer.copy_rows(sources, slice(len(prompts), None))
        stops = [self._stop_strings(request.sampling.stop) for request in ordered]
        batch = Batch.of(ordered, stops, buffer, limits)
        return batch, torch.cat(logits)[[*range(len(prompts)), *sources]]

    def _cut(self, prompts: Sequence[Prompt]) -> list[slice]:
        """Runs of rows to prefill together: of like length, ``prefill_tokens`` with padding."""
        cuts = [0]
        for row, prompt in enumerate(prompts):  # sorted: the newest is the longest
            is_full = (row - cuts[-1] + 1) * prompt.num_new > self._prefill_tokens
            is_longer = prompt.num_new > 2 * prompts[cuts[-1]].num_new
            if row > cuts[-1] and (is_full or is_longer):
                cuts.append(row)
        return [slice(first, end) for first, end in pairwise([*cuts, len(prompts)])]

    def _prefill_some(self, buffer: Buffer, rows: slice, prompts: Sequence[Prompt]) -> Tensor:
        """Write some rows of the buffer; their next logits [rows, V].

        All rows recompute as many tokens as the one with the most new ones, so that the new columns
        are the same for all.
        """
        some = prompts[rows]
        num_new = max(prompt.num_new for prompt in some)
        longest = max(len(prompt.ids) for prompt in some)
        ids = np.zeros((len(some), num_new), dtype=np.int64)
        for row, prompt in enumerate(some):
            new_ids = prompt.ids[-num_new:]
            ids[row, num_new - len(new_ids) :] = new_ids
            if prompt.kept and len(prompt.ids) > num_new:
                start, end = buffer.width - len(prompt.ids), buffer.width - num_new
                buffer.write_kept(rows.start + row, prompt.kept, start=start, end=end)
        starts = torch.tensor([longest - len(prompt.ids) for prompt in some])
        columns = torch.arange(longest)
        device = buffer.device
        return self._forward(
            torch.from_numpy(ids).to(device),
            mask=(columns >= starts[:, None]).long().to(device),
            positions=(columns[-num_new:] - starts[:, None]).clamp(min=0).to(device),
            cache=buffer.cache(rows, first=buffer.width - longest, filled=buffer.width - num_new),
        )

    def _forward(self, ids: Tensor, *, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def _new_buffer(self, num_rows: int, *, width: int, room: int) -> Buffer:
        embedding = self._model.get_input_embeddings().weight
        assert isinstance(embedding, torch.Tensor)
        if self._kv_shape is None:
            probe = DynamicCache()
            one = torch.zeros((1, 1), dtype=torch.long, device=embedding.device)
            self._forward(one, mask=one + 1, positions=one, cache=probe)
            layer = probe.layers[0]
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            _, heads, _, size = layer.keys.shape
            self._kv_shape = (len(probe.layers), heads, size)
        num_layers, heads, size = self._kv_shape
        shape = (2, num_rows, heads, width + room, size)
        return Buffer([embedding.new_zeros(shape) for _ in range(num_layers)], width)

    def _run(self, batch: Batch, logits_BV: Tensor) -> None:
        """Sample column after column until every row has ended."""
        while True:
            sampled_2B = batch.sample(logits_BV)
            batch.record(sampled_2B.cpu().numpy())
            for row, reason in batch.ended(self._is_end_V):
                self._answer(batch, row, batch.completion(row, reason, self._version))
            if not batch.is_alive_B.any():
                return
            ids_B = batch.compact(sampled_2B[0].long())
            mask, positions, cache = batch.next_column()
            logits_BV = self._forward(ids_B[:, None], mask=mask, positions=positions, cache=cache)

    def _answer(self, batch: Batch, row: int, completion: Completion) -> None:
        request = batch.requests[row]
        # outside announced episodes nobody says when a prefix is of no more use
        if self._batches.num_live:
            token_ids = request.prompt_ids + completion.token_ids[:-1]
            self._kept.put(request.key, Kept(token_ids, batch.states(row)))
        request.resolve(completion)


@contextmanager
def _sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """No dropout while sampling; afterwards the model trains again if it did before."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


def _named_end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The end tokens that the model's generation config and its tokenizer name."""
    named = [] if model.generation_config is None else [model.generation_config.eos_token_id]
    ends: set[int] = set()
    for end in (*named, tokenizer.eos_token_id):
        ends.update(end if isinstance(end, list) else [] if end is None else [end])
    return frozenset(ends)
