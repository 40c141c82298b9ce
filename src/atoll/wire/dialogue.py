"""The dialogue as a state machine without I/O: who may say what now, and of which size. Both sides run it, on what they send and receive.

A state is the kind of message that comes next; "forward" is the pause between two exchanges.
n: real tokens of the micro-batch. w: wanted ones. d: width of the hidden state. r: rank of a module's adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

import numpy as np

from atoll.errors import ProtocolError
from atoll.wire.frames import Message

Role = Literal["device", "host"]
State = Literal[
    "hello", "welcome", "killed", "forward", "input", "output", "hidden", "hidden_gradient", "gradient", "input_gradient", "finished",
    "closed",
]  # fmt: skip
Size = int | None
"""Of one dimension; None where only the engine can know it."""

TURNS: Final[dict[State, Role]] = {
    "hello": "device", "welcome": "host", "killed": "device", "forward": "device", "input": "host", "output": "device", "hidden": "host",
    "hidden_gradient": "device", "gradient": "host", "input_gradient": "device", "finished": "host",
}  # fmt: skip
"""Who sends the message that a state is named after."""
ENDINGS: Final[dict[str, Role]] = {"bye": "device", "refusal": "host"}
"""What may be sent at any time before the end, and by whom."""
INTERLUDES: Final[dict[str, Role]] = {"wait": "host"}
"""What may be sent, and by whom, where it is that side's turn within an exchange; it stays so."""


@dataclass(slots=True)
class _Exchange:
    """What the running exchange must keep to."""

    train: bool
    want_front_gradient: bool
    num_tokens: int
    num_wanted: int
    d_model: int
    d_in: list[int]
    """Of each group whose Input has been seen."""
    want_factor_gradients: bool = False
    keep: bool = False
    held: tuple[int, int] = (0, 0)
    """Rows, and positions of each with those that it follows."""
    follows: int = 0


