"""Which modules of a base carry adapters: what the user asked for, as full module names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from atoll.errors import TargetError
from atoll.shapes import ModuleShape
from atoll.units import counted

GROUPS = ("attention", "mlp", "all-linear")
_OUTSIDE = frozenset({"lm_head", "embed_out", "embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "embed_positions"})


def resolve_targets(
    requested: str | Sequence[str], modules: Sequence[ModuleShape], without_adapter: Sequence[str] = ()
) -> tuple[str, ...]:
    """Full names of the requested modules, in the model's order, each once.

    A request is a last name ("q_proj"), an ending ("attn.c_proj"), a full name, or one of GROUPS; no group means the head or the embedding.
    `without_adapter` are weights that nothing can be put beside, for the reason.

    Raises: TargetError for a request that matches nothing, with the nearest names, and for an empty list.
    """
    modules = [module for module in modules if module.takes_adapter]
    requests = (requested,) if isinstance(requested, str) else tuple(requested)
    if not requests or not modules:
        what = "no adapter targets are given" if modules else "the base has no module that can carry an adapter"
        raise _target_error(what, requests, modules)
    chosen: set[str] = set()
    unmatched = []
    for request in requests:
        names = {module.name for module in modules if _matches(request, module)}
        chosen |= names
        if not names:
            unmatched.append(request)
    bare = [request for request in unmatched if request and any(f".{request}." in f".{name}." for name in without_adapter)]
    if bare:
        raise _bare_error(bare, without_adapter, modules)
    if unmatched:
        raise _target_error("adapter targets match no module of the base", unmatched, modules)
    return tuple(module.name for module in modules if module.name in chosen)


def named_outside(requested: str | Sequence[str], outside: Sequence[ModuleShape]) -> set[str]:
    """Names of those of these modules that a request names: embedding and head are adapted only where they are named."""
    requests = (requested,) if isinstance(requested, str) else tuple(requested)
    return {module.name for module in outside if any(_matches(request, module) for request in requests)}


def unreached(requested: str | Sequence[str], without_adapter: Sequence[str]) -> str | None:
    """What a group of modules leaves out, in a sentence; None where nothing is left out, or no group is asked for."""
    groups = [request for request in ((requested,) if isinstance(requested, str) else requested) if request in GROUPS]
    left = [
        name for name in without_adapter
        if any(group == "all-linear" or (group == "attention") == ("attn" in name) for group in groups)
    ]  # fmt: skip
    if not left:
        return None
    kinds = sorted({".".join(part for part in name.split(".")[-3:] if not part.isdecimal()) for name in left})
    return (
        f"left out of {', '.join(groups)}, and frozen: {counted(len(left), 'weight')} that are no linear modules, or whose "
        "adapters PEFT would not load "
        f"({', '.join(kinds[:6])}{', ...' if len(kinds) > 6 else ''})"
    )


def _matches(request: str, module: ModuleShape) -> bool:
    if request in GROUPS:
        return not module.outside and request in ("all-linear", module.kind)
    return bool(request) and (module.name == request or module.name.endswith(f".{request}"))


def _bare_error(requests: Sequence[str], without_adapter: Sequence[str], modules: Sequence[ModuleShape]) -> TargetError:
    first = next(name for name in without_adapter if f".{requests[0]}." in f".{name}.")
    return TargetError(
        "adapter targets are weights that nothing can be put beside", where="[adapter] targets", got=", ".join(map(repr, requests)),
        expected=f"linear modules whose adapters PEFT loads; {first} is one tensor for many experts, is read past its "
        "module, or taken for the experts by PEFT",
        do="choose from " + ", ".join(dict.fromkeys(module.last_name for module in modules)),
    )  # fmt: skip


def _target_error(what: str, requests: Sequence[str], modules: Sequence[ModuleShape]) -> TargetError:
    last_names = list(dict.fromkeys(module.last_name for module in modules))
    candidates = [*last_names, *GROUPS, *dict.fromkeys(module.name for module in modules)]
    near = [match for request in requests for match in difflib.get_close_matches(request, candidates, n=1, cutoff=0.5)]
    if any(request.rpartition(".")[2] in _OUTSIDE for request in requests):
        do = "head and embedding of this base stay frozen here; choose projections inside the blocks"
    elif near:
        do = "did you mean " + " and ".join(repr(name) for name in dict.fromkeys(near)) + "?"
    else:
        do = f'choose from these names, or write targets = "{GROUPS[-1]}"'
    return TargetError(
        what, where="[adapter] targets", got=", ".join(repr(request) for request in requests) or "an empty list",
        expected=", ".join(last_names) + ", or one of the groups " + ", ".join(GROUPS), do=do,
    )  # fmt: skip
