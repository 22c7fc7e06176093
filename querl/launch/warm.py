"""The way to a first policy: a new small model, supervised training on traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from querl.data.traces import Trace, load_traces
from querl.launch.local import check_base, load_policy, make_trainable, optimizer_settings
from querl.rollout.history import encode_exchange
from querl.run import RunFolder, check_learnt_from, fingerprint
from querl.trainer.checkpoint import Checkpoints
from querl.trainer.model import ModelShape, new_model
from querl.trainer.sft import Sequences, SftSettings, SftTrainer
from querl.trainer.tokenizer import frequent_phrases, train_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from querl.config import Recipe
    from querl.metrics import Metrics
    from querl.rollout.history import History

VALIDATION_SHARE = 0.02
TOKENIZER_TEXTS = 8000  # texts beyond these change no merge that matters
NUM_PHRASES = 48
SAVES = 10  # checkpoints of a supervised run
FIXED_PHRASES = (
    *("<think>", "</think>\n", "<sql>", "</sql>", "<solution>", "</solution>"),
    *("<observation>\n", "\n</observation>", "\nfk ", "\nquestion: ", "user\n", "assistant\n"),
    *(" int pk, ", " int, ", " text, ", " real, ", " int)\n", " text)\n", " real)\n"),
    *(" rows)\n", "\n2 turns left", "\nlast turn: answer now"),
)


def make_model(
    recipe: Recipe, traces: Sequence[Trace]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random model of the recipe's ``init`` shape and a tokenizer trained on the traces."""
    stride = max(len(traces) // TOKENIZER_TEXTS, 1)
    texts = [_text(trace) for trace in traces[::stride]]
    queries = [trace.task.gold_sql or "" for trace in traces[::stride]]
    phrases = dict.fromkeys((*FIXED_PHRASES, *frequent_phrases(queries, most=NUM_PHRASES)))
    tokenizer = train_tokenizer(texts, vocab_size=recipe.init.vocab_size, phrases=list(phrases))
    shape = ModelShape(
        family="llama",
        hidden_size=recipe.init.hidden_size,
        intermediate_size=recipe.init.intermediate_size,
        num_layers=recipe.init.num_layers,
        num_heads=recipe.init.num_heads,
        num_kv_heads=recipe.init.num_kv_heads,
        max_positions=recipe.init.max_positions,
    )
    return new_model(shape, tokenizer, seed=recipe.run.seed), tokenizer


def _text(trace: Trace) -> str:
    """Everything of a trace that a tokenizer meets, in the layout of a conversation."""
    parts = [f"user\n{message['content']}\nassistant\n" for message in trace.messages]
    parts += [f"{turn.text}\nuser\n{turn.observation}\nassistant\n" for turn in trace.turns]
    return "".join(parts)


def encode_traces(traces: Iterable[Trace], history: History) -> Sequences:
    """Traces as token sequences whose loss lies on what the model should have written."""
    return Sequences.of(
        (imitation.token_ids, imitation.loss_mask)
        for trace in traces
        for imitation in encode_exchange(history, trace.messages, trace.turns)
    )


def split_by_database(traces: Sequence[Trace]) -> tuple[list[Trace], list[Trace]]:
    """(to train on, to validate on): about one database in fifty is held out, at least one."""
    databases = sorted({trace.task.database for trace in traces})
    held_out = set(databases[:: round(1 / VALIDATION_SHARE)])
    if len(databases) == 1:
        held_out = set()
    training = [trace for trace in traces if trace.task.database not in held_out]
    return training, [trace for trace in traces if trace.task.database in held_out]


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """A supervised run, checked before its folder is touched."""

    trainer: SftTrainer
    unseen: Sequences | None  # what validates, where there is more than one database
    learns_from: str
    derived: dict[str, int]


def is_warmed_up(folder: Path, path: Path) -> bool:
    """Whether a supervised run has made its last step on a file of traces, and validated it.

    For who prepares something costly before; leaves no trace. Raises ConfigError where it learnt
    from other traces, CheckpointError where the last checkpoint is damaged.
    """
    last = Checkpoints.last_of(folder)
    if last is None or last.step != last.cursor.get("num_steps"):
        return False
    if last.score is None and last.cursor["num_unseen"]:  # a kill may have come before its rating
        return False
    check_learnt_from(folder, last, read_traces(path)[1])
    return True


def read_traces(path: Path) -> tuple[list[Trace], str]:
    """The traces of a file, and their ``fingerprint``. Raises DataError for what is no trace."""
    traces = list(load_traces(path))
    return traces, fingerprint(f"{len(traces):,} traces", path.read_bytes())


def prepare_warm_up(recipe: Recipe, path: Path) -> WarmUp:
    """Load the recipe's model and a file of traces. Writes nothing.

    Raises ConfigError, DataError or ModelError for what cannot be used.
    """
    check_base(recipe)
    traces, learns_from = read_traces(path)
    policy = load_policy(recipe)
    make_trainable(recipe, policy)
    training, validation = split_by_database(traces)
    sequences = encode_traces(training, policy.history)
    own = recipe.sft.model_dump(include={"lr", "schedule", "warmup_steps"})
    trainer = SftTrainer(
        policy.model,
        policy.tokenizer,
        sequences,
        optimizer=optimizer_settings(recipe, **own),
        settings=SftSettings(
            epochs=recipe.sft.epochs,
            batch_tokens=recipe.sft.batch_tokens,
            tokens_per_microbatch=recipe.memory.tokens_per_microbatch,
            checkpoint_activations=recipe.memory.checkpoint_activations,
            compile_layers=recipe.memory.compile,
            fp32_head=recipe.memory.fp32_head,
            seed=recipe.run.seed,
        ),
    )
    return WarmUp(
        trainer=trainer,
        unseen=encode_traces(validation, policy.history) if validation else None,
        learns_from=learns_from,
        derived={
            "traces to train on": len(training),
            "traces to validate on": len(validation),
            "tokens an epoch": len(sequences.token_ids),
            "updates": trainer.num_steps,
        },
    )


def warm_up(prepared: WarmUp, run: RunFolder, on_step: Callable[[Report], None]) -> None:
    """Train on traces from the run's last checkpoint, if it has one, until Ctrl-C or the end."""
    trainer, unseen = prepared.trainer, prepared.unseen
    last = run.resume(prepared.learns_from, num_steps=trainer.num_steps)
    if last is not None:
        trainer.load(last.folder)
        if last.score is None and unseen is not None:  # a kill came between the two lines below
            run.checkpoints.rate(last, -trainer.validation_loss(unseen))
    num_unseen = 0 if unseen is None else len(unseen)
    save_every = max(trainer.num_steps // SAVES, 1)
    is_last = trainer.step == trainer.num_steps
    while not is_last:
        metrics = trainer.train_step()
        is_last = trainer.step == trainer.num_steps or run.wants_to_stop
        loss = None
        if trainer.step % save_every == 0 or is_last:
            checkpoint = run.write(trainer, num_steps=trainer.num_steps, num_unseen=num_unseen)
            if unseen is not None:
                loss = trainer.validation_loss(unseen)
                run.checkpoints.rate(checkpoint, -loss)
        on_step((trainer.step, trainer.num_steps, metrics, loss))


Report = tuple[int, int, "Metrics", float | None]  # step, steps, its numbers, validation loss
