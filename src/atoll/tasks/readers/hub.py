"""Rows of a Hugging Face data set, through the `datasets` library, which is imported only here and only when one is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from atoll.errors import DataFileError

ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^/:]+)?")


def looks_like_id(source: str) -> bool:
    """Whether `source` could be a data set id: "name", "org/name", each with an optional ":split"."""
    return ID.fullmatch(source) is not None and not source.startswith(".")


def load_hub(source: str, limit: int | None) -> Mapping[str, Sequence[object]]:
    """The columns of a data set; its split "train" unless the id ends with ":SPLIT".

    Raises: DataFileError where the data set is unknown, unreadable, or out of reach.
    """
    import datasets
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    name, _, split = source.partition(":")
    try:
        found = datasets.load_dataset(name, split=split or "train")
        return found.select(range(min(limit or len(found), len(found)))).with_format(None)[:]
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError, HfHubHTTPError, httpx.HTTPError) as problem:
        raise DataFileError(
            "there is no such file, and no such data set can be loaded", where=source,
            got=(str(problem).strip() or type(problem).__name__).split("\n")[0][:200],
            expected='a file or folder beside run.toml, or a Hugging Face data set id such as "org/name" or "org/name:test"',
            do="check the name and the split; without network, give a local file",
        ) from None  # fmt: skip
