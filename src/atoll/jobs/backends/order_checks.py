"""What an edge looks at before it follows an order: whether it is meant, and asks for no more than run.toml and its own policy let it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from atoll.adapters.state import AdapterState
from atoll.adapters.targets import resolve_targets
from atoll.config.document import few
from atoll.config.schema import Edge, RunConfig
from atoll.errors import OrderRefusedError
from atoll.federated.figures import shown
from atoll.jobs.backends.edge_policy import POLICY_FILE, EdgePolicy, policy_of
from atoll.jobs.backends.work_orders import SentOrder
from atoll.planner.costs import wire_modes
from atoll.shapes import BaseShapes
from atoll.units import counted

_LONGEST_LABEL = 1000
Problem = tuple[str, str]
"""What an order says, and what it may."""


@dataclass(frozen=True, slots=True)
class OrderChecks:
    """All that one edge knows when an order comes."""

    config: RunConfig
    """Of the whole run, as it lies on this edge."""
    edge: Edge
    num_rows: int
    labels: Sequence[str]
    """The classes of its rows."""
    policy: EdgePolicy

    def check(self, sent: SentOrder, task: str, number: int | None, shapes: BaseShapes) -> None:
        """Whether an order may be followed; `number` is the round that is asked for, where one is.

        Raises: OrderRefusedError with all that is wrong.
        """
        by_run, plan = policy_of(self.config, self.edge, self.num_rows), sent.order.plan
        if task == "personal":
            by_run = by_run.model_copy(update={"steps": self.config.federated.personal_steps})
        found = [*self._not_meant(sent, number), *self._modules(sent, shapes, by_run.rank), *self._labels(sent)]
        found += [*_beyond(sent, task, by_run, "run.toml"), *_beyond(sent, task, self.policy, POLICY_FILE)]
        if by_run.steps is not None and not 0 < sent.order.total_steps <= self.config.run.rounds * by_run.steps:
            found.append((f"{shown(sent.order.total_steps)} steps in all", f"1 to {self.config.run.rounds * by_run.steps} (run.toml)"))
        train = self.config.train
        most = max(train.accumulate, -(-train.batch_size * train.accumulate // max(1, plan.batch_size)))
        if not 0 < plan.accumulate <= most:
            found.append((f"accumulate = {shown(plan.accumulate)}", f"1 to {most} (run.toml)"))
        if plan.wire_mode not in (wire_modes(self.config.wire) if plan.mode == "split" else (None,)):
            found.append((f"wire mode {shown(plan.wire_mode)}", f"{self.config.wire.mode} (run.toml) with a host, and none without"))
        self._refuse(found)

    def check_adapter(self, adapter: AdapterState, sent: SentOrder) -> None:
        """Whether an adapter to train is of the modules and ranks of the order.

        Raises: OrderRefusedError.
        """
        ranks = {name: rank for name, rank in sent.order.plan.ranks.items() if name not in adapter.full_weights}
        own = {name: one.rank for name, one in adapter.modules.items()}
        other = [name for name in {**ranks, **own} if ranks.get(name) != own.get(name)]
        self._refuse([(f"rank {own.get(name)} of {shown(name)}", f"rank {ranks.get(name)}, as in the order") for name in other])

    def _refuse(self, found: Sequence[Problem]) -> None:
        if found:
            raise OrderRefusedError(
                "an order that this edge does not follow", where=f"edge {self.edge.name}", got=few([got for got, _ in found]),
                expected=few([expected for _, expected in found]),
                do=f"give every machine the same run.toml; what {POLICY_FILE} forbids is for the edge's owner to allow",
            )  # fmt: skip

    def _not_meant(self, sent: SentOrder, number: int | None) -> Iterator[Problem]:
        order, rounds, name = sent.order, self.config.run.rounds, self.edge.name
        if (order.edge, order.plan.name) != (name, name):
            yield f"an order for {shown(order.edge)}, and a plan of {shown(order.plan.name)}", name
        if number is not None and not 1 <= number <= rounds:
            yield f"round {shown(number)}", f"1 to {rounds} (run.toml)"
        if not 0 <= order.rounds_before <= (rounds if number is None else number - 1):
            yield f"an order after round {shown(order.rounds_before)}", "one from before this round"

    def _modules(self, sent: SentOrder, shapes: BaseShapes, most: int | None) -> Iterator[Problem]:
        sizes = {module.name: max(module.d_in, module.d_out) for module in shapes.modules}
        given = self.config.adapter.start is not None
        pool = set(sizes) if given else set(resolve_targets(self.config.adapter.targets, shapes.modules))
        if not set(sent.pool) <= pool or len(sent.pool) > len(pool) or not (given or len(sent.pool) == len(pool)):
            yield f"a pool of {counted(len(sent.pool), 'module')}", "the targets of run.toml"
        for name, rank in sent.order.plan.ranks.items():
            # Where run.toml does not say the rank, no adapter is wider than its module.
            if name not in sent.pool or not 0 < rank <= (most or sizes.get(name, 0)):
                yield f"rank {shown(rank)} for {shown(name)}", f"1 to {most or sizes.get(name, 0)}, for modules of the pool"

    def _labels(self, sent: SentOrder) -> Iterator[Problem]:
        named = self.config.evaluate.labels
        if self.config.model.task == "generate":
            if sent.labels:
                yield counted(len(sent.labels), "class"), 'none: task = "generate" (run.toml)'
        elif named is not None and sent.labels != named:
            yield counted(len(sent.labels), "class"), "those of [evaluate] labels (run.toml)"
        elif len(set(sent.labels)) < max(2, len(sent.labels)) or not set(self.labels) <= set(sent.labels):
            yield counted(len(sent.labels), "class"), "different ones, and those of this edge's rows among them"
        if any(len(label) > _LONGEST_LABEL for label in sent.labels):
            yield "a class with a longer name", f"at most {_LONGEST_LABEL} characters"


def _beyond(sent: SentOrder, task: str, policy: EdgePolicy, file: str) -> Iterator[Problem]:
    """Where an order asks for more than a policy, which stands in this file, lets it."""
    plan = sent.order.plan
    numbers: Mapping[str, tuple[int, int | None]] = {
        "steps a round": (plan.num_steps, policy.steps), "as the largest rank": (max(plan.ranks.values(), default=1), policy.rank),
        "rows a micro-batch": (plan.batch_size, policy.batch_size),
        "rows a micro-batch, for importance": (1 if plan.warm_up is None else plan.warm_up.batch_size, policy.batch_size),
    }  # fmt: skip
    for what, (value, most) in numbers.items():
        if value < 1 or (most is not None and value > most):
            yield f"{shown(value)} {what}", f"{'1 or more' if most is None else f'1 to {most}'} ({file})"
    for what, one, allowed in (("bits", plan.bits, policy.bits), ("mode", plan.mode, policy.modes), ("task", task, policy.tasks)):
        if allowed is not None and one not in allowed:
            yield f"{what} {shown(one)}", f"{' or '.join(map(str, allowed))} ({file})"
