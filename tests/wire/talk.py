"""A whole legal session, as the messages of both sides in order, for tests and for the fuzz benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from atoll.wire import protocol_pb2 as pb
from atoll.wire.dialogue import Role
from atoll.wire.encoding import encode
from atoll.wire.frames import Message

GROUPS = (("layers.1.q_proj", "layers.1.k_proj"), ("layers.1.o_proj",), ("layers.2.down_proj",))
SIZES = {"layers.1.q_proj": (8, 8, 2), "layers.1.k_proj": (8, 4, 1), "layers.1.o_proj": (8, 8, 3), "layers.2.down_proj": (12, 8, 2)}
"""d_in, d_out, rank."""
KILLED, KILLED_SHAPES = "layers.2.up_proj", ((2, 8), (12, 2))
"""A module that the host evaluates."""
D_MODEL, LENGTHS, POSITIONS, WANTED = 8, (3, 5), 5, (1, 2, 7, 9)
NUM_TOKENS = sum(LENGTHS)

Said = tuple[Role, Message]


@dataclass(slots=True)
class Talk:
    """Makes sessions; tensors are random, equal for equal talks."""

    mode: str = "dense"
    codec: str = "fp32"
    front_gradient: bool = False
    adapter_codec: str = "bf16"
    groups: tuple[tuple[str, ...], ...] = GROUPS
    has_killed: bool = False
    _random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), init=False)

    def session(self) -> list[Said]:
        """Hello, killed modules, a training exchange, an evaluation exchange, one more training exchange, and Bye."""
        said = [self.hello(), self.welcome(), *([self.killed()] if self.has_killed else [])]
        for number, train in enumerate((True, False, True)):
            said += self.exchange(number, train=train, has_factors=number == 0 or self.mode == "lent", ends_step=number == 0)
        return [*said, ("device", Message(pb.Bye()))]

    def hello(self) -> Said:
        lends = self.mode == "lent"
        modules = [pb.Module(name=name, rank=SIZES[name][2], scaling=2 * lends) for group in self.groups for name in group]
        modules += [pb.Module(name=KILLED, rank=2, killed="offload", scaling=0.5)] if self.has_killed else []
        return "device", Message(pb.Hello(
            protocol=3, atoll_version="0.2.0", base_digest="ba5e", tokenizer_digest="70ce", cut_front=1, cut_back=1, adapter_kind="lora",
            modules=modules, wire_mode=self.mode, codec=self.codec, precision="fp32", max_tokens=16,
            adapter_codec=self.adapter_codec if lends else "", dropout=0.5 * lends,
        ))  # fmt: skip

    def welcome(self) -> Said:
        groups = [pb.Group(modules=group) for group in self.groups]
        return "host", Message(pb.Welcome(session="s", atoll_version="0.2.0", groups=groups, bits=32, max_tokens=64, idle_seconds=60))

    def killed(self) -> Said:
        tensors = [torch.randn(shape, generator=self._random) for shape in KILLED_SHAPES]
        return "device", Message(pb.Killed(), tuple(encode(tensor, "fp32") for tensor in tensors))

    def exchange(self, number: int, *, train: bool, has_factors: bool = True, ends_step: bool = True) -> Iterator[Said]:
        lends = self.mode == "lent"
        has_factors = has_factors and self.mode != "dense"
        front = train and self.front_gradient
        factors = self.factor_shapes() if has_factors else []
        forward = pb.Forward(
            exchange=number, rows=len(LENGTHS), positions=POSITIONS, lengths=LENGTHS, wanted=WANTED, train=train, want_front_gradient=front,
            has_factors=has_factors, generator=b"state" if lends and train else b"",
        )  # fmt: skip
        yield "device", self.message(forward, (NUM_TOKENS, D_MODEL), factors=factors)
        for place, group in enumerate(() if lends else self.groups):
            yield "host", self.message(pb.Input(exchange=number, group=place), (NUM_TOKENS, SIZES[group[0]][0]))
            yield "device", self.message(pb.Output(exchange=number, group=place), *map(self.output_shape, group))
        yield "host", self.message(pb.Hidden(exchange=number), (len(WANTED), D_MODEL))
        if train:
            ends_step = ends_step and lends and bool(self.groups)
            gradient = pb.HiddenGradient(exchange=number, want_factor_gradients=ends_step)
            yield "device", self.message(gradient, (len(WANTED), D_MODEL))
            yield from self.backward(number, front, ends_step)

    def backward(self, number: int, front: bool, ends_step: bool) -> Iterator[Said]:
        for place in reversed(range(0 if self.mode == "lent" else len(self.groups))):
            group, wanted = self.groups[place], place > 0 or front
            of_each = [self.output_shape, self.up_shape] if self.mode == "factored" else [self.output_shape]
            gradient = pb.Gradient(exchange=number, group=place, want_input_gradient=wanted)
            yield "host", self.message(gradient, *(shape(name) for name in group for shape in of_each))
            if wanted:
                yield "device", self.message(pb.InputGradient(exchange=number, group=place), (NUM_TOKENS, SIZES[group[0]][0]))
        factors = self.factor_shapes() if ends_step else []
        yield "host", self.message(pb.Finished(exchange=number), *([(NUM_TOKENS, D_MODEL)] if front else []), factors=factors)

    def factor_shapes(self) -> list[tuple[int, int]]:
        sizes = [SIZES[name] for group in self.groups for name in group]
        if self.mode == "factored":
            return [(rank, d_out) for _, d_out, rank in sizes]
        return [shape for d_in, d_out, rank in sizes for shape in ((rank, d_in), (d_out, rank))]

    def output_shape(self, name: str) -> tuple[int, int]:
        return NUM_TOKENS, SIZES[name][1 if self.mode == "dense" else 2]

    def up_shape(self, name: str) -> tuple[int, int]:
        return SIZES[name][2], SIZES[name][1]

    def message(self, body: object, *shapes: tuple[int, ...], factors: Sequence[tuple[int, ...]] = ()) -> Message:
        each = [(shape, self.codec) for shape in shapes]
        each += [(shape, self.adapter_codec if self.mode == "lent" else self.codec) for shape in factors]
        return Message(body, tuple(encode(torch.randn(shape, generator=self._random), codec) for shape, codec in each))
