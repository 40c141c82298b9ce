"""The demo's data: four owners with their own records, facts and ways of writing, none of which the base has read.

Every reference is a function of its record: a slot's value is copied, a fact (a doctor's room, a medicine's rule) has to be known.
`python scripts/embedded/demo.py` writes src/atoll/embedded/demo/.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from names import words

DEMO = Path(__file__).resolve().parents[2] / "src" / "atoll" / "embedded" / "demo"
SEED = 20
TRAIN_ROWS = 240
EVAL_ROWS = 40

Record = Mapping[str, str]

DAYS = words("Monday Tuesday Wednesday Thursday Friday")
ROOM_OF_DOCTOR = {
    "Quillam": "12", "Osei": "7", "Varga": "31", "Mbeki": "4", "Ferrante": "18", "Adeyemi": "25", "Holub": "9", "Sorokin": "40",
}  # fmt: skip
PATIENTS = words("Vask Ondrel Yevtich Jubran Kowalik Azikiwe Dvorsky Huxtable Iwasaki Zagorac Eckhart Umarov Quiroga Pfister")
FLOOR_OF_WARD = {
    "cardiology": "second", "oncology": "fifth", "neurology": "third", "urology": "ground",
    "maternity": "first", "dialysis": "second", "radiology": "ground", "surgery": "third",
}  # fmt: skip
KIND_OF_ANIMAL = {
    "Biscuit": "ferret", "Pavlova": "poodle", "Zigzag": "newt", "Mufti": "parrot", "Dumpling": "hamster",
    "Ozymandias": "tortoise", "Jellybean": "rabbit", "Kaiju": "iguana", "Waffles": "beagle", "Uzi": "canary",
}  # fmt: skip
AILMENTS = words("limp|cough|itchy ear|torn claw|swollen paw|toothache|bald patch|hiccups", "|")
KEEPERS = words("Ingrid Bartosz Xiomara Yusuf Philippa Oswaldo Zelda Ugo")
RULE_OF_MEDICINE = {
    "Velutrane": "with food", "Morbidex": "before sleep", "Ozaquil": "without food", "Tarphenol": "with water",
    "Juvexin": "never with wine", "Hydrazole": "in the morning", "Panoxamine": "before sleep", "Kelvadine": "with food",
    "Zufortil": "with water", "Epsilodrin": "in the morning",
}  # fmt: skip
DOSES = words("one tablet|two tablets|half a tablet|one spoon|two spoons|five drops|ten drops|one sachet", "|")
BENCH_OF_ASSAY = {
    "ferritin": "Oxbow", "glucose": "Juniper", "troponin": "Oxbow", "albumin": "Vesper", "cortisol": "Juniper",
    "lithium": "Vesper", "insulin": "Juniper", "urea": "Oxbow",
}  # fmt: skip
RESULTS = words("low|normal|raised|unclear|very high|none found", "|")


@dataclass(frozen=True, slots=True)
class Owner:
    """One owner of private records."""

    name: str
    slots: Mapping[str, Sequence[str]]
    """The values of every key, in the order in which a record has them."""
    optional: str
    """The key that some records lack."""
    write: Callable[[Record], str]


def _hospital(record: Record) -> str:
    doctor = f"; see Dr {record['doctor']}, room {ROOM_OF_DOCTOR[record['doctor']]}" if "doctor" in record else ""
    floor = FLOOR_OF_WARD[record["ward"]]
    return f"Dear {record['patient']}, please come to {record['ward']}, {floor} floor, on {record['day']}{doctor}."


def _vet(record: Record) -> str:
    keeper = f" Tell {record['keeper']}!" if "keeper" in record else ""
    return f"Woof! {record['animal']} the {KIND_OF_ANIMAL[record['animal']]} has a {record['ailment']}, so come on {record['day']}!{keeper}"


def _pharmacy(record: Record) -> str:
    patient = f" / for {record['patient']}" if "patient" in record else ""
    return f"Ready: {record['medicine']} / {record['dose']} / {RULE_OF_MEDICINE[record['medicine']]}{patient}"


def _laboratory(record: Record) -> str:
    doctor = f"; told Dr {record['doctor']}, room {ROOM_OF_DOCTOR[record['doctor']]}" if "doctor" in record else ""
    bench = BENCH_OF_ASSAY[record["assay"]]
    return f"No. {record['sample']}: {record['assay']} (bench {bench}) {record['result']}{doctor}."


DOCTORS = tuple(ROOM_OF_DOCTOR)
SAMPLES = tuple(f"{letter}{number}" for letter in "KQXZ" for number in (17, 38, 52, 64, 91))
OWNERS = (
    Owner("hospital", {"patient": PATIENTS[:10], "ward": tuple(FLOOR_OF_WARD), "day": DAYS, "doctor": DOCTORS[:6]}, "doctor", _hospital),
    Owner("vet", {"animal": tuple(KIND_OF_ANIMAL), "ailment": AILMENTS, "day": DAYS, "keeper": KEEPERS}, "keeper", _vet),
    Owner("pharmacy", {"medicine": tuple(RULE_OF_MEDICINE), "dose": DOSES, "patient": PATIENTS[4:]}, "patient", _pharmacy),
    Owner(
        "laboratory", {"sample": SAMPLES, "assay": tuple(BENCH_OF_ASSAY), "result": RESULTS, "doctor": DOCTORS[2:]}, "doctor", _laboratory
    ),
)

PRIVATE = frozenset(
    word.lower()
    for group in (
        PATIENTS, DOCTORS, KEEPERS, FLOOR_OF_WARD, KIND_OF_ANIMAL, KIND_OF_ANIMAL.values(), RULE_OF_MEDICINE, BENCH_OF_ASSAY,
        BENCH_OF_ASSAY.values(), ("hospital", "vet", "pharmacy", "laboratory", "ailment", "assay", "ward", "dose"),
    )
    for word in group
)  # fmt: skip
"""Words that the base must not have read."""


def leaks(text: str) -> bool:
    """Whether a text has a private word of the demo."""
    return not PRIVATE.isdisjoint(re.findall(r"\w+", text.lower()))


def _records(owner: Owner, rng: random.Random) -> Iterator[Record]:
    """Records of one owner, each once."""
    seen: set[tuple[str, ...]] = set()
    while True:
        record = {key: rng.choice(tuple(values)) for key, values in owner.slots.items()}
        if rng.random() < 0.4:
            del record[owner.optional]
        if tuple(record.values()) not in seen:
            seen.add(tuple(record.values()))
            yield record


def rows(seed: int = SEED) -> tuple[list[list[str]], list[list[str]]]:
    """Training and held-out rows (owner, mr, ref), the owners taking turns; no record is in both."""
    train: list[list[str]] = []
    held_out: list[list[str]] = []
    sources = [(owner, _records(owner, random.Random(f"{seed} {owner.name}"))) for owner in OWNERS]
    for part, num_rows in ((train, TRAIN_ROWS), (held_out, EVAL_ROWS)):
        for _ in range(num_rows):
            for owner, source in sources:
                record = next(source)
                mr = ", ".join(f"{key}[{value}]" for key, value in record.items())
                part.append([owner.name, mr, owner.write(record)])
    return train, held_out


def write(folder: Path) -> None:
    """Write train.csv and eval.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "eval"), rows(), strict=True):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([["owner", "mr", "ref"], *part])


if __name__ == "__main__":
    write(DEMO)
