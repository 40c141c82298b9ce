"""Whether a name that is no folder here can be one of the hub's: asked before libraries try for half a minute."""

from __future__ import annotations

import difflib
from pathlib import Path

from atoll.errors import BaseFolderError

EMBEDDED = ("tiny",)
SECONDS = 10.0


def check_hub_name(name: str, beside: Path) -> str:
    """The name; refused at once is what is nearly that of what ships, a path into a folder `beside`, and any new one without a hub.

    Raises: BaseFolderError.
    """
    is_path = Path(name).is_absolute() or name.startswith((".", "~"))  # Never one of the hub's; the loader says what is not there.
    if is_path or name in EMBEDDED or Path(name).exists() or _is_in_cache(name):
        return name
    near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.7)
    folder, _, last = name.partition("/")
    if last and (beside / folder).is_dir():
        inside = difflib.get_close_matches(last, [path.name for path in (beside / folder).glob("*/")], n=1)
        near = [f"{folder}/{one}" for one in inside]
        raise _unknown(name, f"no {last} in the folder {folder}", near, "mend the path; for a model of the hub rename the folder")
    if near:
        raise _unknown(name, "neither a folder here, nor in the hub's cache", near, "mend the name")
    if (problem := _unreached()) is not None:
        raise _unknown(name, f"no folder of this name, and the hub cannot be reached: {problem}", [], "check the name, or the network")
    return name


def _is_in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _unreached() -> str | None:
    """Why no connection to the hub comes about; None where one does, or it takes long, or the hub is not to be asked."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        httpx.head(constants.ENDPOINT, timeout=SECONDS)
    except httpx.ConnectError as problem:
        # Whom the library believes is its own to say.
        return None if "SSL" in str(problem) else str(problem) or type(problem).__name__
    except httpx.HTTPError:
        return None
    return None


def _unknown(name: str, got: str, near: list[str], do: str) -> BaseFolderError:
    return BaseFolderError(
        "there is no such base", where=name, got=got, expected='"tiny", a model folder, or a hub id such as "org/name"',
        do=f"did you mean {near[0]}?" if near else do,
    )  # fmt: skip
