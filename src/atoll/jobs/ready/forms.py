"""Whether all edges write their rows alike, as one adapter learns them all."""

from __future__ import annotations

from collections.abc import Mapping

from atoll.config.document import few
from atoll.runs.events import Advised
from atoll.tasks.text import Template, TextForm

_KINDS = {"completion": "prompts and completions", "text": "texts", "messages": "chats"}


def unlike_forms(forms: Mapping[str, TextForm]) -> tuple[Advised, ...]:
    """Of the forms by edge: that they differ, and in what; nothing where they do not. Columns of other names are no difference."""
    return _unlike({name: _written(form) for name, form in forms.items()})


def unlike_kinds(kinds: Mapping[str, str]) -> tuple[Advised, ...]:
    """The same of what edges on machines of their own say that their rows are."""
    return _unlike({name: _KINDS.get(kind, kind) for name, kind in kinds.items()})


def _unlike(written: Mapping[str, str]) -> tuple[Advised, ...]:
    ways = list(dict.fromkeys(written.values()))
    if len(ways) < 2:
        return ()
    told = "; ".join(f"{few([name for name, one in written.items() if one == way], 3)} {way}" for way in ways)
    return (Advised(
        "", f"edges write their rows in {len(ways)} forms, which one adapter learns side by side: {told}. Ask the adapter in a form that "
        "it has learned; prompt and completion below [data] or an [[edge]] make them one",
    ),)  # fmt: skip


def _written(form: TextForm) -> str:
    if form.kind != "completion" or form.prompt is None:
        return _KINDS[form.kind]
    text = _literals(form.prompt) + ("" if form.completion is None else _literals(form.completion))
    return repr(text) if text.strip(".") else "as they stand"


def _literals(template: Template) -> str:
    return "".join(literal + ("" if column is None else "...") for literal, column, _ in template.parts)
