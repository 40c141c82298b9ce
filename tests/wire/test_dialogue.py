"""The dialogue: whole sessions pass on both sides, and whatever else is said in any state is refused and changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from atoll.errors import ProtocolError
from atoll.wire import protocol_pb2 as pb
from atoll.wire.dialogue import TURNS, Dialogue, Role
from atoll.wire.encoding import Encoded, encode
from atoll.wire.frames import Message

from tests.wire.talk import D_MODEL, GROUPS, SIZES, Said, Talk

KINDS = {kind.name: getattr(pb, kind.message_type.name) for kind in pb.Message.DESCRIPTOR.oneofs_by_name["body"].fields}
ROLES: tuple[Role, Role] = ("device", "host")
TALKS = [Talk(mode, front_gradient=front, has_killed=True) for mode in ("dense", "factored", "lent") for front in (False, True)]


def tell(dialogue: Dialogue, said: Said) -> None:
    sender, message = said
    (dialogue.sent if sender == dialogue.role else dialogue.received)(message)


def after(talk: list[Said], count: int, role: Role = "host") -> Dialogue:
    dialogue = Dialogue(role)
    for said in talk[:count]:
        tell(dialogue, said)
    return dialogue


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("talk", TALKS, ids=lambda talk: f"{talk.mode}-{talk.front_gradient}")
def test_a_whole_session_passes(talk: Talk, role: Role) -> None:
    dialogue, states = Dialogue(role), []
    for sender, message in talk.session():
        assert not dialogue.closed
        assert dialogue.state == message.kind or message.kind == "bye"
        tell(dialogue, (sender, message))
        states.append(dialogue.state)
    assert dialogue.closed
    assert dialogue.exchange == 3
    assert dialogue.groups == GROUPS
    of_groups = {"input", "output", "gradient", "input_gradient"} if talk.mode == "lent" else set()
    assert set(states) == set(TURNS) - {"hello"} - of_groups | {"closed"}


@pytest.mark.parametrize("role", ROLES)
def test_an_evaluation_ends_with_hidden(role: Role) -> None:
    talk = Talk()
    said = [talk.hello(), talk.welcome(), *talk.exchange(0, train=False)]
    assert [message.kind for _, message in said[2:]] == ["forward", *["input", "output"] * 3, "hidden"]
    assert after(said, len(said), role).state == "forward"


@pytest.mark.parametrize("role", ROLES)
def test_a_session_without_adapters_has_no_groups(role: Role) -> None:
    said = Talk(groups=()).session()
    assert {message.kind for _, message in said} & {"input", "output", "gradient", "input_gradient"} == set()
    assert after(said, len(said), role).closed


@pytest.mark.parametrize("mode", ["dense", "factored", "lent"])
def test_every_other_kind_in_every_state_is_refused(mode: str) -> None:
    """By each sender, on both sides; only the ending of the sender passes, and a host's word that it will answer later."""
    said = Talk(mode, front_gradient=True, has_killed=True).session()
    for count, role in itertools.product(range(len(said) + 1), ROLES):
        for sender, (kind, body) in itertools.product(ROLES, KINDS.items()):
            over = count == len(said)
            # Where the session says Bye, it could go on as well.
            legal = [] if over else [(said[count][0], said[count][1].kind if said[count][1].kind != "bye" else "forward")]
            if (sender, kind) in legal:
                continue
            ending = not over and (sender, kind) in (("device", "bye"), ("host", "refusal"))
            dialogue = after(said, count, role)
            before = dialogue.state
            later = (sender, kind) == ("host", "wait") and TURNS.get(before) == "host" and before != "welcome"
            if later:
                tell(dialogue, (sender, Message(body())))
                assert dialogue.state == before
            elif ending:
                tell(dialogue, (sender, Message(body())))
                assert dialogue.closed
            else:
                with pytest.raises(ProtocolError, match="does not allow now") as caught:
                    tell(dialogue, (sender, Message(body())))
                assert dialogue.state == before
                assert before in caught.value.where
                assert f"{kind} from the {sender}" == caught.value.got


@pytest.mark.parametrize("mode", ["dense", "factored", "lent"])
def test_other_numbers_and_sizes_are_refused_in_every_state(mode: str) -> None:
    """Another exchange, another group, a tensor more, less or of another size; after each refusal the right message still passes."""
    said = Talk(mode, front_gradient=True, has_killed=True).session()
    dialogue, count = Dialogue("host"), 0
    for sender, message in said:
        for wrong in wrong_ones(message):
            before = dialogue.state
            with pytest.raises(ProtocolError):
                tell(dialogue, (sender, wrong))
            assert dialogue.state == before
            count += 1
        tell(dialogue, (sender, message))
    assert dialogue.closed
    assert count > (200 if mode != "lent" else 100)


