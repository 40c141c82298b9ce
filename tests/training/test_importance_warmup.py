"""Warm-up: scores against the method written plainly with autograd, wherever the base lies; and its own laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from atoll.adapters.places import module_size
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.base.load import Base, load_base
from atoll.config.schema import Train
from atoll.errors import AdapterFitError
from atoll.seeding import stream as seed_of
from atoll.split.cut import Cut
from atoll.training import importance_warmup
from atoll.training.adalora import orthogonality_gradient_NR
from atoll.training.importance_score import ImportanceScore
from atoll.training.importance_warmup import ModuleScores, WarmUp, warm_up
from atoll.training.trainer import FitPlan, TrainState

from tests.conftest import random_model, save_model_folder
from tests.pieces import adapters, stream, trainer
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host

STEPS, RANK, ALPHA = 5, 3, 6.0
Kind = Literal["svd-sensitivity", "gradient-weight"]
KINDS: tuple[Kind, ...] = ("svd-sensitivity", "gradient-weight")
SETTINGS = WarmUp("svd-sensitivity", STEPS, RANK, ALPHA, Train(learning_rate=1e-2, grad_clip=0.5, weight_decay=0.1), seed=0, edge="north")


def base_of(model: PreTrainedModel) -> Base:
    return Base("tiny", model, None, False)  # type: ignore[arg-type]


def sizes_of(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    head = model.get_output_embeddings()
    return {name: module_size(m) or (0, 0) for name, m in model.named_modules() if module_size(m) and m is not head}


def module_scores(model: PreTrainedModel, kind: Kind = "svd-sensitivity", start: AdapterState | None = None) -> ModuleScores:
    return warm_up(base_of(model), sizes_of(model), stream(), replace(SETTINGS, kind=kind), start)


def trained_adapters(model: PreTrainedModel) -> AdapterState:
    """Adapters of another rank and scaling that change something."""
    generator = torch.Generator().manual_seed(7)
    modules = {
        name: ModuleAdapter(a.down_RI, torch.randn(a.up_OR.shape, generator=generator) * 0.05, a.scaling)
        for name, a in adapters(model, rank=2).modules.items()
    }
    return AdapterState("lora", modules)


@dataclass(frozen=True)
class Plain:
    """What the plain version gives: scores, the loss of every step, and its parameters after the last."""

    scores: dict[str, float]
    losses: list[float]
    leaves: dict[str, dict[str, nn.Parameter]]


def plainly(model: PreTrainedModel, kind: Kind, start: AdapterState | None) -> Plain:
    """Hooks, autograd on leaves of their own, torch's clipping and AdamW; shares no step with the engine."""
    leaves = {name: _leaves(name, size, kind) for name, size in sizes_of(model).items()}
    every = [leaf for own in leaves.values() for leaf in own.values()]
    hooks = [model.get_submodule(name).register_forward_hook(_adds(own, start, name)) for name, own in leaves.items()]
    optimizer = torch.optim.AdamW(every, lr=1e-2, weight_decay=0.1)
    seen: dict[str, dict[str, list[Tensor]]] = {name: {part: [] for part in own} for name, own in leaves.items()}
    losses = []
    for step in range(STEPS):
        batch = stream().batch(step)
        logits_ND = model(input_ids=batch.input_ids_BT).logits.flatten(0, 1)[batch.predict_N]
        loss = nn.functional.cross_entropy(logits_ND, batch.target_N)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for name, own in leaves.items():
            for part, leaf in own.items():
                assert leaf.grad is not None
                seen[name][part].append((leaf * leaf.grad).abs().detach())
        gaps = [_gap(own["P"].T @ own["P"]) + _gap(own["Q"] @ own["Q"].T) for own in leaves.values() if "P" in own]
        if gaps:
            (0.1 * sum(gaps, torch.zeros(()))).backward()
        nn.utils.clip_grad_norm_(every, 0.5)
        optimizer.step()
    for hook in hooks:
        hook.remove()
    return Plain({name: _score(own) for name, own in seen.items()}, losses, leaves)


