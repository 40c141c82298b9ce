"""A prompt to try a trained run with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atoll.config.load import load
from atoll.jobs.sources import eval_rows
from atoll.tasks.text import text_form

_LONGEST = 160


def example_prompt(config_path: str | Path, *, overrides: Sequence[str] = ()) -> str:
    """The prompt of the first held-out row, or "..." where there is none that fits on a command line.

    Raises: InputError leaves, as the run itself would.
    """
    loaded = load(Path(config_path), overrides)
    rows = eval_rows(loaded)
    if rows is None:
        return "..."
    form = text_form(loaded.config.data, rows.columns)
    prompt = form.prompt.render(rows[0]) if form.prompt is not None else "..."
    return prompt if len(prompt) <= _LONGEST and "\n" not in prompt else "..."
