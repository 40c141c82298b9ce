"""A measurement in a process of its own: the script runs itself again and reads the figures off the last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

_FLAG = "--measure"


def run(main: Callable[[], None], measure: Callable[..., object]) -> None:
    """What a script does when it is started: `main`, or in a process of `command` its part, whose result is printed."""
    if sys.argv[1:2] == [_FLAG]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        main()


def command(script: str, *arguments: object) -> list[str]:
    """What starts the script's part, with arguments that JSON can carry."""
    return [sys.executable, script, _FLAG, json.dumps(arguments)]


def figures(script: str, *arguments: object, environment: Mapping[str, str] | None = None, limit_seconds: float | None = None) -> Any:
    """What the script's part returns.

    Raises: CalledProcessError where it fails or is killed; TimeoutExpired.
    """
    done = subprocess.run(
        command(script, *arguments), stdout=subprocess.PIPE, text=True, check=True, timeout=limit_seconds,
        env=os.environ | dict(environment or {}),
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])