def _leaves(name: str, size: tuple[int, int], kind: Kind) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed_of(seed_of(0, "warm-up", edge="north"), f"adapter/{name}"))
    inputs, outputs = size
    if kind == "svd-sensitivity":
        left, right = torch.randn(outputs, RANK, generator=generator) * 0.02, torch.randn(RANK, inputs, generator=generator) * 0.02
        return {"P": nn.Parameter(left), "l": nn.Parameter(torch.zeros(RANK)), "Q": nn.Parameter(right)}
    down = (torch.rand(RANK, inputs, generator=generator) * 2 - 1) / inputs**0.5
    return {"B": nn.Parameter(torch.zeros(outputs, RANK)), "A": nn.Parameter(down)}


def _adds(own: Mapping[str, Tensor], start: AdapterState | None, name: str):  # type: ignore[no-untyped-def]
    def hook(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = args
        low = own["l"] * (x @ own["Q"].T) if "P" in own else x @ own["A"].T
        output = output + ALPHA / RANK * low @ (own["P"] if "P" in own else own["B"]).T
        if start is not None:
            held = start.modules[name]
            output = output + held.scaling * (x @ held.down_RI.T) @ held.up_OR.T
        return output

    return hook


def _gap(gram: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram)))


def _score(own: Mapping[str, list[Tensor]]) -> float:
    """Entry by entry, in plain numbers, as the method is written."""
    if "P" not in own:
        return sum(float(part.double().sum()) for steps in own.values() for part in steps) / len(own["A"])

    def of(sensitivities: list[float]) -> float:
        smooth = uncertain = 0.0
        for s in sensitivities:
            smooth = 0.85 * smooth + 0.15 * s
            uncertain = 0.85 * uncertain + 0.15 * abs(s - smooth)
        return smooth * uncertain

    entries = {part: torch.stack(steps).double() for part, steps in own.items()}
    total = 0.0
    for i in range(RANK):
        total += of(entries["l"][:, i].tolist())
        for part in (entries["P"][:, :, i], entries["Q"][:, i, :]):
            total += sum(of(part[:, j].tolist()) for j in range(part.shape[1])) / part.shape[1]
    return total


