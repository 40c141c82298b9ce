"""What an edge that trains against a host sends and receives, by formula."""

from __future__ import annotations

from collections.abc import Mapping

from atoll.config.schema import RunConfig
from atoll.cost.traffic import WireBytes
from atoll.shapes import BaseShapes
from atoll.wire.byte_formulas import ModuleSizes, WireMode, killed_bytes, split_bytes


def remote_blocks(config: RunConfig, shapes: BaseShapes) -> range:
    """The blocks that a host runs for this run's cut."""
    return range(config.model.cut.front, shapes.num_blocks - config.model.cut.back)


def largest_batch_tokens(config: RunConfig, train_rows: int, *, scores: bool) -> int:
    """Padded tokens of the largest micro-batch of a run, of those that are scored too where there are any."""
    generated = config.evaluate.max_new_tokens if config.evaluate.metrics else 0
    return max(train_rows * config.data.max_length, config.evaluate.batch_size * (config.data.max_length + generated) if scores else 0)


def groups(config: RunConfig, shapes: BaseShapes, ranks: Mapping[str, int]) -> list[list[ModuleSizes]]:
    """Sizes of the adapted modules that run in the host, those that read the same input together, in execution order."""
    found: dict[tuple[int, int], list[ModuleSizes]] = {}
    for module in shapes.modules:
        if ranks.get(module.name, 0) and module.block in remote_blocks(config, shapes):
            found.setdefault((module.block, module.stage), []).append((module.d_in, module.d_out, ranks[module.name]))
    return [found[place] for place in sorted(found)]


def step_round_trips(
    config: RunConfig, shapes: BaseShapes, ranks: Mapping[str, int], mode: WireMode, *, num_exchanges: int = 1,
    killed: Mapping[str, int] = {},
) -> int:  # fmt: skip
    """Round trips of one optimizer step: of every exchange two for every group, one more, and one where gradients go on to front blocks.
    With lent adapters two for every exchange.

    The lowest group's gradient and the end of the exchange come together, unless the device has an input gradient to send between them.
    `ranks` are those of active modules. Where any of `killed` are the host's, they are sent in a session that is opened first.
    """
    turns = 2 * len(groups(config, shapes, ranks)) + 1 + _reaches_front(config, shapes, ranks)
    turns = min(turns, 2) if mode == "lent" else turns
    return num_exchanges * turns + bool(groups(config, shapes, killed))


def step_bytes(
    config: RunConfig, shapes: BaseShapes, ranks: Mapping[str, int], mode: WireMode, *, num_tokens: int, num_label_tokens: int,
    num_exchanges: int = 1, killed: Mapping[str, int] = {},
) -> WireBytes:  # fmt: skip
    """One optimizer step's exchanges: `num_tokens` and `num_label_tokens` over all of them; factors travel with the first only.

    `ranks` are those of active modules, `killed` those of modules that are sent before this step; the host needs its own only.
    """
    active = groups(config, shapes, ranks)
    front = _reaches_front(config, shapes, ranks)
    wanted = num_tokens if config.model.cut.back else num_label_tokens

    def count(tokens: int, wanted_tokens: int, *, shared: bool, first: bool) -> tuple[int, int]:
        return split_bytes(
            active, shapes.d_model, tokens, wanted_tokens, config.wire.codec, mode, shared=shared,
            lowest_needs_input_gradient=front, front_gradient=front, has_factors=first and mode != "dense", ends_step=first,
            adapter_codec=config.wire.adapters,
        )  # fmt: skip

    offloaded = killed_bytes([sizes for group in groups(config, shapes, killed) for sizes in group])
    # Gradients of factors come back with every exchange, whatever its tokens: an exchange without tokens counts them alone.
    rest = [count(0, 0, shared=True, first=False)] * (num_exchanges - 1)
    up, down = count(num_tokens, wanted, shared=True, first=True)
    unshared = sum(count(num_tokens, wanted, shared=False, first=True)) + sum(map(sum, rest))
    return WireBytes(up + sum(u for u, _ in rest) + offloaded, down + sum(d for _, d in rest), unshared + offloaded)


def _reaches_front(config: RunConfig, shapes: BaseShapes, ranks: Mapping[str, int]) -> bool:
    """Whether a module below the host's blocks is active, so that gradients must come through to it."""
    return any(ranks.get(module.name, 0) and module.block < config.model.cut.front for module in shapes.modules)
