"""README.md beside a result, in the form that Hugging Face calls a model card. It holds no row, no path and no owner's name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from atoll.adapters.peft_files import load_adapter, read_labels
from atoll.config.document import few
from atoll.config.load import LoadedConfig
from atoll.config.schema import DEFAULT_LOCAL_STEPS, RunConfig
from atoll.errors import AtollError
from atoll.jobs.inputs import base_source, public_name, public_revision
from atoll.runs.events import read_events
from atoll.runs.files import write_text
from atoll.runs.layout import RunDirectory
from atoll.runs.summary import Evaluation, Scores, Summary, read_summary
from atoll.units import counted

CARD_FILE = "README.md"
_SEE_BASE = "see the base"
_NAMES = {"loss": "loss (nats/token)"}


@dataclass(frozen=True, slots=True)
class Kind:
    """What lies beside the card."""

    library: str
    """As hubs call it: "peft", "transformers", "gguf"."""
    what: str
    use: str
    """Lines of Markdown that say how it is used."""


PEFT = Kind(
    "peft", "a PEFT adapter",
    "```python\n{imports}from peft import PeftModel\nfrom transformers import {auto}\n\n"
    'model = PeftModel.from_pretrained({auto}.from_pretrained({base}{more}), ".")\n```\n',
)  # fmt: skip
MERGED = Kind(
    "transformers", "base and adapter in one model",
    '```python\nfrom transformers import {auto}, AutoTokenizer\n\nmodel, tokenizer = {auto}.from_pretrained("."), '
    'AutoTokenizer.from_pretrained(".")\n```\n',
)  # fmt: skip


def write_card(run: RunDirectory, loaded: LoadedConfig, folder: Path, kind: Kind) -> None:
    """Put the card of a finished run into `folder`, which holds what `kind` says."""
    write_text(folder / CARD_FILE, card(run, loaded, kind))


def card(run: RunDirectory, loaded: LoadedConfig, kind: Kind) -> str:
    """The card of a finished run as text."""
    config, labels, summary = loaded.config, read_labels(run.adapter), _summary(run)
    named, revision, licence = public_name(loaded), public_revision(loaded), licence_of(loaded)
    is_public = "/" in named and not named.startswith(".")
    base = named if is_public else Path(named).name
    auto = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    more = (f', revision="{revision}"' if revision else "") + (f", num_labels={len(labels)}" if labels else "")
    data = ModelCardData(
        base_model=base if is_public else None, library_name=kind.library, license=licence,
        pipeline_tag="text-classification" if labels else "text-generation", tags=["atoll", "federated-learning", config.adapter.kind],
    )  # fmt: skip
    # What ships inside of this package is found by nobody's name of it.
    imports, source = ("from atoll.embedded import tiny_path\n", "tiny_path()") if named == "tiny" else ("", f'"{base}"')
    parts = (
        f"# {run.path.resolve().name}",
        f"{kind.what[0].upper()}{kind.what[1:]}, made with Atoll {summary.versions.get('atoll', '')}".rstrip() + ".",
        f"## Base\n\n`{base}`{f', revision `{revision}`' if revision else ''}. Licence: {licence or _SEE_BASE}.",
        f"## Data\n\n{_data(run, config, labels)}",
        f"## Method\n\n{_method(run, config)}",
        f"## Scores\n\n{_scores(summary.eval)}",
        "## Use\n\nIn this folder:\n\n" + kind.use.format(auto=auto, imports=imports, base=source, more=more).rstrip(),
        "## Limits\n\nAn adapter can memorise rows that it was trained on. Whoever has it may be able to learn of them.",
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def licence_of(loaded: LoadedConfig) -> str | None:
    """The licence that the base's own card names; None: it has none here, or the card none. No hub is asked."""
    name = loaded.config.model.base
    try:
        source = Path(base_source(loaded))
    except AtollError:  # Of a base that was moved, or was never here.
        source = Path(name)
    cached = None if source.is_dir() or "/" not in name else try_to_load_from_cache(name.partition("@")[0], CARD_FILE)
    path = Path(cached) if isinstance(cached, str) else source / CARD_FILE
    try:
        licence = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, yaml.YAMLError):  # A card that cannot be read says nothing.
        return None
    return licence if isinstance(licence, str) and re.fullmatch(r"[\w.+-]{1,64}", licence) else None


