"""Settings as the flags of a command."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """``{"tp_size": 2, "enable_lora": True}`` as ``--tp-size 2 --enable-lora``.

    None and False are left out; a list is several words, a table JSON. Of one name with ``_`` and
    with ``-`` the last value counts.
    """
    arguments: list[str] = []
    for name, value in {name.replace("_", "-"): value for name, value in flags.items()}.items():
        if value is None or value is False:
            continue
        arguments.append("--" + name)
        if isinstance(value, list | tuple):
            arguments += map(str, value)
        elif isinstance(value, dict):
            arguments.append(json.dumps(value))
        elif value is not True:
            arguments.append(str(value))
    return arguments