def wrong_ones(message: Message) -> list[Message]:
    body, tensors, wrong = message.body, message.tensors, []
    for field in ("exchange", "group"):
        if field in body.DESCRIPTOR.fields_by_name:
            other = type(body).FromString(body.SerializeToString())
            setattr(other, field, getattr(body, field) + 1)
            wrong.append(Message(other, tensors))
    extra = encode(torch.zeros(3, 3), "fp32")
    lends = message.kind == "forward" and len(tensors) == 1 + 2 * len([name for group in GROUPS for name in group])
    wrong.append(Message(body, (*tensors, extra)))
    for place, tensor in enumerate(tensors):
        rows, width = tensor.shape
        # The width of h and of x is the base's, which only the engines know; that of the deltas becomes known with them. Of a killed
        # module's matrices the rank alone is known: rows of the first, width of the second.
        down, up = (message.kind == "killed" and place % 2 == side for side in (0, 1))
        if lends and place > 0:  # Of lent factors, too.
            down, up = (place % 2 == side for side in (1, 0))
        free = message.kind in ("forward", "input") or (message.kind == "output" and rows != 0) or down
        shapes = [(rows, 0), (width * rows,), (1, rows, width)]
        shapes += [*([] if up else [(rows + 1, width)]), *([] if free else [(rows, width + 1)])]
        wrong += [Message(body, (*tensors[:place], encode(torch.zeros(s), "fp32"), *tensors[place + 1 :])) for s in shapes]
        wrong.append(Message(body, tensors[:place] + tensors[place + 1 :]))
    return wrong


def change(fields: dict[str, object]) -> Callable[[pb.Forward], None]:
    def apply(forward: pb.Forward) -> None:
        for name in fields:
            forward.ClearField(name)
        forward.MergeFrom(pb.Forward(**fields))

    return apply


@pytest.mark.parametrize("fields", [
    {"rows": 0}, {"positions": 0}, {"rows": 4}, {"positions": 9}, {"rows": 2**32 - 1}, {"positions": 4}, {"lengths": [8]},
    {"positions": 6, "wanted": []}, {"positions": 8, "wanted": []}, {"lengths": [2, 6], "wanted": []},
    {"rows": 3, "lengths": [3, 5, 0]}, {"lengths": [4, 5]}, {"lengths": []}, {"wanted": [10]},
    {"wanted": [0, 3]}, {"wanted": [1, 1]}, {"wanted": [2**32 - 1]}, {"position_ids": [0, 1, 2]}, {"has_factors": True}, {"train": False},
], ids=str)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused(fields: dict[str, object]) -> None:
    said = Talk(front_gradient=True).session()
    forward = pb.Forward.FromString(said[2][1].body.SerializeToString())
    change(fields)(forward)
    with pytest.raises(ProtocolError):
        tell(after(said, 2), ("device", Message(forward, said[2][1].tensors)))


def test_position_ids_for_all_positions_pass() -> None:
    said = Talk().session()
    forward = pb.Forward.FromString(said[2][1].body.SerializeToString())
    change({"position_ids": [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]})(forward)
    dialogue = after(said, 2)
    tell(dialogue, ("device", Message(forward, said[2][1].tensors)))
    assert dialogue.state == "input"


def test_the_smaller_promise_bounds_a_micro_batch() -> None:
    """Talk's Hello promises 16 positions and its batches have 10."""
    said = Talk().session()
    for promised, offered, passes in ((16, 0, True), (16, 10, True), (16, 9, False), (10, 64, True), (9, 64, False), (0, 0, False)):
        said[0][1].body.max_tokens, said[1][1].body.max_tokens = promised, offered
        if passes:
            after(said, 3)
        else:
            with pytest.raises(ProtocolError, match="another size than agreed"):
                after(said, 3)


@pytest.mark.parametrize("groups", [
    [["layers.1.q_proj"]], [*map(list, GROUPS), ["layers.9.q_proj"]], [*map(list, GROUPS), ["layers.1.q_proj"]],
    [*map(list, GROUPS), []], [],
], ids=["missing", "unknown", "twice", "empty", "none"])  # fmt: skip
def test_groups_are_the_modules_of_hello(groups: list[list[str]]) -> None:
    dialogue = after([Talk().hello()], 1, "device")
    with pytest.raises(ProtocolError, match="not the trained modules of Hello"):
        dialogue.received(Message(pb.Welcome(groups=[pb.Group(modules=names) for names in groups])))


