"""Where an engine's server comes from: a process that we start, or a URL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from querl.errors import EngineError
from querl.rollout import keeper
from querl.rollout.http import NO_ENTRY, Overdue, Refused, ServerGone

if TYPE_CHECKING:
    from collections.abc import Mapping

    from querl.rollout.dialect import Dialect
    from querl.rollout.http import Http

POLL_S = 0.1
END_S = 10.0  # for a server to end by itself, and for the system to take its memory back
OTHER_FILES = 512  # than connections: databases, records, the model
LINES_SHOWN = 12  # of a log, when a server failed
BYTES_READ = 2**16  # of its end: it may have grown for days


class Server(Protocol):
    """A place that answers at ``url``, once ``launch`` was called and it is ready."""

    @property
    def url(self) -> str:
        """Where it answers; another one after each launch."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """What it wants to be told with each request."""
        ...

    @property
    def start_timeout_s(self) -> float:
        """How long it may take from being waited for until it is ready."""
        ...

    def launch(self) -> None:
        """Begin to start it, and return at once. Nothing happens where it has been launched."""
        ...

    def has_ended(self) -> bool:
        """Whether it is known to answer no more."""
        ...

    def note(self, text: str) -> None:
        """Write into its log, where that is ours."""
        ...

    def last_words(self) -> str:
        """What it said last, or where that is found, for messages."""
        ...

    async def kill(self) -> None:
        """End it at once, so that it can be launched anew."""
        ...

    async def close(self) -> None:
        """End it in peace."""
        ...


class RemoteServer:
    """A server elsewhere: it is neither started nor ended, only waited for."""

    def __init__(
        self, url: str, *, start_timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> None:
        self.url = url
        self.start_timeout_s = start_timeout_s
        self.headers = headers or {}

    def launch(self) -> None:
        """Whoever runs it has done so."""

    def has_ended(self) -> bool:
        """It may always come back."""
        return False

    def note(self, text: str) -> None:
        """Its log is elsewhere."""

    def last_words(self) -> str:
        """Where to look."""
        return f"the log of {self.url} is where it runs"

    async def kill(self) -> None:
        """Not ours to end."""

    async def close(self) -> None:
        """Not ours to end."""


class ServerProcess:
    """A child process on 127.0.0.1 with a session of its own, what it says in the file ``log``.

    It ends with all its children when this process does, even by SIGKILL: ``keeper.py`` sees to it.
    The log of one that never failed is removed when it is closed.
    """

    def __init__(
        self, dialect: Dialect, *, python: str, log: Path, start_timeout_s: float = 300.0
    ) -> None:
        self._dialect = dialect
        self._python = python
        self._log = log
        self.start_timeout_s = start_timeout_s
        self.headers: Mapping[str, str] = {}
        self._port = 0
        self._held: socket.socket | None = None  # bound to it: the system gives it to no other
        self._process: subprocess.Popen[bytes] | None = None
        self._has_failed = False

    @property
    def url(self) -> str:
        """Where it answers; another port after each launch."""
        return f"http://127.0.0.1:{self._port}"

    def launch(self) -> None:
        """Begin to start it, and return at once. Nothing happens where it has been launched."""
        if self._process is not None:
            return
        self._let_go_of_port()
        self._held = _hold_port()
        self._port = self._held.getsockname()[1]
        if sys.platform != "linux":
            self._let_go_of_port()  # elsewhere the server could not bind to it
        command = self._dialect.command(python=self._python, port=self._port)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(keeper.__file__), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._dialect.environment()},
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        """Whether the process has ended, or was never launched."""
        return self._process is None or self._process.poll() is not None

    def note(self, text: str) -> None:
        """Into its log, for who reads it later; nothing where the disk is full."""
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as log:
            log.write(f"querl: {text}\n")

    def last_words(self) -> str:
        """The last lines of its log, and where the rest is."""
        if not self._log.exists():
            return ""
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - BYTES_READ))
            lines = log.read(BYTES_READ).decode(errors="replace").splitlines()
        return "\n".join([f"the last lines of {self._log}:", *lines[-LINES_SHOWN:]])

    async def kill(self) -> None:
        """End its whole process group at once: it may be stopped, or deaf. Its log is kept."""
        self._has_failed = True
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(_end, process)
        self._let_go_of_port()

    async def close(self) -> None:
        """Ask it to end, and end what is left of its process group after ``END_S`` seconds."""
        self._has_failed |= self._process is not None and self.has_ended()
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(_end_in_peace, process)
        self._let_go_of_port()
        if not self._has_failed:
            self._log.unlink(missing_ok=True)

    def _let_go_of_port(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


def allow_connections(count: int) -> None:
    """See to it that so many can be open at once. Raises EngineError where the system refuses.

    A usual limit is 1,024 open files, and each connection is one.
    """
    needed = count + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError) as error:
        raise EngineError(
            f"engine.max_batch={count} needs {needed} open files, and the system allows no more "
            f"than {hard}: raise that (ulimit -Hn), or set a smaller engine.max_batch"
        ) from error


async def wait_until_ready(server: Server, dialect: Dialect, http: Http) -> None:
    """Return once the server takes requests.

    Raises EngineError when it ends, takes too long, or wants a key that it is not given.
    """
    deadline = time.monotonic() + server.start_timeout_s
    while (problem := await _problem(dialect, http)) is not None:
        if server.has_ended():
            raise EngineError(f"{dialect.name} ended while it started")
        if time.monotonic() > deadline:
            raise EngineError(
                f"{dialect.name} at {server.url} was not ready after {server.start_timeout_s:g} s "
                f"({problem}): set a larger engine.start_timeout_s, if it is only slow"
            )
        await asyncio.sleep(POLL_S)


async def _problem(dialect: Dialect, http: Http) -> str | None:
    """Why it is not ready."""
    try:
        return None if await dialect.is_ready(http) else "it is starting"
    except (ServerGone, Overdue) as error:
        return str(error)
    except Refused as error:
        if error.status in NO_ENTRY:
            raise
        return str(error)


def _end_in_peace(process: subprocess.Popen[bytes]) -> None:
    _signal(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the group, and wait until all of it is gone: its successor needs the GPU's memory."""
    deadline = time.monotonic() + END_S
    while _signal(process, signal.SIGKILL) and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.01)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> bool:
    """Whether anything is left of the process group that the signal could reach."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # macOS says the latter of ended processes
        return False
    return True


def _hold_port() -> socket.socket:
    """Holds a free port, at which the server may listen all the same, minutes later.

    Linux lets two sockets have one address where both ask for that, as all of asyncio's and vLLM's
    do, and where only one listens.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
