"""The values that flow through querl: frozen, slotted, and free of torch.

Axis legend, used as suffixes everywhere: ``P`` groups a step, ``G`` samples a group, ``C`` tokens
of one completion, ``L`` tokens of one sample, ``T`` tokens of one packed row, ``N`` samples packed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

SqlValue = None | int | float | str | bytes
Message = dict[str, str]  # {"role": ..., "content": ...}, as chat templates take it


class Outcome(StrEnum):
    """How one SQL execution ended. Only ``ROWS`` can ever count as right."""

    ROWS = "rows"
    REFUSED = "refused"
    SQL_ERROR = "sql_error"
    OVER_BUDGET = "over_budget"
    TOO_LARGE = "too_large"
    UNDECIDED = "undecided"  # a provable fault of the machine, never of the query


class Verdict(StrEnum):
    """What the judge says of one answer. No two failures look alike."""

    MATCH = "match"
    MISMATCH = "mismatch"
    NO_ANSWER = "no_answer"
    BAD_FORMAT = "bad_format"
    NOT_RUN = "not_run"
    GOLD_FAILED = "gold_failed"
    UNDECIDED = "undecided"


class ActionKind(StrEnum):
    """What one turn of the model asks for."""

    SQL = "sql"
    SOLUTION = "solution"
    TOOL = "tool"  # another tool of the environment, by its name
    VOID = "void"  # none of these; costs a turn and earns a correction


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # a stop string, kept in the tokens
    END = "end"  # the model's end token, kept in the tokens
    LENGTH = "length"  # the turn's token limit, or the context


class StopReason(StrEnum):
    """Why an episode ended."""

    ANSWERED = "answered"
    OUT_OF_TURNS = "out_of_turns"
    STALLED = "stalled"  # too many turns in a row brought nothing new
    TRUNCATED = "truncated"  # a turn hit `max_turn_tokens` before it acted
    CONTEXT_FULL = "context_full"  # the next turn would start beyond `max_input`
    FAILED = "failed"  # the rollout itself broke; see `Trajectory.error`


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question over one database, with what is needed to judge an answer.

    ``database`` is a file path or a server URL; ``answer`` holds the expected rows where there is
    no gold SQL; ``prompt`` holds a data set's own messages, used as they are.
    """

    id: str
    question: str
    database: str
    dialect: str = "sqlite"
    gold_sql: str | None = None
    answer: tuple[tuple[SqlValue, ...], ...] | None = None
    evidence: str = ""
    difficulty: str | None = None
    kind: str | None = None  # the generator's question family, or None
    prompt: tuple[Message, ...] | None = None
    split: str = "train"

    @property
    def db_id(self) -> str:
        """The database's short name: the stem of its file, or the last part of its URL's path.

        A server's URL may hold a password before and behind that; neither is in the name.
        """
        if "://" not in self.database:
            return Path(self.database).stem
        parts = urlsplit(self.database)
        return Path(parts.path).stem or parts.hostname or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryResult:
    """What one execution gave. ``rows`` is empty unless ``outcome`` is ``ROWS``.

    ``message`` is safe to show to a model: it holds no path. ``steps`` counts SQLite
    virtual-machine steps, or is None where a database cannot count them.
    """

    outcome: Outcome
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[SqlValue, ...], ...] = ()
    message: str = ""
    steps: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What the parser read out of one completion: SQL, or another tool's name and argument."""

    kind: ActionKind
    sql: str = ""
    tool: str = ""
    argument: str = ""
    well_formed: bool = True  # thought present, no fake observation, tags balanced
    complaint: str = ""  # why it is not well formed, in a few words


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Sampled tokens [C], their log-probabilities [C], the policy step [C] that sampled each.

    ``logprobs`` are natural logs under the distribution sampled from (temperature applied).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.logprobs) == len(self.versions):
            raise ValueError("token_ids, logprobs and versions differ in length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One model turn: what it read (``prompt_ids``), what it wrote, what came back.

    In the append-only histories ``prompt_ids`` begins with every token of the turns before it.
    """

    prompt_ids: tuple[int, ...]
    completion: Completion
    text: str  # the completion decoded, for parsing and reading only; the ids are the truth
    action: Action
    observation: str = ""
    result: QueryResult | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What happened in one episode."""

    task_id: str
    turns: tuple[Turn, ...]
    stop: StopReason
    error: str | None = None

    @property
    def solution(self) -> str | None:
        """The SQL of the final answer, or None."""
        if self.turns and self.turns[-1].action.kind is ActionKind.SOLUTION:
            return self.turns[-1].action.sql
        return None

    @property
    def seconds(self) -> float:
        """How long its turns took, generation and execution."""
        return sum(turn.seconds for turn in self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the judge made of one trajectory. ``verdict`` is that on the task's own database.

    ``suite`` holds a verdict for each suite database, where the answer was right on its own, and
    ``suite_likeness`` in [0, 1] how like the gold's its result is on the one where it is least so.
    ``reproduced`` is the share in [0, 1] of the gold's inner queries whose results the answer's
    give, where it was asked for; ``turn_steps`` [turns] is the share of them that each turn is the
    first to reproduce.
    """

    verdict: Verdict
    predicted: QueryResult | None = None
    gold: QueryResult | None = None
    suite: tuple[Verdict, ...] = ()
    suite_likeness: float | None = None
    reproduced: float | None = None
    turn_steps: tuple[float, ...] | None = None
    well_formed: bool = True

    def result_of(self, turn: Turn) -> QueryResult | None:
        """What a turn's SQL gave; of an answer's, what the judge ran."""
        is_answer = turn.action.kind is ActionKind.SOLUTION
        return self.predicted if is_answer else turn.result

    @property
    def is_right(self) -> bool:
        """A match on the task's own database that no suite database refutes."""
        return self.verdict is Verdict.MATCH and self.holds_on_suite is not False

    @property
    def holds_on_suite(self) -> bool | None:
        """Whether the answer is right on all suite databases; None where none can tell.

        One on which the gold itself fails says nothing about the answer.
        """
        told = [verdict for verdict in self.suite if verdict is not Verdict.GOLD_FAILED]
        return all(verdict is Verdict.MATCH for verdict in told) if told else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The ``G`` samples of one task, judged and rewarded. It started under policy ``step``.

    ``turn_rewards`` [G][turns] are weighted sums of ``turn_parts``, which are not weighted; both
    are empty where no turn is paid. ``turn_weight`` is the share that schedules have left.
    ``reward_parts`` [G] are what ``rewards`` are sums of, before weights.
    """

    id: int
    step: int
    task: Task
    trajectories: tuple[Trajectory, ...]
    judgements: tuple[Judgement, ...]
    rewards: tuple[float, ...]
    turn_rewards: tuple[tuple[float, ...], ...] = ()
    turn_parts: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    turn_weight: float = 1.0
    reward_parts: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One token sequence [L] to train on.

    ``loss_mask[i]`` is True where token ``i`` was sampled by the policy and is to be trained;
    ``sampled_logprobs``, ``advantages`` and ``versions`` mean something only there.
    ``num_prompt_tokens`` counts the tokens before the first that was sampled.
    """

    group_id: int
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    sampled_logprobs: tuple[float, ...]
    advantages: tuple[float, ...]
    versions: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = {
            len(x)
            for x in (
                self.token_ids,
                self.loss_mask,
                self.sampled_logprobs,
                self.advantages,
                self.versions,
            )
        }
        if len(lengths) != 1:
            raise ValueError(f"the sample's axes differ in length: {sorted(lengths)}")

    @property
    def num_loss_tokens(self) -> int:
        """How many tokens are trained."""
        return sum(self.loss_mask)