def test_killed_modules_come_in_full_precision() -> None:
    """Sent once and evaluated for a whole epoch: what a codec loses there would count in every step."""
    said = Talk(has_killed=True, codec="int8").session()
    lossy = tuple(encode(torch.ones(tensor.shape), "int8") for tensor in said[2][1].tensors)
    with pytest.raises(ProtocolError, match="in another codec"):
        tell(after(said, 2), ("device", Message(pb.Killed(), lossy)))
    assert after(said, 3).state == "forward"


@pytest.mark.parametrize("mode", ["dense", "factored"])
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_every_tensor_has_the_codec_of_hello(mode: str, codec: str) -> None:
    """By both senders, in every message that has tensors; after each refusal the right message still passes."""
    said, dialogue, refused = Talk(mode, codec, front_gradient=True).session(), Dialogue("host"), set()
    for sender, message in said:
        for place, tensor in enumerate(message.tensors):
            for other in sorted({"fp32", "bf16", "int8"} - {codec}):
                wrong = (*message.tensors[:place], encode(torch.ones(tensor.shape), other), *message.tensors[place + 1 :])  # type: ignore[arg-type]
                with pytest.raises(ProtocolError, match="in another codec than agreed") as caught:
                    tell(dialogue, (sender, Message(message.body, wrong)))
                assert (caught.value.got, caught.value.expected) == (other, codec)
                refused.add(message.kind)
        tell(dialogue, (sender, message))
    assert refused == {"forward", "input", "output", "hidden", "hidden_gradient", "gradient", "input_gradient", "finished"}


def test_plain_bytes_are_no_tensor_of_a_session() -> None:
    said = Talk().session()
    with pytest.raises(ProtocolError, match="in another codec than agreed"):
        tell(after(said, 2), ("device", Message(said[2][1].body, (Encoded("raw", said[2][1].tensors[0].shape, b""),))))


def test_no_gradient_is_asked_for_that_leads_nowhere() -> None:
    """Below the lowest group nothing of the device wants one: a device that made it would fail within torch."""
    talk = Talk()
    said = [talk.hello(), talk.welcome(), *talk.exchange(0, train=True)]
    (place,) = (at for at, (_, message) in enumerate(said) if message.kind == "gradient" and message.body.group == 0)
    hostile = pb.Gradient(group=0, want_input_gradient=True)
    for role in ROLES:
        with pytest.raises(ProtocolError, match="leads nowhere"):
            tell(after(said, place, role), ("host", Message(hostile, said[place][1].tensors)))
    assert after(said, len(said)).state == "forward"


def test_factors_must_come_once() -> None:
    """Later exchanges may leave them out; that is what a Talk does."""
    talk = Talk("factored")
    said = [talk.hello(), talk.welcome(), *talk.exchange(0, train=True, has_factors=False)]
    with pytest.raises(ProtocolError, match="without factors, of which none hold"):
        after(said, 3)


def test_lent_factors_hold_until_their_gradients_have_gone_back() -> None:
    """Over the micro-batches of a step, and over evaluations; the next step brings its own."""
    talk = Talk("lent")
    said = [talk.hello(), talk.welcome(), *talk.exchange(0, train=True, ends_step=False)]
    said += [*talk.exchange(1, train=False, has_factors=False), *talk.exchange(2, train=True, has_factors=False)]
    assert [message.kind for _, message in said[2:6]] == ["forward", "hidden", "hidden_gradient", "finished"]
    assert (len(said[5][1].tensors), len(said[-1][1].tensors)) == (0, 8)
    with pytest.raises(ProtocolError, match="without factors, of which none hold"):
        after([*said, *talk.exchange(3, train=True, has_factors=False)], len(said) + 1)
    assert after([*said, *talk.exchange(3, train=True)], len(said) + 4).state == "forward"


@pytest.mark.parametrize("mode", ["dense", "factored"])
def test_gradients_of_factors_are_of_lent_ones(mode: str) -> None:
    talk = Talk(mode)
    said = [talk.hello(), talk.welcome(), *talk.exchange(0, train=True)]
    (place,) = (at for at, (_, message) in enumerate(said) if message.kind == "hidden_gradient")
    asking = Message(pb.HiddenGradient(want_factor_gradients=True), said[place][1].tensors)
    with pytest.raises(ProtocolError, match="gradients of factors asked for"):
        tell(after(said, place), ("device", asking))


def test_factors_are_for_factored_mode_only() -> None:
    """With all their tensors, and right but for the mode that was agreed."""
    dense, factored = Talk().session(), Talk("factored").session()
    with pytest.raises(ProtocolError, match="factors in dense mode"):
        tell(after(dense, 2), factored[2])


