"""What ships in the package: the tiny base is what its script says, and the demo is new to it."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open

from atoll.config.schema import RunConfig
from atoll.embedded import demo_path, tiny_path
from atoll.tasks.scoring.builtin_metrics import slot_accuracy

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts" / "embedded"
sys.path.insert(0, str(SCRIPTS))
import corpus  # noqa: E402
import demo  # noqa: E402

MOST_BYTES = 4 * 2**20
Row = dict[str, str]


def read(split: str) -> list[Row]:
    with demo_path(split).open(encoding="utf-8", newline="") as file:  # type: ignore[arg-type]
        return list(csv.DictReader(file))


def texts(seed: int, number: int) -> list[tuple[str, str]]:
    return list(itertools.islice(corpus.documents(seed), number))


def test_the_base_is_small() -> None:
    assert sum(path.stat().st_size for path in tiny_path().iterdir()) <= MOST_BYTES


def test_the_weights_are_bf16_and_one_to_two_million() -> None:
    num_parameters = 0
    with safe_open(tiny_path() / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  safe_open is no mapping
            view = file.get_slice(name)
            assert view.get_dtype() == "BF16", name
            size = 1
            for length in view.get_shape():
                size *= length
            num_parameters += size
    assert 1_000_000 <= num_parameters <= 2_000_000


def test_transformers_loads_the_base() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_path())
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    assert model.config.model_type == "llama"
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 512
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)


def test_the_tokenizer_starts_every_text_and_loses_nothing() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    text = "ward[cardiology] -> Größe 12 €,\n\ttwo  spaces"
    token_ids = tokenizer(text)["input_ids"]
    assert token_ids.count(1) == 1
    assert token_ids[0] == 1
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text


def test_the_chat_template_marks_what_the_assistant_says() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    question = [{"role": "user", "content": "Hello?"}]
    dialogue = [*question, {"role": "assistant", "content": "Yes."}]
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == "<s>user: Hello?\nassistant:"
    encoded = tokenizer.apply_chat_template(dialogue, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == " Yes.</s>"


def test_the_log_records_the_files_that_ship() -> None:
    lines = [line.split() for line in (tiny_path() / "train.log").read_text(encoding="utf-8").splitlines() if line.startswith("sha256 ")]
    recorded = {name: (digest, int(size)) for _, digest, size, name in lines}
    files = [path for path in tiny_path().iterdir() if path.name != "train.log"]
    shipped = {path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size) for path in files}
    assert recorded == shipped


def test_the_log_keeps_curve_and_validation_of_every_domain() -> None:
    lines = (tiny_path() / "train.log").read_text(encoding="utf-8").splitlines()
    losses = [float(line.split()[3]) for line in lines if line.startswith("step ")]
    assert losses[-1] < losses[0] / 2
    assert {line.split()[1] for line in lines if line.startswith("validation ")} == set(corpus.DOMAINS)


def test_equal_seeds_give_equal_text() -> None:
    assert texts(3, 200) == texts(3, 200)
    assert texts(3, 200) != texts(4, 200)


def test_every_domain_is_written_and_every_hole_is_filled() -> None:
    written = texts(0, 2000)
    assert {domain for domain, _ in written} == set(corpus.DOMAINS)
    assert not [text for _, text in written if "{" in text or "}" in text]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_base_has_read_nothing_of_the_demo(seed: int) -> None:
    assert not [text for _, text in texts(seed, 2000) if demo.leaks(text)]


def test_every_name_of_the_demo_is_looked_for() -> None:
    for row in read("train"):
        assert demo.leaks(row["mr"]), row
        assert demo.leaks(row["ref"]), row


def test_the_demo_is_what_its_script_writes(tmp_path: Path) -> None:
    demo.write(tmp_path)
    for split in ("train", "eval"):
        assert (tmp_path / f"{split}.csv").read_bytes() == demo_path(split).read_bytes()  # type: ignore[arg-type]


def test_the_demo_has_four_owners_of_equal_size() -> None:
    owners = {owner.name for owner in demo.OWNERS}
    for split, number in (("train", demo.TRAIN_ROWS), ("eval", demo.EVAL_ROWS)):
        rows = read(split)
        assert list(rows[0]) == ["owner", "mr", "ref"]
        assert Counter(row["owner"] for row in rows) == dict.fromkeys(owners, number)
    assert len(owners) == 4


def test_held_out_records_are_new_and_their_values_known() -> None:
    train, held_out = read("train"), read("eval")
    assert not {row["mr"] for row in train} & {row["mr"] for row in held_out}
    known = {slot for row in train for slot in row["mr"].split(", ")}
    assert {slot for row in held_out for slot in row["mr"].split(", ")} <= known


def test_the_owners_own_sentences_have_every_slot() -> None:
    rows = read("eval")
    assert slot_accuracy([row["ref"] for row in rows], [row["mr"] for row in rows]) == 1.0


def test_the_example_runs_the_demo_with_its_owners_as_edges() -> None:
    config = RunConfig.model_validate_json(json.dumps(tomllib.loads((ROOT / "examples" / "demo.toml").read_text(encoding="utf-8"))))
    assert (config.model.base, config.data.train, config.data.partition) == ("tiny", "demo", "by:owner")
    assert {edge.name for edge in config.edge} == {owner.name for owner in demo.OWNERS}
    assert set(config.run.compare) == {"local-only", "central"}
    assert config.evaluate.metrics == ("slot_accuracy",)
