"""Whether a base is the one that a run was trained on, by the hashes that the run kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atoll.base.blocks import blocks_path
from atoll.base.load import Base
from atoll.base.weights.beside import other_settings, settings_of, tokenizer_digest
from atoll.config.schema import RunConfig
from atoll.errors import ArchitectureError, OtherBaseError
from atoll.remote_blocks import find_placeholder
from atoll.runs.layout import RunDirectory

BASE, PART = "base_hash", "part_hash"
_TOKENIZER, _CHAT, _SETTINGS = "tokenizer_hash", "chat_template_hash", "settings"


def base_hashes(base: Base, config: RunConfig, digest: str | None = None) -> dict[str, str]:
    """SHA-256 of all weights of a base that is here, and of those that a device keeps by [model] cut; of a device's part, that alone.

    `digest` is the base's own where it is known already.
    """
    digest = digest or base.digest()
    if find_placeholder(base.model) is not None:
        return {PART: digest}
    try:
        path = blocks_path(base.model)
    except ArchitectureError:  # It cannot be cut.
        return {BASE: digest}
    cut, blocks = config.model.cut, list(base.model.get_submodule(path).children())
    middle = tuple(f"{path}.{number}." for number in range(cut.front, len(blocks) - cut.back))
    return {BASE: digest, PART: base.digest(without=middle)}


def base_notes(base: Base, config: RunConfig, digest: str) -> dict[str, Any]:
    """What a run keeps of its base: the hashes of its weights and of its tokenizer, and config.json's settings."""
    template = base.tokenizer.chat_template
    chat = "" if template is None else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
    beside = {_TOKENIZER: tokenizer_digest(base.tokenizer), _CHAT: chat, _SETTINGS: settings_of(base.model.config.to_dict())}
    return {**base_hashes(base, config, digest), **beside}


def run_of(adapter: Path) -> RunDirectory | None:
    """The run whose folder an adapter lies in: its result, that of an edge, or a checkpoint."""
    found = (RunDirectory(folder) for folder in list(adapter.resolve().parents)[:3])
    return next((run for run in found if run.config_json.is_file() and run.events_path.is_file()), None)


def check_trained_on(
    run: RunDirectory, base: Base, config: RunConfig, or_else: str = "give --other-base (other_base=True) to go on with these"
) -> None:
    """Whether a base has the weights that the run was trained on (of a device's part, those that it has), the tokenizer and the settings.

    Raises: OtherBaseError, with `or_else` as the other way out.
    """
    noted, now = run.read_config(), base_notes(base, config, base.digest())
    kept, hashes = noted.get("base"), noted.get("hashes")
    # Older runs kept one hash, of the part where there was a host.
    hashes = hashes if isinstance(hashes, Mapping) else {}
    kept = kept if isinstance(kept, Mapping) else {PART if noted.get("has_host") else BASE: hashes.get("base_hash")}
    common = [name for name in (BASE, PART) if isinstance(kept.get(name), str) and name in now]
    if not common or any(kept[name] != now[name] for name in common[:1]):
        had = str(next((value for value in kept.values() if value), "no hash"))
        raise _other_base(
            base, f"weights with the hash {next(iter(now.values()))[:12]}", f"{had[:12]}, as {run.config_json} has it", or_else
        )  # fmt: skip
    before = kept.get(_SETTINGS)
    others = other_settings(before, now[_SETTINGS]) if isinstance(before, Mapping) else []
    if others:
        raise _other_base(base, f"config.json: {'; '.join(others[:3])}", f"the settings that {run.config_json} has", or_else)
    used = {_TOKENIZER: "tokenizer", **({_CHAT: "chat template"} if noted.get("form") == "messages" else {})}
    for key, what in used.items():
        if kept.get(key) not in (None, now[key]):
            raise _other_base(base, f"another {what}", f"that whose hash {run.config_json} has", or_else)


def _other_base(base: Base, got: str, expected: str, or_else: str) -> OtherBaseError:
    return OtherBaseError(
        "the base is not the one that this run was trained on", where=base.name, got=got, expected=expected,
        do=f"put back what was there, or {or_else}",
    )  # fmt: skip
