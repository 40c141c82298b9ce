"""Each attack reaches what it must on a setting without defence, and no more than chance where there is nothing to find."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.attacks import audit as all_attacks
from atoll.attacks.audit import Audit, Setting
from atoll.attacks.finding import NAMES, Finding, Name
from atoll.attacks.membership import area_under_curve, found_at
from atoll.attacks.update import picked_tokens, stepped
from atoll.attacks.wire_adapters import Wire, product_error
from atoll.base.blocks import sizes_of, trace
from atoll.base.load import Base, load_base
from atoll.config.schema import Data, RunConfig, Train
from atoll.tasks.batches import pad_batch
from atoll.tasks.rows import load_rows
from atoll.tasks.text import row_form
from atoll.tasks.tokens import Example, pad_id, tokenize

ENDLESS = 1e9
DATA = Data(train="demo", prompt="{mr} ->", completion=" {ref}")


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("tiny")


@pytest.fixture(scope="module")
def examples(base: Base) -> list[Example]:
    rows = load_rows("demo", base_dir=Path(), limit=400, on_bad_row="error")
    return list(tokenize(rows, row_form(DATA, rows), base.tokenizer, 96))


def adapters(base: Base, rank: int = 8) -> AdapterState:
    names = [name for group in trace(base.model).groups for name in group if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")]
    sizes = {name: sizes_of(base.model.get_submodule(name)) for name in names}
    return fresh_adapters("lora", sizes, dict.fromkeys(names, rank), 2.0 * rank, 0)


def setting(base: Base, examples: list[Example], *, front: int = 1, back: int = 0, codec: str = "fp32", steps: int = 150) -> Setting:
    cut = {"front": front, "back": back}
    config = RunConfig.model_validate({"model": {"cut": cut}, "wire": {"codec": codec}, "data": {"train": "demo"}})
    public = [torch.from_numpy(row.token_ids.astype(np.int64)) for row in examples[100:]]
    return Setting(config, base, adapters(base), False, examples[:4], examples[:4], [], public, ENDLESS, steps)


def found(setting: Setting, *names: Name) -> list[Finding]:
    return Audit(setting).findings(names)


def test_with_the_embedding_alone_on_the_device_everything_is_read_off(base: Base, examples: list[Example]) -> None:
    (nearest,) = found(setting(base, examples, front=0), "nearest-embedding")
    assert (nearest.tokens_recovered, nearest.rare_recovered, nearest.rouge_l, nearest.interval) == (1.0, 1.0, 1.0, (1.0, 1.0))
    assert nearest.example is not None
    assert nearest.example["recovered"] == nearest.example["true"]


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_block_on_the_device_hides_nothing(base: Base, examples: list[Example], codec: str) -> None:
    inverter, searched, labels = found(setting(base, examples, codec=codec), "inverter", "optimisation", "labels")
    assert inverter.tokens_recovered is not None
    assert inverter.tokens_recovered > 0.9
    assert inverter.chance is not None
    assert inverter.chance < 0.2
    assert (searched.tokens_recovered or 0) >= inverter.tokens_recovered
    assert (labels.tokens_recovered or 0) > 0.99


def test_a_search_is_no_worse_than_the_inverter_it_begins_with(base: Base, examples: list[Example]) -> None:
    poor = replace(setting(base, examples, steps=25), in_a_host=examples[:1])
    inverter, searched = found(poor, "inverter", "optimisation")
    assert (searched.tokens_recovered or 0) >= (inverter.tokens_recovered or 0)


def test_private_adapters_in_the_front_blocks_are_no_protection_by_themselves(base: Base, examples: list[Example]) -> None:
    batches = [pad_batch(examples[n : n + 4], pad_id(base.tokenizer)) for n in range(8)]
    trained = stepped(base, adapters(base), Train(learning_rate=3e-3), batches)
    (inverter,) = found(replace(setting(base, examples), adapter=trained), "inverter")
    assert (inverter.tokens_recovered or 0) > 0.85


def test_shuffled_activations_and_gradients_give_chance(base: Base, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    audit = Audit(setting(base, examples))
    generator = torch.Generator().manual_seed(0)
    everything = torch.cat(audit.seen)
    mixed = everything[torch.randperm(len(everything), generator=generator)]
    audit.seen = list(mixed.split([len(row) for row in audit.rows]))
    (inverter,) = audit.findings(["inverter"])
    assert (inverter.tokens_recovered or 0) < (inverter.chance or 0) + 0.05
    sent = all_attacks.labels.sent_gradient
    monkeypatch.setattr(all_attacks.labels, "sent_gradient", lambda *given: torch.randn_like(sent(*given)))
    (labels,) = audit.findings(["labels"])
    assert (labels.tokens_recovered or 0) < 0.2


def test_one_step_on_a_row_gives_its_words_away(base: Base, examples: list[Example]) -> None:
    generator = torch.Generator().manual_seed(0)
    public = list(torch.randint(3, base.model.config.vocab_size, (32, 24), generator=generator))
    (update,) = found(replace(setting(base, examples), public=public), "update-inversion")
    assert update.tokens_recovered is not None
    assert update.tokens_recovered > max(0.35, 2 * (update.chance or 0))
    assert set(update.figures) == {f"recovered_at_batch_{size}" for size in (1, 2, 4)}


def test_an_update_in_a_random_direction_gives_away_no_words(base: Base, examples: list[Example]) -> None:
    table_VI = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    moved_MI = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    assert len(set(picked_tokens(moved_MI, table_VI, 50)) & set(range(50))) < 15
    spanned_MI = torch.randn(24, 12, generator=torch.Generator().manual_seed(2)) @ table_VI[:12]
    assert len(set(picked_tokens(spanned_MI, table_VI, 12)) & set(range(12))) == 12
    assert not {0, 1} & set(picked_tokens(spanned_MI, table_VI, 12, excluded=[0, 1]))


def test_rows_that_were_learnt_by_heart_are_told_from_others(base: Base, examples: list[Example]) -> None:
    few, others = examples[:8], examples[200:230]
    batch = pad_batch(few, pad_id(base.tokenizer))
    trained = stepped(base, adapters(base), Train(learning_rate=1e-2), [batch] * 12)
    of_run = replace(setting(base, examples), adapter=trained, is_finished=True, private=few, held_out=others)
    (finished,) = found(of_run, "membership")
    assert finished.figures["auc"] > 0.9
    assert finished.interval is not None
    assert finished.interval[0] > 0.75
    (new,) = found(replace(of_run, adapter=adapters(base)), "membership")
    assert (new.figures["auc"], new.figures["found_at_1_percent_wrong"]) == (0.5, 0.0)


def test_the_area_is_that_of_all_pairs() -> None:
    random = np.random.default_rng(0)
    members, others = random.integers(0, 6, 30).astype(float), random.integers(0, 5, 40).astype(float)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in members for b in others]
    assert area_under_curve(members, others) == pytest.approx(np.mean(pairs))
    assert found_at(np.array([0.0, 9.0]), np.arange(5.0)) == 0.5


def test_dense_and_factored_traffic_gives_the_product_away(base: Base, examples: list[Example]) -> None:
    (wire,) = found(setting(base, examples * 2), "wire-adapters")
    assert wire.figures["dense_error"] < 1e-3
    assert wire.figures["factored_error"] < 1e-3
    assert wire.figures["lent_error"] == 0.0


def test_solving_needs_as_many_tokens_as_inputs_and_exact_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    adapter = ModuleAdapter(torch.randn(4, 32, generator=generator), torch.randn(16, 4, generator=generator), 2.0)
    few, many = torch.randn(16, 32, generator=generator), torch.randn(64, 32, generator=generator)
    exact = Wire("fp32", "fp32")
    assert product_error(adapter, few, "dense", exact) > 0.3
    for mode in ("dense", "factored"):
        assert product_error(adapter, many, mode, exact) < 1e-4  # type: ignore[arg-type]
        assert 1e-4 < product_error(adapter, many, mode, Wire("int8", "fp32")) < 0.2  # type: ignore[arg-type]
        assert product_error(adapter, many, mode, Wire("fp32", "fp32", dropout=0.3)) > 0.2  # type: ignore[arg-type]


def test_what_does_not_apply_is_null_with_its_reason(base: Base, examples: list[Example]) -> None:
    whole = {one.name: one.to_json() for one in found(replace(setting(base, examples), in_a_host=[]), *NAMES)}
    assert tuple(whole) == NAMES
    for name in ("nearest-embedding", "inverter", "optimisation", "labels", "wire-adapters"):
        assert "no edge is split" in str(whole[name]["why"])
        assert nothing_but_the_reason(whole[name])
    assert whole["update-inversion"]["tokens_recovered"]
    assert "finished run" in str(whole["membership"]["why"])
    (labels,) = found(setting(base, examples, back=1), "labels")
    assert "not ruled out" in labels.why


def nothing_but_the_reason(one: Mapping[str, object]) -> bool:
    figures = ("tokens_recovered", "top5_recovered", "rare_recovered", "rouge_l", "interval", "example")
    return all(one[name] is None for name in figures)


def test_the_json_has_the_names_that_programs_rely_on(base: Base, examples: list[Example]) -> None:
    (one,) = found(setting(base, examples, front=0), "nearest-embedding")
    value = json.loads(json.dumps(one.to_json()))
    needed = {"name", "tokens_recovered", "top5_recovered", "rare_recovered", "rouge_l", "interval", "seconds", "example"}
    assert needed <= set(value)
    assert set(value["example"]) == {"true", "recovered"}
    assert one.to_json(example=False)["example"] is None
