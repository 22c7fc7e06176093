"""Fixtures that all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from console import Querl, console_script
from servers import Server, mariadb, mysql, postgres

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # as a shell starts what it runs in the background; children would not hear Ctrl-C either
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder that holds `spider/`; set QUERL_DATA to it."""
    candidates = [os.environ.get("QUERL_DATA"), Path(__file__).resolve().parents[2] / "shared"]
    for candidate in candidates:
        if candidate and (Path(candidate) / "spider" / "dev.json").exists():
            return Path(candidate)
    pytest.skip("the Spider data set is not here: set QUERL_DATA to the folder that holds spider/")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """Keeps the tests' gold results out of the user's cache."""
    os.environ["QUERL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """A PostgreSQL server, for all tests that need one."""
    with postgres() as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[Server]:
    """A MariaDB server, for all tests that need one."""
    with mariadb() as server:
        yield server


@pytest.fixture(scope="session")
def mysql_server() -> Iterator[Server]:
    """A MySQL server, for all tests that need one."""
    with mysql() as server:
        yield server


@pytest.fixture
def querl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Querl:
    """The console script: call it with arguments for (exit code, output, standard error)."""
    return console_script(monkeypatch, capsys)
