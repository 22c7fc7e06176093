"""What a person sees of a run: a live panel on a terminal, plain lines when piped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from querl.cli.progress import PlainLines

if TYPE_CHECKING:
    from types import TracebackType

PHASES = ("rollout", "update", "publish", "records", "eval", "save")
BARS = " ▁▂▃▄▅▆▇█"


def spark(values: list[float], width: int = 40) -> str:
    """A line of bars for shares in [0, 1]; the last ``width`` values."""
    return "".join(BARS[round(max(0.0, min(1.0, v)) * (len(BARS) - 1))] for v in values[-width:])


def tokens_per_s(values: dict[str, float]) -> float:
    """What a step's episodes were generated at."""
    generated = values.get("rollout/generated_tokens", 0.0)
    return generated / max(values.get("time/rollout_s", 0.0), 1e-9)


def plain_line(step: int, num_steps: int, values: dict[str, float], seconds_left: float) -> str:
    """One step in one line, for logs and pipes."""
    return (
        f"step {step}/{num_steps}  reward {values.get('rollout/reward', 0.0):+.3f}"
        f"  right {values.get('rollout/right', 0.0):.3f}"
        f"  {tokens_per_s(values):,.0f} tok/s"
        f"  {values.get('time/step_s', 0.0):.1f} s"
        f"  {seconds_left:,.0f} s left"
    )


def nothing_trained(step: int, values: dict[str, float]) -> str | None:
    """One line where a step taught nothing: what its episodes were left out for, the most first."""
    if values.get("tokens/trained", 1.0) > 0:
        return None
    counts = {name: n for name, n in values.items() if name.startswith("left_out/") and n}
    ranked = sorted(counts, key=lambda name: -counts[name])
    reasons = ", ".join(f"{name.partition('/')[2]} {counts[name]:,.0f}" for name in ranked)
    return f"warning: step {step} trained nothing; left out: {reasons}"


class Progresses:
    """Follows a training run; a context manager. Uses a live panel only on a terminal."""

    def __init__(self, *, num_steps: int, console: Console | None = None) -> None:
        self._console = console or Console()
        self._num_steps = num_steps
        self._step_seconds: list[float] = []  # of this process: a resumed run has more behind it
        self._validating: PlainLines | None = None
        self._validated = ""
        self._rewards: list[float] = []
        self._accuracies: list[float] = []
        self._values: dict[str, float] = {}
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[left]}"),
            console=self._console,
        )
        self._task: TaskID = self._bar.add_task("", total=num_steps, left="")
        self._live = (
            Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        )

    def __enter__(self) -> Progresses:
        if self._live:
            self._live.start()
            self._live.update(self._render())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line above the panel."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def validating(self, done: float, total: float, what: str) -> None:
        """An episode of a validation has ended: ``done`` of ``total``."""
        if self._validating is None:
            self._validating = PlainLines(self._console, what)
        if self._live:
            self._validated = f"{done:,.0f}/{total:,.0f}"
            self._live.update(self._render())
        elif done < total:  # at its end ``evaluated`` has more to say
            self._validating.tell(done, total)

    def evaluated(self, step: int, summary: dict[str, Any]) -> None:
        """A validation: its accuracy and interval."""
        self._accuracies.append(summary["accuracy"])
        self._validating, self._validated = None, ""
        low, high = summary["accuracy_interval"]
        line = f"validation after {step} steps: {summary['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
        if summary["suite_accuracy"] is not None:
            line += f", {summary['suite_accuracy']:.1%} on the suite too"
        if self._live:
            self._live.update(self._render())
        else:
            self.say(line)

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """A finished step."""
        self._rewards.append(values.get("rollout/reward", 0.0))
        self._values = values
        if (warning := nothing_trained(step, values)) is not None:
            self.say(warning)
        # not by the clock: it has run since before the first validation
        self._step_seconds.append(values.get("time/step_s", 0.0))
        left = sum(self._step_seconds) / len(self._step_seconds) * (self._num_steps - step)
        if self._live:
            self._bar.update(self._task, completed=step, left=f"{left:,.0f} s left")
            self._live.update(self._render())
        else:
            self.say(plain_line(step, self._num_steps, values, left))

    def _render(self) -> Panel:
        values = self._values
        table = Table.grid(padding=(0, 2))
        table.add_row("reward", f"{values.get('rollout/reward', 0.0):+.3f}", spark(self._rewards))
        newest = f"{self._accuracies[-1]:.1%}" if self._accuracies else ""
        table.add_row("validation", self._validated or newest, spark(self._accuracies))
        table.add_row("tokens/s", f"{tokens_per_s(values):,.0f}", "")
        spent = {phase: values.get(f"time/{phase}_s", 0.0) for phase in PHASES}
        total = max(values.get("time/step_s", 0.0), 1e-9)
        shares = "  ".join(f"{p} {s / total:.0%}" for p, s in spent.items() if s / total > 0.005)
        table.add_row("seconds", f"{values.get('time/step_s', 0.0):.1f}", shares)
        return Panel(Group(self._bar, table), title="querl train", border_style="cyan")
