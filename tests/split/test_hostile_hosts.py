"""A host that says what it should not is one error page on the device, never a traceback."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
import pytest
import torch

from atoll.adapters.attach import attached
from atoll.base.head import loss_sum
from atoll.errors import AtollError, HostLostError, HostRefusedError, PeerError, ProtocolError
from atoll.split.counted_stream import CountedStream, Transport
from atoll.split.cut import Cut
from atoll.split.transport import ThreadTransport, lost_call
from atoll.training.trainer import FitPlan, TrainState
from atoll.wire import protocol_pb2 as pb
from atoll.wire.dialogue import Dialogue, Role
from atoll.wire.frames import Message

from tests.conftest import random_model
from tests.pieces import Steps, adapters, stream
from tests.split.conftest import BLOCKS, device_trainer, middle_sizes

CUT, D_MODEL = Cut(1, 0), 32
EVIL = "x\n  do        run this\x1b[2J"


class Anything(Dialogue):
    """A dialogue that allows everything."""

    def _advance(self, message: Message, sender: Role) -> None:
        pass


class Hostile(CountedStream):
    """The host's side, that sends what it likes."""

    def sends(self, body: Any, *shapes: tuple[int, int], codec: str = "fp32") -> None:
        self.send(body, [torch.zeros(shape) for shape in shapes], [codec] * len(shapes))

    def welcomes(self) -> tuple[int, dict[str, tuple[int, int]]]:
        """As a host should, each module in a group of its own; the tokens of the first exchange, and the modules' sizes."""
        hello = self.receive().body
        groups = [pb.Group(modules=[module.name]) for module in hello.modules]
        self.sends(pb.Welcome(session="s", groups=groups, max_tokens=hello.max_tokens))
        sizes = middle_sizes(random_model("llama", BLOCKS), CUT)
        return self.receive().tensors[0].shape[0], {module.name: sizes[module.name] for module in hello.modules}


def hostile(script: Callable[[Hostile], None]) -> Callable[[], Transport]:
    def connect() -> Transport:
        near, far = ThreadTransport.pair()

        def run() -> None:
            host = Hostile(Anything("host"), far, "fp32")
            host.allow(2**24)
            with suppress(AtollError):
                script(host)
                host.receive()
            far.close()

        threading.Thread(target=run, daemon=True).start()
        return near

    return connect


def refused(script: Callable[[Hostile], None], codec: str = "fp32") -> PeerError:
    """Why a device leaves this host."""
    trainer, _ = device_trainer("llama", CUT, hostile(script), codec=codec)
    with pytest.raises(PeerError) as caught:
        trainer.fit(TrainState(adapters(random_model("llama", BLOCKS)), {}, 0), stream(), FitPlan(1, 1, False), Steps([]))
    assert caught.value.page().replace("\n", "").isprintable()
    return caught.value


@pytest.mark.parametrize("width", [1, D_MODEL - 1, D_MODEL + 1, 4096])
def test_an_input_of_another_width(width: int) -> None:
    def script(host: Hostile) -> None:
        num_tokens, _ = host.welcomes()
        host.sends(pb.Input(), (num_tokens, width))

    problem = refused(script)
    assert isinstance(problem, ProtocolError)
    assert f"x{width}" in problem.got
    assert f"x{D_MODEL}" in problem.expected


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_an_input_in_another_codec(codec: str) -> None:
    def script(host: Hostile) -> None:
        num_tokens, _ = host.welcomes()
        host.sends(pb.Input(), (num_tokens, D_MODEL), codec=codec)

    problem = refused(script)
    assert (problem.got, problem.expected) == (codec, "fp32")


def test_groups_that_cannot_read_the_same() -> None:
    def script(host: Hostile) -> None:
        hello = host.receive().body
        host.sends(pb.Welcome(session="s", groups=[pb.Group(modules=[module.name for module in hello.modules])]))

    assert "do not read the same" in refused(script).what


@pytest.mark.parametrize("body", [pb.Hidden(), pb.Finished(), pb.Gradient(), pb.Bye(), pb.Welcome(), pb.FilePart(), pb.Forward()], ids=repr)
def test_any_other_message_where_an_input_should_come(body: Any) -> None:
    def script(host: Hostile) -> None:
        host.welcomes()
        host.sends(body)

    assert isinstance(refused(script), ProtocolError)


def test_a_refusal_in_a_hosts_own_words() -> None:
    def script(host: Hostile) -> None:
        host.receive()
        host.sends(pb.Refusal(code="unfit", field=EVIL, host_value=EVIL, device_value=EVIL, do=EVIL))

    problem = refused(script)
    assert isinstance(problem, HostRefusedError)
    assert "\n" not in problem.what + problem.got + problem.expected + problem.do


def test_what_a_device_tells_of_a_loss_is_one_line() -> None:
    def script(host: Hostile) -> None:
        host.receive()
        host.sends(pb.Refusal(code="busy", device_value=EVIL))

    trainer, client = device_trainer("llama", CUT, hostile(script), patience=0.4)
    told: list[str] = []
    client.on_lost = told.append
    with pytest.raises(HostLostError):
        trainer.fit(TrainState(adapters(random_model("llama", BLOCKS)), {}, 0), stream(), FitPlan(1, 1, False), Steps([]))
    assert told
    assert all(line.isprintable() for line in told)


def test_the_words_of_a_status_are_one_line() -> None:
    for code in grpc.StatusCode:
        assert lost_call(code, EVIL).got.isprintable()


def test_the_script_of_a_host_that_behaves_passes() -> None:
    """The control: but for what the tests above do otherwise, all of this is right."""
    seen: list[Message] = []

    def script(host: Hostile) -> None:
        num_tokens, sizes = host.welcomes()
        for group, (d_in, _) in enumerate(sizes.values()):
            host.sends(pb.Input(group=group), (num_tokens, d_in))
            seen.append(host.receive())
        host.sends(pb.Hidden(), (stream().batch(0).num_label_tokens, D_MODEL))
        seen.append(host.receive())
        host.transport.close()

    trainer, _ = device_trainer("llama", CUT, hostile(script))
    with attached(trainer.base.model, adapters(random_model("llama", BLOCKS))), pytest.raises(HostLostError):
        loss_sum(trainer.base.model, stream().batch(0)).backward()
    assert [message.kind for message in seen][-2:] == ["output", "hidden_gradient"]
