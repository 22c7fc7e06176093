"""Runs one command, and takes it along when whoever started us ends, however that happens.

Run as a script, with a pipe from the starter as standard input: a pipe whose other end is gone
reads as ended, also after SIGKILL, and on macOS as on Linux. The command and all its children are
in our process group. No imports beyond the standard library: it starts in hundredths of a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

NOT_STARTED = 127


def main(command: list[str]) -> int:
    """The command's exit code, 128 and the signal's number where a signal ended it.

    Where it cannot be started it says why, and gives what a shell would.
    """
    # not ignored, which the command would inherit: it ends itself, and we with its exit code
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}: set engine.python to an interpreter\n")
        return NOT_STARTED
    threading.Thread(target=_end_with_starter, daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _end_with_starter() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
