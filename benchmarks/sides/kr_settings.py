"""What is compared: every policy at its defaults, the wire at its leanest, and points of the curve of quality against traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FULL, KR = "all", "kill-and-revive"
LOTTERY = f"{KR}, lottery"
"""Counts as a policy: it has its own learning rate."""
OTHERS = ("early-kill", "random", "magnitude", "snip", "last-layers")
WINDOWED = (KR, LOTTERY, "early-kill", "magnitude", "snip")
OBSERVING = (KR, LOTTERY, "early-kill", "magnitude", "snip")
OBSERVE = "select.observe_steps=3"
"""The automatic window of 10 steps would be 8 % of an epoch as short as these."""
BUDGET = f"{KR}, budget 0.105"
LEAN = (f"{KR}, budget 0.24, factored int8", f"{FULL}, factored int8")
GROUPS = ("main", "wire", "curve", "others", "ideas")
KEEPS = {"1/4": 1 / 4, "1/8": 1 / 8, "1/16": 1 / 16, "1/24": 1 / 24}


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of a table, or one point of the curve."""

    name: str
    policy: str
    group: str
    overrides: tuple[str, ...]

    @property
    def tuned(self) -> bool:
        """Whether the learning rate of its policy is chosen with this setting."""
        return self.group == "main"


def settings(extra: Sequence[str], steps: int) -> list[Setting]:
    """All settings for so many steps, with POLICY:section.key=value on top of those of a policy, "windows" for all that have a window.

    Raises: SystemExit for an extra that names no policy.
    """
    for one in extra:
        if one.partition(":")[0] not in (FULL, KR, LOTTERY, *OTHERS, "windows") or "=" not in one:
            raise SystemExit(f"--set {one}: expected POLICY:section.key=value")
    found: list[Setting] = []

    def add(group: str, policy: str, name: str, *overrides: str) -> None:
        names = {policy, "windows"} if policy in WINDOWED else {policy}
        given = tuple(one.partition(":")[2] for one in extra if one.partition(":")[0] in names)
        # A point of the curve wins over what holds for the whole policy.
        window = (OBSERVE,) if policy in OBSERVING else ()
        found.append(Setting(name, policy, group, (f"select.policy={KR if policy == LOTTERY else policy}", *window, *given, *overrides)))

    for policy in (FULL, KR, *OTHERS):
        add("main", policy, policy)
    add("main", LOTTERY, LOTTERY, "select.draw=lottery")
    add("wire", KR, BUDGET, "select.threshold=budget", "select.budget=0.105")
    add("wire", KR, LEAN[0], "wire.mode=factored", "wire.codec=int8", "select.threshold=budget", "select.budget=0.24")
    add("wire", FULL, LEAN[1], "wire.mode=factored", "wire.codec=int8")
    _curve(add)
    _ideas(add, steps)
    return found


def policy_of(name: str) -> str:
    """The policy that a setting's name begins with."""
    return LOTTERY if name.startswith(LOTTERY) else name.partition(", ")[0]


def _curve(add) -> None:  # type: ignore[no-untyped-def]
    """Kill-and-Revive along each of its options, and the other policies along `keep`."""
    for name, keep in KEEPS.items():
        add("curve", KR, f"{KR}, keep {name}", "select.threshold=keep", f"select.keep={keep}")
    for budget in (0.05, 0.1, 0.2, 0.4):
        add("curve", KR, f"{KR}, budget {budget:g}", "select.threshold=budget", f"select.budget={budget}")
    for observe in (2, 5, 20):
        add("curve", KR, f"{KR}, observe {observe}", f"select.observe_steps={observe}")
    for every in (40, 80):
        add("curve", KR, f"{KR}, every {every}", f"select.every={every}")
        add("curve", LOTTERY, f"{LOTTERY}, every {every}", "select.draw=lottery", f"select.every={every}")
    for policy in OTHERS:
        for name, keep in KEEPS.items():
            add("others", policy, f"{policy}, keep {name}", f"select.keep={keep}")


def _ideas(add, steps: int) -> None:  # type: ignore[no-untyped-def]
    """What might close the gap to the full pool: the freed budget spent on rank, a wider pool, more choices, a budget that shrinks."""
    add("ideas", KR, f"{KR}, rank 32", "adapter.rank=32", "adapter.alpha=64")
    add("ideas", KR, f"{KR}, shrinking", "select.policy=kr_ideas:Shrinking", f'options."kr_ideas:Shrinking".steps={steps}')
    add("ideas", KR, f"{KR}, all-linear", "adapter.targets=all-linear", f"select.keep={11 / 210}")
    add("ideas", KR, f"{KR}, every 50", "select.every=50")
    add("ideas", LOTTERY, f"{LOTTERY}, every 50", "select.draw=lottery", "select.every=50")