def generated(mode: str) -> tuple[Talk, Dialogue]:
    """A dialogue whose last exchange left keys and values of two rows of 3 positions."""
    talk, dialogue = Talk(mode), Dialogue("host")
    for one in (talk.hello(), talk.welcome(), *step(talk, 0, pb.Forward(rows=2, positions=3, keep=True), 6, has_factors=True)):
        tell(dialogue, one)
    return talk, dialogue


def step(talk: Talk, number: int, forward: pb.Forward, num_tokens: int, *, has_factors: bool = False, **hidden: bool) -> Iterator[Said]:
    has_factors = has_factors and talk.mode != "dense"
    forward.exchange, forward.has_factors = number, has_factors
    yield "device", talk.message(forward, (num_tokens, D_MODEL), factors=talk.factor_shapes() if has_factors else [])
    for place, group in enumerate(() if talk.mode == "lent" or hidden.get("evicted") else talk.groups):
        yield "host", talk.message(pb.Input(exchange=number, group=place), (num_tokens, SIZES[group[0]][0]))
        yield "device", talk.message(pb.Output(exchange=number, group=place), *((num_tokens, talk.output_shape(n)[1]) for n in group))
    shapes = [] if hidden.get("evicted") else [(num_tokens, D_MODEL)]
    yield "host", talk.message(pb.Hidden(exchange=number, **(hidden or {"kept": True})), *shapes)


def follows(**other: int) -> pb.Forward:
    return pb.Forward(**{"rows": 2, "positions": 1, "keep": True, "follows": 3, **other})


@pytest.mark.parametrize("mode", ["dense", "factored", "lent"])
def test_a_generation_goes_on_from_what_is_kept_until_it_is_driven_out(mode: str) -> None:
    talk, dialogue = generated(mode)
    for number, held in ((1, 3), (2, 4)):
        for one in step(talk, number, follows(follows=held), 2):
            tell(dialogue, one)
    for one in step(talk, 3, follows(follows=5), 2, evicted=True):
        tell(dialogue, one)
    assert dialogue.state == "forward"
    with pytest.raises(ProtocolError, match="follow none"):
        tell(dialogue, next(step(talk, 4, follows(follows=6), 2)))


@pytest.mark.parametrize("mode", ["dense", "factored", "lent"])
@pytest.mark.parametrize(
    ("forward", "num_tokens"),
    [(follows(follows=2), 2), (follows(follows=4), 2), (follows(rows=1), 1), (follows(rows=3), 3), (follows(keep=False), 2),
     (follows(positions=6), 12), (follows(train=True), 2), (pb.Forward(rows=2, positions=2, lengths=[2, 1], keep=True, follows=3), 3),
     (pb.Forward(rows=2, positions=1, keep=True, train=True), 2), (pb.Forward(rows=1, positions=2, position_ids=[0, 0], keep=True), 2)],
    ids=str,
)  # fmt: skip
def test_what_follows_nothing_is_refused(mode: str, forward: pb.Forward, num_tokens: int) -> None:
    talk, dialogue = generated(mode)
    with pytest.raises(ProtocolError):
        tell(dialogue, next(step(talk, 1, forward, num_tokens)))
    assert dialogue.state == "forward"


def test_nothing_follows_after_other_factors_training_or_a_host_that_keeps_nothing() -> None:
    for after_that in ("factors", "training", "not kept"):
        talk, dialogue = generated("lent")
        said: list[Said] = list(talk.exchange(1, train=after_that == "training", has_factors=after_that == "factors"))
        if after_that == "not kept":
            said = list(step(talk, 1, follows(), 2, kept=False))
        for one in said:
            tell(dialogue, one)
        with pytest.raises(ProtocolError, match="follow none"):
            tell(dialogue, next(step(talk, 2, follows(follows=4 if after_that == "not kept" else 3), 2)))


@pytest.mark.parametrize("mode", ["dense", "lent"])
@pytest.mark.parametrize("said", ["kept", "evicted"])
def test_a_host_says_nothing_of_what_was_not_asked_for(mode: str, said: str) -> None:
    talk, dialogue = Talk(mode), Dialogue("device")
    for one in (talk.hello(), talk.welcome(), next(talk.exchange(0, train=False))):
        tell(dialogue, one)
    before = dialogue.state
    if mode == "dense" and said == "kept":
        return  # There it is not the turn of Hidden at all.
    with pytest.raises(ProtocolError, match="not asked for"):
        tell(dialogue, ("host", Message(pb.Hidden(**{said: True}))))
    assert dialogue.state == before