def _summary(run: RunDirectory) -> Summary:
    # A run that was killed after its last round has an adapter, and no summary.
    return read_summary(run.summary_path) if run.summary_path.is_file() else Summary("interrupted")


def _data(run: RunDirectory, config: RunConfig, labels: tuple[str, ...]) -> str:
    events = list(read_events(run.events_path))
    loads = [event for event in events if event.get("event") == "data_loaded"]
    counts = {(event.get("role"), event.get("edge")): int(str(event.get("num_rows"))) for event in loads}
    trained_on, held_out = (sum(number for (role, _), number in counts.items() if role == wanted) for wanted in ("train", "eval"))
    # Of a run whose edges came and went, all whose rows are in the adapter.
    rounds: Any = (event for event in events if event.get("event") == "round_finished" and event.get("phase") == "federated")
    num_edges = len({edge for event in rounds for edge in event.get("edges", ())}) or len(config.edge) or 1
    owners = f"{num_edges} owners, each of whose rows stayed with the owner" if num_edges > 1 else "one owner"
    form = run.read_config().get("form")
    kinds = {"messages": "Chats", "completion": "Prompts and completions", "text": "Texts"}
    what = f"Texts of {counted(len(labels), 'class')}" if labels else kinds.get(str(form), "Rows")
    numbers = [f"{counted(trained_on, 'row', ',')} trained on"] * bool(trained_on) + [f"{held_out:,} held-out rows"] * bool(held_out)
    return f"{what} of {owners}{': ' if numbers else ''}{', '.join(numbers)}. No row is in this folder."


def _method(run: RunDirectory, config: RunConfig) -> str:
    state, train = load_adapter(run.adapter), config.train
    ranks = sorted(set(state.ranks.values()))
    rank = "" if config.adapter.kind == "full" else f" of rank {ranks[0]}" if len(ranks) == 1 else f" of ranks {ranks[0]} to {ranks[-1]}"
    if state.kind == "bottleneck":
        rank = rank.replace("rank", "width")
    long = counted(train.local_steps or DEFAULT_LOCAL_STEPS, "step")
    long = long if train.local_epochs is None else counted(train.local_epochs, "epoch", "g")
    lines = {
        "trained": f"{config.adapter.kind}{rank} on {few(sorted({name.rpartition('.')[2] for name in state.parts}))}",
        "rounds": f"{config.run.rounds} of {long} on every edge, seed {config.run.seed}",
        "optimizer": f"AdamW, learning rate {train.learning_rate:g}, {train.schedule}, {train.batch_size * train.accumulate} rows a step",
        "aggregation": f"{config.federated.aggregation}, {config.federated.combine}",
        "modules": config.select.policy, "plan": config.plan.policy, "precision": config.model.precision,
    }  # fmt: skip
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _scores(rows: Evaluation) -> str:
    means = {"local-only (mean)": rows.local_only.mean} if rows.local_only is not None else {}
    named: Mapping[str, Scores | None] = {"base": rows.base, "this model": rows.adapted, **means, "central": rows.central}
    found = {name: scores for name, scores in named.items() if scores}
    if not found:
        return "Nothing was held out to score it on."
    keys = [key for key in next(iter(found.values())) if not key.startswith("num_")]
    head = ["", *(_NAMES.get(key, key.replace("_", " ")) for key in keys)]
    lines = [head, ["---", *("---:" for _ in keys)], *([name, *(_text(scores.get(key)) for key in keys)] for name, scores in found.items())]
    return "On held-out rows:\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
