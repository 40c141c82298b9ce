"""docs/host.md and the dashboard beside it: the metrics are those that a host has, options and codes those there are."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import click
import typer
from prometheus_client.registry import CollectorRegistry

from atoll.cli.app import app
from atoll.split.host.host_account import Totals
from atoll.split.host.limits.budgets import Use
from atoll.split.host.limits.rules import TenantLimits, parse_byte_limit
from atoll.split.host.metrics import _Figures

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "host.md").read_text(encoding="utf-8")
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "host.json").read_text(encoding="utf-8"))


class Watched:
    """A host that has had one tenant."""

    def totals(self) -> Totals:
        return Totals(1, 2, 3, 4, 5.0, 6.0, 7, 8, Counter({"busy": 1}))

    def totals_by_tenant(self) -> dict[str, Totals]:
        return {"north": self.totals()}

    def uses(self, tenant: str | None) -> dict[str, Use]:
        limits = TenantLimits(2, None, None, parse_byte_limit("1GB/day"))
        return {"north": Use(limits, 0.0, 1.5, 10, 0.0, 0.0)}


def samples() -> dict[str, set[str]]:
    """Every name on the page of metrics, with its labels."""
    watched, registry = Watched(), CollectorRegistry()
    registry.register(_Figures(watched, watched, True))  # type: ignore[arg-type]
    found: dict[str, set[str]] = {}
    for family in registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_the_table_is_the_page_of_metrics() -> None:
    rows = re.findall(r"^\| `(atoll_host\w+)` (\*? ?)\| (gauge|counter) \|", PAGE, flags=re.MULTILINE)
    named = {name for name, *_ in rows} | {name.replace("atoll_host_", "atoll_host_tenant_") for name, star, _ in rows if star.strip()}
    found = samples()
    assert named == set(found)
    assert {kind for name, _, kind in rows if name.endswith("_total")} == {"counter"}
    assert {kind for name, _, kind in rows if not name.endswith("_total")} == {"gauge"}


def test_the_dashboard_asks_for_what_there_is_and_for_all_of_it() -> None:
    found, asked = samples(), set[str]()
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            names = set(re.findall(r"atoll_host\w+", target["expr"]))
            assert names <= set(found), target["expr"]
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"instance"}
            assert all(labels <= found[name] for name in names), target
            assert all(("rate(" in target["expr"] or "increase(" in target["expr"]) == name.endswith("_total") for name in names)
            asked |= names
    assert {name for name in found if "_tenant_" not in name} <= asked
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in DASHBOARD["panels"]})


def test_options_are_those_of_the_command_with_their_defaults() -> None:
    host = typer.main.get_command(app).commands["host"]  # type: ignore[attr-defined]
    options = {option.opts[0]: option for option in host.params if isinstance(option, click.Option)}
    assert set(re.findall(r"(?<!-)(--[a-z][a-z-]+)", PAGE.partition("## Metrics")[0])) <= {
        *options, "--host", "--profile", "--help", "--dir", "--ca-key", "--fleet",
    }  # fmt: skip
    for option, default in re.findall(r"^\| `(--[a-z-]+) [^|]*\|[^|]*\| (\d+) \|$", PAGE, flags=re.MULTILINE):
        assert options[option].default == int(default), option
    assert [options[name].default for name in ("--idle", "--exchange", "--silence")] == [600.0, 3600.0, 14400.0]


def test_codes_are_those_that_a_host_gives() -> None:
    sources = [*(ROOT / "src" / "atoll" / "split" / "host").rglob("*.py"), ROOT / "src" / "atoll" / "wire" / "handshake.py"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    given = set(re.findall(r'code="(\w+)"', code)) | {"frame", "dialogue", "idle"}
    section = PAGE.partition("## Refusals")[2].partition("\n## ")[0]
    told = {name for row in re.findall(r"^\| (`[^|]*) \|", section, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert told == given
