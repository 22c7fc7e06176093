"""Supervised training on packed token sequences: pre-training, and the warm start before RL.

A batch is a fixed number of whole sequences' tokens, cut into rows without padding. The order of an
epoch is a function of (seed, epoch), so a run that stops at a step and goes on from there sees what
it would have seen.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from querl.algorithm.logprobs import selected_logprobs
from querl.algorithm.pack import MicroBatch, Segment, make_row
from querl.errors import DataError
from querl.metrics import Metrics
from querl.trainer.attention import (
    compiled_layers,
    hidden_states,
    recomputed_activations,
    tree_attention,
)
from querl.trainer.lora import dropping_out, has_adapter
from querl.trainer.optim import AdamW, AdamWSettings
from querl.trainer.state import read_state, write_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import numpy.typing as npt
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from querl.types import Sample

    Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Many token sequences in three arrays, a few bytes a token.

    Sequence ``n`` is ``token_ids[offsets[n] : offsets[n + 1]]``; ``loss_mask`` is True where a
    token is trained. The first token of a sequence never is: nothing predicts it.
    """

    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of(cls, pairs: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Sequences:
        """From (token ids, loss mask) pairs; raises DataError where there is nothing to train."""
        ids, masks = [], []
        for token_ids, loss_mask in pairs:
            if len(token_ids) != len(loss_mask):
                raise ValueError(f"{len(token_ids)} tokens with a mask of {len(loss_mask)}")
            mask = np.array(loss_mask, np.bool_)
            mask[:1] = False
            if mask.any():
                ids.append(np.array(token_ids, np.int32))
                masks.append(mask)
        if not ids:
            raise DataError("no sequence has a token to train on: the set of traces is empty")
        offsets = np.cumsum([0, *(len(part) for part in ids)], dtype=np.int64)
        return cls(token_ids=np.concatenate(ids), loss_mask=np.concatenate(masks), offsets=offsets)

    @classmethod
    def of_samples(cls, samples: Iterable[Sample]) -> Sequences:
        """From samples; their advantages are not looked at."""
        return cls.of((sample.token_ids, sample.loss_mask) for sample in samples)

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SftSettings:
    """``epochs`` over the set in steps of about ``batch_tokens`` tokens, packed by the microbatch.

    The schedule ends with the last step: ``AdamWSettings.num_steps`` is ``SftTrainer.num_steps``.
    """

    epochs: float = 3.0
    batch_tokens: int = 32768
    tokens_per_microbatch: int = 8192
    checkpoint_activations: bool = False
    compile_layers: bool = False
    fp32_head: bool = False
    seed: int = 0


class SftTrainer:
    """Trains a model, or the adapter in it, by cross-entropy: the mean over trained tokens.

    ``model`` is trained in place. Call ``train_step`` until ``step == num_steps``; ``save`` and
    ``load`` between any two.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sequences: Sequences,
        *,
        optimizer: AdamWSettings,
        settings: SftSettings,
    ) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._sequences = sequences
        self._settings = settings
        self._batches = BatchOrder(sequences, settings.batch_tokens, settings.seed)
        self._optimizer = AdamW(model, replace(optimizer, num_steps=self.num_steps))
        self._step = 0
        self._ahead: tuple[int, list[MicroBatch]] | None = None

    @property
    def step(self) -> int:
        """How many steps have been made."""
        return self._step

    @property
    def num_steps(self) -> int:
        """How many there are in all."""
        return max(round(self._settings.epochs * self._batches.batches_per_epoch), 1)

    def train_step(self) -> Metrics:
        """One optimizer step on the next batch."""
        start = time.perf_counter()
        rows = self._take_rows()
        normaliser = sum(row.num_loss_tokens for row in rows)
        total = torch.zeros((), device=self.model.device)
        with ExitStack() as stack:
            stack.enter_context(self._optimizer.gathering())
            stack.enter_context(tree_attention(self.model))
            if self._settings.compile_layers:
                stack.enter_context(compiled_layers(self.model))
            if self._settings.checkpoint_activations:
                stack.enter_context(recomputed_activations(self.model))
            if has_adapter(self.model):
                seed = self._settings.seed * self.num_steps + self._step
                stack.enter_context(dropping_out(self.model, seed=seed))
            for row in rows:
                loss = self._loss(row.to(total.device), normaliser)
                torch.autograd.backward(loss * self._optimizer.loss_scale)
                total += loss.detach()
        # Lay out the next rows now: a GPU is still busy with these.
        self._ahead = (self._step + 1, self._rows(self._sequences, self._batches[self._step + 1]))
        report = self._optimizer.step(self._step + 1)
        self._step += 1
        metrics = Metrics()
        num_tokens = sum(row.num_tokens for row in rows)
        metrics.add_mean("sft/loss", float(total) * normaliser, normaliser)
        metrics.add_mean("optimizer/grad_norm", report.grad_norm)
        metrics.add_max("optimizer/lr", report.lr)
        metrics.add_sum("optimizer/skipped_steps", report.was_skipped)
        metrics.add_sum("tokens/forward", num_tokens)
        metrics.add_sum("tokens/trained", normaliser)
        metrics.add_mean("speed/update_tokens_per_s", num_tokens, time.perf_counter() - start)
        return metrics

    @torch.no_grad()
    def validation_loss(self, sequences: Sequences) -> float:
        """Mean negative log-likelihood, in nats a trained token, of sequences not trained on."""
        total, num_loss_tokens = 0.0, 0
        with tree_attention(self.model):
            for row in self._rows(sequences, np.arange(len(sequences))):
                total += float(self._loss(row.to(self.model.device), 1.0))
                num_loss_tokens += row.num_loss_tokens
        return total / num_loss_tokens

    def save(self, folder: Path) -> None:
        """Write ``model/`` (a plain Hugging Face folder), the optimizer and the step."""
        write_state(folder, self.model, self._tokenizer, self._optimizer, self._step)

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote. Raises CheckpointError when it is damaged."""
        self._step = read_state(folder, self.model, self._optimizer)

    def _take_rows(self) -> list[MicroBatch]:
        if self._ahead is not None and self._ahead[0] == self._step:
            return self._ahead[1]
        return self._rows(self._sequences, self._batches[self._step])

    def _rows(self, sequences: Sequences, members: Ints) -> list[MicroBatch]:
        """Members to rows; those of about equal length together, so that attention pads little."""
        lengths = np.diff(sequences.offsets)[members]
        order = np.argsort(-lengths, kind="stable")
        rows: list[list[int]] = []
        room = 0
        for n, length in zip(members[order].tolist(), lengths[order].tolist(), strict=True):
            if not rows or length > room:
                rows.append([])
                room = self._settings.tokens_per_microbatch
            rows[-1].append(n)
            room -= length
        return [_make_row(sequences, row) for row in rows]

    def _loss(self, row: MicroBatch, normaliser: float) -> Tensor:
        trained_M = row.loss_mask_T.nonzero().squeeze(1)
        hidden_M = hidden_states(self.model, row).index_select(0, row.source_T[trained_M])
        head = self.model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
        targets_M = row.token_ids_T[trained_M]
        head = head.float() if self._settings.fp32_head else head
        fused = self._settings.compile_layers
        logprobs_M, _ = selected_logprobs(hidden_M, head, targets_M, fused=fused)
        return -logprobs_M.sum() / normaliser


class BatchOrder:
    """Which sequences the batch of a step holds: each epoch a fresh permutation, cut by tokens.

    A function of (seed, step); no batch is empty, and an epoch's batches are about equal.
    """

    def __init__(self, sequences: Sequences, batch_tokens: int, seed: int) -> None:
        self._lengths = np.diff(sequences.offsets)
        self._seed = seed
        # A batch at least as long as the longest sequence, so that none is empty.
        batch_tokens = max(batch_tokens, int(self._lengths.max()))
        self.batches_per_epoch = max(int(self._lengths.sum()) // batch_tokens, 1)
        self._epoch = -1
        self._order: Ints = np.empty(0, np.int64)
        self._cuts: Ints = np.empty(0, np.int64)

    def __getitem__(self, step: int) -> Ints:
        epoch, batch = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng((self._seed, epoch))
            self._order = random.permutation(len(self._lengths))
            ends = np.cumsum(self._lengths[self._order])
            starts = ends - self._lengths[self._order]
            bounds = np.arange(self.batches_per_epoch + 1) * ends[-1] / self.batches_per_epoch
            self._cuts = np.searchsorted(starts, bounds)
            self._epoch = epoch
        return self._order[self._cuts[batch] : self._cuts[batch + 1]]


def _make_row(sequences: Sequences, members: Sequence[int]) -> MicroBatch:
    bounds = [(sequences.offsets[n], sequences.offsets[n + 1]) for n in members]
    segments, used = [], 0
    for start, end in bounds:
        segments.append(Segment(used, int(end - start)))
        used += int(end - start)
    return make_row(
        np.concatenate([sequences.token_ids[a:b] for a, b in bounds]).astype(np.int64),
        np.concatenate([sequences.loss_mask[a:b] for a, b in bounds]),
        segments,
    )
