"""How fast a machine trains, by a clock of the test's own."""

from __future__ import annotations

import itertools

import pytest

from atoll.base.load import Base, load_base
from atoll.base.read_shapes import read_shapes
from atoll.cost.formulas import step_flops
from atoll.shapes import BaseShapes
from atoll.training import speed
from atoll.training.speed import measure_speed

from tests.conftest import save_model_folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, BaseShapes]:
    """A base that steps in milliseconds."""
    folder = tmp_path_factory.mktemp("small")
    save_model_folder(folder, "llama")
    return load_base(str(folder)), read_shapes(str(folder))


def test_speed_is_the_formulas_work_by_the_median_step(small: tuple[Base, BaseShapes]) -> None:
    # Three steps of warm-up, the last of 4 s; then as many as ten seconds take at that pace, after one that does not count.
    ends = [100, 101, 105, 1000, 1002, 1009, 1012]
    found = measure_speed(*small, clock=map(float, ends).__next__)
    assert found.step_seconds == (2.0, 7.0, 3.0)
    ranks = {module.name: found.rank for module in small[1].modules}
    flops = step_flops(small[1], ranks, num_rows=found.num_rows, row_tokens=found.row_tokens, num_label_tokens=found.num_label_tokens).flops
    assert (found.step_flops, found.flops_per_second) == (flops, flops / 3.0)
    assert (found.num_modules, found.device) == (len(ranks), small[0].model.device.type)


@pytest.mark.parametrize(("step_seconds", "num_steps"), [(1000.0, 3), (2.0, 5), (1e-3, 25)])
def test_slow_bases_take_few_steps_and_quick_ones_no_more_than_enough(
    step_seconds: float, num_steps: int, small: tuple[Base, BaseShapes]
) -> None:
    found = measure_speed(*small, clock=(step_seconds * step for step in itertools.count()).__next__)
    assert len(found.step_seconds) == num_steps
    assert found.flops_per_second == pytest.approx(found.step_flops / step_seconds)


def test_what_is_trained_is_what_the_formula_counts(small: tuple[Base, BaseShapes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's own count of its products, but for the causal half and the row of attention that PyTorch counts otherwise."""
    seen = []

    class Spied(speed.LocalTrainer):
        def fit(self, state, batches, plan, on_step):  # type: ignore[no-untyped-def]
            return super().fit(state, batches, plan, lambda report: (seen.append(report), on_step(report)))

    monkeypatch.setattr(speed, "LocalTrainer", Spied)
    found = measure_speed(*small, clock=itertools.count(0.0, 10.0).__next__)
    counted = seen[0].counted
    assert counted.block_and_adapter_flops + counted.head_flops == pytest.approx(found.step_flops, rel=0.1)
    assert {report.micro_batches for report in seen} == {((found.num_rows, found.row_tokens),)}
    assert {report.num_label_tokens for report in seen} == {found.num_label_tokens}
    assert seen[-1].loss != seen[0].loss
