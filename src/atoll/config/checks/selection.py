"""What [select] excludes."""

from __future__ import annotations

from atoll.config.checks.page import conflict
from atoll.config.document import Document
from atoll.config.keys import as_toml
from atoll.config.schema import RunConfig
from atoll.errors import InputError
from atoll.registry.parts import trait


def selection(config: RunConfig, document: Document) -> list[InputError]:
    """Policies, thresholds and what becomes of killed modules."""
    select = config.select
    if not select.chooses:
        return []
    observes = trait("policy", select.policy, "observes")
    errors: list[InputError] = []

    def add(key: str, what: str, got: str, expected: str, do: str) -> None:
        errors.append(conflict(document, ("select", key), what, got, expected, do))

    if select.threshold == "absolute" and select.least_variation is None:
        what, expected = 'select.threshold = "absolute" needs select.least_variation', "the variation that a module must exceed"
        add("threshold", what, "no least_variation", expected, "add least_variation = ...; every choice is in events.jsonl with its scores")
    if select.threshold != "absolute" and select.least_variation is not None:
        what, got = "select.least_variation goes with another threshold", f"least_variation beside threshold = {as_toml(select.threshold)}"
        add("least_variation", what, got, 'threshold = "absolute"', 'write threshold = "absolute", or take least_variation out')
    if not observes and select.threshold != "keep":
        what = f'select.policy = "{select.policy}" observes nothing, so that no threshold applies'
        got = f"threshold = {as_toml(select.threshold)}"
        add("threshold", what, got, 'threshold = "keep"', "take threshold out, and set keep to the share of modules to train")
    if select.draw == "lottery" and not observes:
        what, got = f'select.policy = "{select.policy}" has no scores to draw lots by', f"draw = {as_toml(select.draw)}"
        add("draw", what, got, 'draw = "highest"', 'take draw out, or write policy = "kill-and-revive"')
    elif select.draw == "lottery" and select.threshold != "keep":
        what, got = 'select.draw = "lottery" needs a number of modules to draw', f"threshold = {as_toml(select.threshold)}"
        add("draw", what, got, 'threshold = "keep"', "take draw out; or take threshold out, and set keep to the share of modules to train")
    for key, value in (("variation", "product-change"), ("killed", "merge")):
        if config.adapter.kind == "bottleneck" and getattr(select, key) == value:
            what = f'select.{key} = "{value}" needs a product B A, which a bottleneck does not have'
            do = f'choose another {key}, or write kind = "lora" below [adapter]'
            add(key, what, 'adapter.kind = "bottleneck"', 'adapter.kind = "lora"', do)
    if config.model.precision == "bf16" and select.killed == "merge":
        what = 'select.killed = "merge" rounds away what a young adapter adds to weights in bf16'
        add("killed", what, 'model.precision = "bf16"', 'model.precision = "fp32"', 'write killed = "offload", or precision = "fp32"')
    narrow = _narrow_bits(config) if select.killed == "merge" else None
    if narrow is not None:
        what = 'select.killed = "merge" needs weights in full precision'
        do = 'write killed = "offload" below [select], or leave the bits of the base as they are'
        add("killed", what, narrow, "no bases of fewer bits", do)
    window, period = select.observe_steps, select.every
    if trait("policy", select.policy, "repeats") and isinstance(window, int) and isinstance(period, int) and period <= window:
        what = "a window of observation is no shorter than its period, so that no module would ever be killed"
        add("every", what, f"observe_steps = {window}, every = {period}", f"every above {window}", "raise every, or lower observe_steps")
    return errors


def _narrow_bits(config: RunConfig) -> str | None:
    """What says that edges hold the base in fewer bits than its precision has; None where nothing does."""
    if trait("planner", config.plan.policy, "decides"):
        return f'plan.policy = "{config.plan.policy}"'
    if config.model.quantize != "auto":
        return f"model.quantize = {config.model.quantize}"
    if "homogeneous" in config.run.compare:
        return 'run.compare with "homogeneous"'
    return next((f"bits = {edge.bits} of edge {edge.name}" for edge in config.edge if edge.bits is not None), None)