class Dialogue:
    """One session, as one side of it sees it."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state: State = "hello"
        self.exchange = 0
        """Number of the exchange that runs or comes next."""
        self.groups: tuple[tuple[str, ...], ...] = ()
        """Active modules by group, from Welcome."""
        self._mode, self._max_tokens, self._codec, self._adapter_codec = "", 0, "", ""
        self._ranks: dict[str, int] = {}
        """Of trained modules."""
        self._killed_ranks: list[int] = []
        self._d_out: dict[str, int] = {}
        self._factor_shapes: list[tuple[int, ...]] = []
        """Of the factors that hold, in lent mode; empty where none do."""
        self._held: tuple[int, int] | None = None
        """Rows and positions whose keys and values the host keeps."""
        self._group = 0
        self._now = _Exchange(False, False, 0, 0, 0, [])

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        return self.state == "closed"

    def sent(self, message: Message) -> None:
        """This side sends a message.

        Raises: ProtocolError where it must not; the state stays as it was.
        """
        self._advance(message, self.role)

    def received(self, message: Message) -> None:
        """The other side sent a message.

        Raises: ProtocolError where it must not; the state stays as it was.
        """
        self._advance(message, "host" if self.role == "device" else "device")

    def _advance(self, message: Message, sender: Role) -> None:
        kind = message.kind
        if not self.closed and ENDINGS.get(kind) == sender:
            self._check_tensors(message, [])
            self.state = "closed"
        elif INTERLUDES.get(kind) == sender == TURNS.get(self.state) and self.state != "welcome":
            self._check_tensors(message, [])
        elif (kind != self.state or TURNS[self.state] != sender) and not self._says_evicted(message, sender):
            turn = "nothing more" if self.closed else f"{self.state} from the {TURNS[self.state]}"
            self._refuse("a message that the dialogue does not allow now", f"{kind} from the {sender}", turn)
        else:
            self._check_numbers(message)
            self.state = getattr(self, f"_{kind}")(message)

    def _says_evicted(self, message: Message, sender: Role) -> bool:
        """Whether the host says, before anything else, that it no longer has what the exchange follows."""
        return message.kind == "hidden" and sender == "host" and self.state == "input" and self._group == 0 and message.body.evicted

    def _check_numbers(self, message: Message) -> None:
        if self.state in ("hello", "welcome", "killed"):
            return
        if message.body.exchange != self.exchange:
            self._refuse("a message of another exchange", str(message.body.exchange), str(self.exchange))
        if message.kind in ("input", "output", "gradient", "input_gradient") and message.body.group != self._group:
            self._refuse("a group out of order", str(message.body.group), str(self._group))

    # One method for each kind: check it, remember what later ones must keep to, return the next state.

    def _hello(self, message: Message) -> State:
        self._check_tensors(message, [])
        self._mode, self._adapter_codec = message.body.wire_mode, message.body.adapter_codec
        self._ranks = {module.name: module.rank for module in message.body.modules if not module.killed}
        self._killed_ranks = [module.rank for module in message.body.modules if module.killed]
        self._max_tokens, self._codec = message.body.max_tokens, message.body.codec
        return "welcome"

    def _welcome(self, message: Message) -> State:
        self._check_tensors(message, [])
        groups = tuple(tuple(group.modules) for group in message.body.groups)
        named = [name for group in groups for name in group]
        if sorted(named) != sorted(self._ranks) or not all(groups):
            expected = f"{len(self._ranks)} modules, each once"
            self._refuse("groups that are not the trained modules of Hello", f"{len(named)} modules", expected)
        self.groups, self._max_tokens = groups, min(self._max_tokens, message.body.max_tokens or self._max_tokens)
        return "killed" if self._killed_ranks else "forward"

    def _killed(self, message: Message) -> State:
        # Sent once and evaluated for a whole epoch: what the session's codec loses would count in every step.
        sizes = [size for rank in self._killed_ranks for size in ((rank, None), (None, rank))]
        self._check_tensors(message, sizes, ["fp32"] * len(sizes))
        return "forward"

    def _forward(self, message: Message) -> State:
        now = self._layout(message.body)
        factors = self._factors(message.body.has_factors)
        codec = self._adapter_codec if self._mode == "lent" else self._codec
        self._check_tensors(message, [(now.num_tokens, None), *factors], [self._codec, *([codec] * len(factors))])
        if factors and self._mode == "lent":
            self._factor_shapes = [tensor.shape for tensor in message.tensors[1:]]
        elif factors:
            names = [name for group in self.groups for name in group]
            self._d_out = {name: tensor.shape[1] for name, tensor in zip(names, message.tensors[1:], strict=True)}
        now.d_model = message.tensors[0].shape[1]
        self._now, self._group = now, 0
        if now.train or factors:  # What is kept was made with the factors of before.
            self._held = None
        return "input" if self.groups and self._mode != "lent" else "hidden"

    def _factors(self, has_factors: bool) -> list[tuple[Size, Size]]:
        """Sizes of the factors of Forward."""
        names = [name for group in self.groups for name in group]
        if has_factors:
            if self._mode == "dense":
                self._refuse("factors in dense mode", "has_factors", "no factors")
            ranks = [self._ranks[name] for name in names]
            return [size for rank in ranks for size in (((rank, None), (None, rank)) if self._mode == "lent" else ((rank, None),))]
        if names and not (self._mode == "dense" or self._d_out or self._factor_shapes):
            self._refuse("an exchange without factors, of which none hold", "no factors", "has_factors")
        return []

    def _input(self, message: Message) -> State:
        self._check_tensors(message, [(self._now.num_tokens, None)])
        self._now.d_in.append(message.tensors[0].shape[1])
        return "output"

    def _output(self, message: Message) -> State:
        names = self.groups[self._group]
        factored = self._mode == "factored"
        self._check_tensors(message, [(self._now.num_tokens, self._ranks[name] if factored else None) for name in names])
        if not factored:
            self._d_out |= {name: tensor.shape[1] for name, tensor in zip(names, message.tensors, strict=True)}
        self._group += 1
        return "input" if self._group < len(self.groups) else "hidden"

    def _hidden(self, message: Message) -> State:
        now, body = self._now, message.body
        if (body.kept and not now.keep) or (body.evicted and not now.follows):
            self._refuse("an answer about keys and values that was not asked for", "kept or evicted", "neither")
        if body.evicted:
            self._check_tensors(message, [])
            self._held = None
            return self._end()
        self._check_tensors(message, [(now.num_wanted, now.d_model)])
        if now.keep:
            self._held = now.held if body.kept else None
        return "hidden_gradient" if now.train else self._end()

    def _hidden_gradient(self, message: Message) -> State:
        self._check_tensors(message, [(self._now.num_wanted, self._now.d_model)])
        self._now.want_factor_gradients = message.body.want_factor_gradients
        if self._now.want_factor_gradients and not self._factor_shapes:
            self._refuse("gradients of factors asked for that the host does not have", "want_factor_gradients", "factors lent before")
        return "finished" if self._mode == "lent" else self._backwards()

    def _gradient(self, message: Message) -> State:
        sizes: list[tuple[Size, Size]] = []
        for name in self.groups[self._group]:
            rank, d_out = self._ranks[name], self._d_out[name]
            sizes += [(self._now.num_tokens, rank), (rank, d_out)] if self._mode == "factored" else [(self._now.num_tokens, d_out)]
        self._check_tensors(message, sizes)
        if not message.body.want_input_gradient:
            return self._backwards()
        if self._group == 0 and not self._now.want_front_gradient:
            self._refuse("a gradient asked for that leads nowhere", "want_input_gradient for group 0", "want_front_gradient before")
        return "input_gradient"

    def _input_gradient(self, message: Message) -> State:
        self._check_tensors(message, [(self._now.num_tokens, self._now.d_in[self._group])])
        return self._backwards()

    def _finished(self, message: Message) -> State:
        front = [(self._now.num_tokens, self._now.d_model)] if self._now.want_front_gradient else []
        factors = self._factor_shapes if self._now.want_factor_gradients else []
        codecs = [self._codec] * len(front) + [self._adapter_codec] * len(factors)
        self._check_tensors(message, [*front, *((rows, columns) for rows, columns in factors)], codecs)
        if factors:  # The step is over, and the host has forgotten them.
            self._factor_shapes = []
        return self._end()

    def _backwards(self) -> State:
        self._group -= 1
        return "gradient" if self._group >= 0 else "finished"

    def _end(self) -> State:
        self.exchange += 1
        return "forward"

    def _layout(self, forward: Any) -> _Exchange:
        """The positions of a micro-batch, once they are known to be right."""
        num_positions = forward.rows * forward.positions
        if not 1 <= num_positions <= self._max_tokens:
            self._refuse("a micro-batch of another size than agreed", f"{forward.rows} rows of {forward.positions} positions",
                         f"1 to {self._max_tokens} positions in all")  # fmt: skip
        lengths = np.array(forward.lengths or [forward.positions] * forward.rows, dtype=np.int64)
        # Positions that no row fills would cost the host as much as tokens do.
        if len(lengths) != forward.rows or lengths.max() != forward.positions or lengths.min() < 1:
            self._refuse("row lengths that do not fit their rows", f"{len(lengths)} lengths up to {lengths.max()}",
                         f"{forward.rows} lengths of 1 to {forward.positions}, which is the longest one")  # fmt: skip
        if len(forward.position_ids) not in (0, num_positions):
            self._refuse("position ids that do not fit the rows", f"{len(forward.position_ids)}", f"{num_positions} or none")
        wanted = np.array(forward.wanted, dtype=np.int64)
        row, place = np.divmod(wanted, forward.positions)
        if (wanted >= num_positions).any() or (place >= lengths[row]).any():
            self._refuse("a wanted position that is no real token", f"some of {len(wanted)}", "real tokens only")
        if len(np.unique(wanted)) != len(wanted):
            self._refuse("a position wanted twice", f"{len(wanted)} positions", "each once")
        if forward.want_front_gradient and not forward.train:
            self._refuse("a gradient asked for without a backward pass", "want_front_gradient without train", "train")
        held = self._kept_layout(forward, lengths)
        num_tokens = int(lengths.sum())
        return _Exchange(
            forward.train, forward.want_front_gradient, num_tokens, len(wanted) or num_tokens, 0, [], False, forward.keep, held,
            forward.follows,
        )  # fmt: skip

    def _kept_layout(self, forward: Any, lengths: np.ndarray) -> tuple[int, int]:
        """Rows and positions that are kept when this is over."""
        if forward.keep and (forward.train or forward.position_ids):
            self._refuse("keys and values kept of a training pass, or of packed rows", "keep", "keep in evaluation, of one text a row")
        if forward.follows:
            held = (forward.rows, forward.follows)
            if held != self._held or not forward.keep or forward.has_factors or lengths.min() != forward.positions:
                self._refuse("positions that follow none which the host keeps", f"{held[0]} full rows after {held[1]} positions",
                             "with keep, without factors, " + ("nothing is kept" if self._held is None else
                             f"{self._held[0]} full rows after {self._held[1]} positions"))  # fmt: skip
            if forward.rows * (forward.follows + forward.positions) > self._max_tokens:
                self._refuse("a micro-batch of another size than agreed", f"{forward.rows} rows of {forward.follows + forward.positions} "
                             "positions with those before", f"1 to {self._max_tokens} positions in all")  # fmt: skip
        return forward.rows, forward.follows + forward.positions

    def _check_tensors(self, message: Message, sizes: Sequence[tuple[Size, Size]], codecs: Sequence[str] | None = None) -> None:
        """Tensors of these sizes, in the session's codec or in these."""
        shapes = [tensor.shape for tensor in message.tensors]
        fits = len(shapes) == len(sizes) and all(
            len(shape) == 2 and all(entry > 0 and size in (None, entry) for size, entry in zip(wanted, shape, strict=True))
            for shape, wanted in zip(shapes, sizes, strict=True)
        )
        if not fits:
            expected = ", ".join(f"({', '.join('any' if size is None else str(size) for size in pair)})" for pair in sizes) or "no tensors"
            self._refuse(f"tensors of {message.kind} that do not fit", ", ".join(map(str, shapes[:8])) or "none", expected)
        agreed = codecs or [self._codec] * len(sizes)
        other = next((place for place, tensor in enumerate(message.tensors) if tensor.codec != agreed[place]), None)
        if other is not None:
            self._refuse(f"tensors of {message.kind} in another codec than agreed", message.tensors[other].codec, agreed[other])

    def _refuse(self, what: str, got: str, expected: str) -> NoReturn:
        raise ProtocolError(
            what, where=f"split protocol, {self.role}, exchange {self.exchange}, state {self.state}",
            got=got, expected=expected, do="use the same version of Atoll on both sides",
        )  # fmt: skip
