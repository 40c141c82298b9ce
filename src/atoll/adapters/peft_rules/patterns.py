"""The patterns of an adapter_config.json: regular expressions from a file, tried in bounded time before PEFT or Atoll uses them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from subprocess import PIPE
from typing import Any

SECONDS = 5.0
"""What all patterns of one adapter may take on all names: thousands of times what sensible ones need."""
_BYTES = 2**30
# Without quantifiers and groups an expression cannot take longer than the name is long.
_PLAIN = re.compile(r"[\w.\-^$\\]*")
# Apart, because Python's `re` cannot be stopped from within; and with `re`, because PEFT uses it.
_TRIAL = f"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({_BYTES}, {_BYTES}))
except ImportError:
    pass
forms, names = json.load(sys.stdin)
for number, form in enumerate(forms):
    print(number, flush=True)
    try:
        compiled = re.compile(form)
        for name in names:
            compiled.match(name)
            compiled.fullmatch(name)
    except (re.error, OverflowError, RecursionError, MemoryError) as problem:
        sys.exit(str(problem)[:200] or type(problem).__name__)
"""


def wrong_pattern(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """What is wrong with the regular expressions of an adapter_config.json for these names of modules; None: nothing."""
    tried = [(field, pattern, form) for field, pattern, form in _forms(config) if "\\" in pattern or not _PLAIN.fullmatch(pattern)]
    if not tried:
        return None
    asked = json.dumps([[form for *_, form in tried], sorted(names)])
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", _TRIAL], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as trial:
        try:
            passed, said = trial.communicate(asked, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            trial.kill()
            passed, said = trial.communicate()[0], f"takes more than {SECONDS:.0f} s"
    if trial.returncode == 0:
        return None
    last = passed.split()[-1:] or ["0"]
    field, pattern, _ = tried[int(last[0])]
    return f"{field} {pattern[:80]!r}: {(said.strip().splitlines() or ['it cannot be used'])[-1]}"


def _forms(config: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    """Each pattern with its field, and the expression that PEFT makes of it."""
    forms = [(key, value, value) for key in ("target_modules", "exclude_modules") if isinstance(value := config.get(key), str)]
    for key in ("rank_pattern", "alpha_pattern"):
        forms += [(key, pattern, rf"(.*\.)?({pattern})$") for pattern in config.get(key) or {}]
    forms += [("layers_pattern", one, rf"(?:^|.*?\.){one}\.(?P<idx>\d+)\.") for one in _listed(config.get("layers_pattern"))]
    return [*forms, *(("modules_to_save", name, rf"(^|.*\.){name}($|\..*)") for name in _listed(config.get("modules_to_save")))]


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
