"""What run.toml can name: policies, aggregation rules, codecs and the like, built in or somebody else's, registered by one call."""

from __future__ import annotations

from atoll.registry import builtin  # noqa: F401  the table is filled by whoever opens it