@pytest.mark.parametrize("held", [False, True], ids=["base alone", "trained adapters held"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_warm_up_equals_the_method_written_plainly(family: str, kind: Kind, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made, build = dict[str, ImportanceScore](), importance_warmup._new_scores

    def remembered(*given: Any) -> Mapping[str, ImportanceScore]:
        made.update(build(*given))
        return made

    monkeypatch.setattr(importance_warmup, "_new_scores", remembered)
    start = trained_adapters(random_model(family)) if held else None
    plain, ours = plainly(random_model(family), kind, start), module_scores(random_model(family), kind, start)
    assert list(ours.scores) == list(plain.scores)
    assert [report.loss for report in ours.reports] == pytest.approx(plain.losses, rel=1e-6)
    for name, score in plain.scores.items():
        assert score > 0
        assert ours.scores[name] == pytest.approx(score, rel=1e-5), name
        for mine, leaf in zip(made[name].parameters, plain.leaves[name].values(), strict=True):
            # Where a gradient is next to nothing, Adam divides one rounding by another: P, l and Q have the penalty's, B and A have not.
            torch.testing.assert_close(mine.data, leaf.data, rtol=0, atol=1e-6 if kind == "svd-sensitivity" else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_warming_up_through_a_host_gives_what_the_whole_base_gives(kind: Kind) -> None:
    how = replace(SETTINGS, kind=kind)
    model = random_model("llama", BLOCKS)
    start = trained_adapters(model)
    wanted = warm_up(base_of(model), sizes_of(model), stream(), how, start)
    for mode in ("dense", "factored"):
        for cut in (Cut(0, 0), Cut(1, 1)):
            device, client = device_trainer("llama", cut, thread_host(served(random_model("llama", BLOCKS))), mode=mode)
            through = replace(how, attempt=client.retrying)
            got = warm_up(device.base, sizes_of(model), stream(), through, start)
            assert got.scores == pytest.approx(wanted.scores, rel=1e-5)
            assert client.account.sent["forward"] > 0


def test_training_through_a_host_goes_on_after_a_warm_up_as_if_there_was_none() -> None:
    start, plan = adapters(random_model("llama", BLOCKS)), FitPlan(2, 1, False)

    def trained(*, warms_up: bool) -> str:
        device, _ = device_trainer("llama", Cut(1, 0), thread_host(served(random_model("llama", BLOCKS))))
        if warms_up:
            warm_up(device.base, sizes_of(random_model("llama", BLOCKS)), stream(), SETTINGS)
        return device.fit(TrainState(start, {}, 0), stream(), plan, lambda _: None).state.adapter.digest()

    assert trained(warms_up=True) == trained(warms_up=False)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_quantized_base_warms_up_as_one_of_the_numbers_that_it_stands_for(bits: Literal[16, 8, 4], tmp_path: Path) -> None:
    save_model_folder(tmp_path, "llama")
    quantized = load_base(str(tmp_path), bits=bits)
    sizes = sizes_of(quantized.model)
    got = warm_up(quantized, sizes, stream(), SETTINGS)
    plain = load_base(str(tmp_path))
    for name in sizes:
        module: Any = quantized.model.get_submodule(name)
        with torch.no_grad():
            weight_IO = module(torch.eye(module.in_features))
        plain.model.get_submodule(name).weight.data.copy_(weight_IO.T)  # type: ignore[union-attr, operator]
    wanted = warm_up(plain, sizes, stream(), SETTINGS)
    # The library rounds activations to 8 bits in its 8-bit product, too.
    assert got.scores == pytest.approx(wanted.scores, rel=0.1 if bits == 8 else 1e-5)
    assert min(got.scores.values()) > 0


def test_scores_of_the_first_step_alone_are_zero() -> None:
    """l starts at zero: whoever asks for one step learns nothing."""
    model = random_model("llama")
    assert set(warm_up(base_of(model), sizes_of(model), stream(), replace(SETTINGS, num_steps=1)).scores.values()) == {0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rerun_gives_the_same_bits_and_another_edge_or_round_others(kind: Kind) -> None:
    model = random_model("llama")

    def scores(edge: str = "north", round_number: int = 0, *, checkpointing: bool = False) -> Mapping[str, float]:
        own = replace(SETTINGS, kind=kind, edge=edge, round=round_number, gradient_checkpointing=checkpointing)
        return warm_up(base_of(model), sizes_of(model), stream(), own).scores

    first = scores()
    assert scores() == first == scores(checkpointing=True)
    assert scores(edge="south") != first != scores(round_number=1)


def test_a_warm_up_leaves_base_start_and_later_training_alone() -> None:
    engine, plan = trainer(), FitPlan(2, 1, False)
    start = trained_adapters(engine.base.model)
    digests = engine.base.digest(), start.digest()
    untouched = trainer().fit(TrainState(start, {}, 0), stream(), plan, lambda _: None).state.adapter.digest()
    warm_up(engine.base, sizes_of(engine.base.model), stream(), SETTINGS, start)
    assert (engine.base.digest(), start.digest()) == digests
    assert engine.fit(TrainState(start, {}, 0), stream(), plan, lambda _: None).state.adapter.digest() == untouched


def test_adapters_that_were_not_trained_need_no_room() -> None:
    model = random_model("llama")
    assert module_scores(model, start=adapters(model)).scores == module_scores(model).scores


def test_only_modules_asked_for_are_scored() -> None:
    model = random_model("llama")
    some = dict(list(sizes_of(model).items())[2:5])
    found = warm_up(base_of(model), some, stream(), SETTINGS)
    assert list(found.scores) == list(some)
    assert {report.active for report in found.reports} == {tuple(some)}
    assert [report.step for report in found.reports] == list(range(STEPS))


def test_a_step_is_computed_by_whoever_can_do_it_again() -> None:
    calls = []

    def twice(compute: Callable[[], float]) -> float:
        calls.append(compute())
        return compute()

    model = random_model("llama")
    again = warm_up(base_of(model), sizes_of(model), stream(), replace(SETTINGS, attempt=twice))
    assert again.scores == module_scores(model).scores
    assert len(calls) == STEPS


def test_bottleneck_adapters_are_refused() -> None:
    model = random_model("llama")
    with pytest.raises(AdapterFitError, match="beside these adapters"):
        module_scores(model, start=adapters(model, "bottleneck"))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_gradient_of_the_penalty_is_autograd_s(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    (wanted,) = torch.autograd.grad(torch.linalg.matrix_norm(matrix.T @ matrix - torch.eye(columns)), matrix)
    torch.testing.assert_close(orthogonality_gradient_NR(matrix.detach()), wanted, rtol=1e-5, atol=1e-6)


def test_the_penalty_has_no_pull_on_orthonormal_columns() -> None:
    assert not orthogonality_gradient_NR(torch.eye(4)[:, :2]).any()
