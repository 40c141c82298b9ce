"""Damaged and forged frames against what receives them: which exceptions come out, and whether memory stays where it was.

Usage: python benchmarks/frame_fuzz.py [NUM_FRAMES]      (default: 120000)
"""

from __future__ import annotations

import copy
import gc
import random
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil

from atoll.registry.parts import names
from sides.results import write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # The ways to damage a frame are those of the tests.

from atoll.errors import FrameError, ProtocolError
from atoll.wire import protocol_pb2 as pb
from atoll.wire.dialogue import Dialogue, Role
from atoll.wire.encoding import decode
from atoll.wire.frames import Assembler

from tests.wire.damage import DAMAGES, forged, packed
from tests.wire.talk import Said, Talk

CHUNKS = (150, 2**20)
WARM_UP, WINDOW, LIMIT = 5_000, 4, 10**6
SHARE_FORGED = 0.25
SEED = 20


@dataclass(frozen=True, slots=True)
class Line:
    """One direction of a session, and the receiver's dialogue before each message that arrives."""

    said: list[Said]
    receiver: Role
    frames: list[bytes]
    numbers: list[int]
    places: list[int]
    dialogues: list[Dialogue]


def line(talk: Talk, receiver: Role, chunk_bytes: int) -> Line:
    """A legal session as one side receives it."""
    said, dialogue, places, dialogues = talk.session(), Dialogue(receiver), [], []
    for place, (sender, message) in enumerate(said):
        if sender != receiver:
            places.append(place)
            dialogues.append(copy.deepcopy(dialogue))
            dialogue.received(message)
        else:
            dialogue.sent(message)
    frames = packed([said[place][1] for place in places], chunk_bytes)
    return Line(said, receiver, frames, [pb.Frame.FromString(frame).message for frame in frames], places, dialogues)


def receive(session: Line, first: int, frames: list[bytes]) -> None:
    """What a receiver does with frames, from the given message on."""
    assembler, dialogue, place = Assembler(LIMIT), copy.deepcopy(session.dialogues[first]), session.places[first]
    assembler.num_messages = first
    for frame in frames:
        message = assembler.add(frame)
        if message is None:
            continue
        while session.said[place][0] == session.receiver:
            dialogue.sent(session.said[place][1])
            place += 1
        dialogue.received(message)
        place += 1
        for tensor in message.tensors:
            decode(tensor)
        if dialogue.closed:
            return


def trial(session: Line, chance: random.Random) -> tuple[str, str]:
    """The kind of damage, and what came of it."""
    at = chance.randrange(len(session.frames) - 1)
    start = session.numbers.index(session.numbers[at])
    window = session.frames[start : at + 1 + WINDOW]
    damage = forged if chance.random() < SHARE_FORGED else chance.choice(DAMAGES)
    broken = damage(window, at - start, chance)
    try:
        receive(session, session.numbers[at], broken)
    except (FrameError, ProtocolError) as error:
        return damage.__name__, type(error).__name__
    except Exception as error:  # Counted, and the script fails at its end.
        return damage.__name__, f"UNEXPECTED {type(error).__name__}: {error}"
    return damage.__name__, "accepted"


def resident_bytes() -> int:
    """Memory of this process now."""
    gc.collect()
    return psutil.Process().memory_info().rss


def main(num_frames: int) -> None:
    """Run and write the result."""
    lines = [
        line(Talk(mode, codec, front), receiver, chunk_bytes)
        for mode in ("dense", "factored")
        for codec in names("codec")
        for front in (False, True)
        for receiver in ("device", "host")
        for chunk_bytes in CHUNKS
    ]
    chance, outcomes = random.Random(SEED), defaultdict[str, Counter[str]](Counter)
    for _ in range(WARM_UP):
        trial(chance.choice(lines), chance)
    before, begin = resident_bytes(), time.perf_counter()
    for _ in range(num_frames):
        kind, outcome = trial(chance.choice(lines), chance)
        outcomes[kind][outcome] += 1
    seconds, after = time.perf_counter() - begin, resident_bytes()
    totals = sum(outcomes.values(), Counter[str]())
    results = {
        "frames": num_frames, "outcomes": dict(totals), "by_damage": {kind: dict(counts) for kind, counts in sorted(outcomes.items())},
        "resident_bytes_before": before, "resident_bytes_after": after, "seconds": round(seconds, 1),
    }  # fmt: skip
    config = {"seed": SEED, "warm_up_frames": WARM_UP, "share_forged": SHARE_FORGED, "chunk_bytes": CHUNKS, "max_message_bytes": LIMIT}
    write("frame_fuzz", config, results)
    for kind, counts in sorted(outcomes.items()):
        print(f"{kind:>16}  " + "  ".join(f"{name} {count}" for name, count in counts.most_common()))
    print(f"{num_frames} frames in {seconds:.0f} s; resident {before / 2**20:.1f} -> {after / 2**20:.1f} MiB")
    unfound = {kind for kind, counts in outcomes.items() if kind != forged.__name__ and set(counts) != {"FrameError"}}
    unexpected = [outcome for outcome in totals if outcome.startswith("UNEXPECTED")]
    if unfound or unexpected:
        raise SystemExit(f"damage that was not found: {sorted(unfound)}; {unexpected[:5]}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 120_000)
