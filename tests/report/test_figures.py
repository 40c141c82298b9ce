"""Figures of a run whose modules were chosen, from run directories that the real writers wrote."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from atoll.errors import RunFolderError
from atoll.report.activity import EdgeActivity, Segment, read_activities, short_labels
from atoll.report.costs import Pair, compute_pairs, in_one_unit, wire_pairs
from atoll.report.figures import write_figures
from atoll.runs.events import Event, EventLog, ModulesChosen, StepDone
from atoll.runs.layout import RunDirectory
from atoll.runs.summary import EdgeCompute, EdgeSummary, Summary, Traffic, write_summary

POOL = tuple(f"model.layers.{block}.self_attn.{name}" for block in range(2) for name in ("q_proj", "k_proj", "v_proj"))
Q0, K0, V0, Q1, K1, V1 = POOL
SCORES = {name: 0.001 * (number + 1) for number, name in enumerate(POOL)}
COMPUTE = EdgeCompute(9.1e12, 0.8e12, 6.2e12, 2.1e12, 4.9e12, 2.4e12)
SPLIT = Traffic(60, 50, 80, 120, 640, 1200, {"forward": 40, "frozen": 20}, {"input": 50})


def window(step: int, edge: str = "north", phase: str = "federated") -> ModulesChosen:
    return ModulesChosen(phase, 1, edge, step, "window", "kill-and-revive", POOL, (), (), {})  # type: ignore[arg-type]


def choice(step: int, active: Sequence[str], scores: dict[str, float] | None = None, policy: str = "kill-and-revive") -> ModulesChosen:
    killed = tuple(name for name in POOL if name not in active)
    return ModulesChosen("federated", 1, "north", step, "choice", policy, tuple(active), killed, (), SCORES if scores is None else scores)


def steps(numbers: Iterable[int], edge: str = "north", phase: str = "federated") -> list[Event]:
    return [StepDone(phase, 1, edge, step, 2.0, 1e-3, 1.0, 100, 50, 6) for step in numbers]  # type: ignore[arg-type]


TWO_WINDOWS = [
    window(0), *steps(range(2)), choice(2, [Q0, V1]), *steps(range(2, 5)),
    window(5), *steps(range(5, 7)), choice(7, [V1]), *steps(range(7, 10)),
]  # fmt: skip


def written(folder: Path, events: Iterable[Event], *, traffic: Traffic = SPLIT, edges: Sequence[str] = ("north",)) -> RunDirectory:
    run = RunDirectory.create_at(folder)
    run.write_config("", {"config": {"select": {"variation": "change"}}})
    with EventLog(run.events_path) as log:
        for event in events:
            log.append(event)
    ranks = dict.fromkeys(POOL, 8)
    rows = tuple(EdgeSummary(name, "split", 16, 8, ranks, 10, None, None, 0.5, 1, 1, 0) for name in edges)
    write_summary(run.summary_path, Summary("complete", traffic=traffic, edge_compute=COMPUTE, edges=rows))
    return run


def activity(folder: Path, events: Iterable[Event], order: Sequence[str] = POOL) -> EdgeActivity:
    (found,) = read_activities(written(folder / "run", events).events_path, {"north": order})
    return found


def texts(path: Path) -> list[str]:
    root = ElementTree.fromstring(path.read_bytes())
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_step_trains_the_set_of_the_last_decision_before_it(tmp_path: Path) -> None:
    found = activity(tmp_path, TWO_WINDOWS)
    assert (found.edge, found.policy, found.modules) == ("north", "kill-and-revive", POOL)
    assert found.segments == (
        Segment(0, 2, POOL, True),
        Segment(2, 5, (Q0, V1), False),
        Segment(5, 7, POOL, True),
        Segment(7, 10, (V1,), False),
    )
    assert [(own.step, own.active) for own in found.choices] == [(2, (Q0, V1)), (7, (V1,))]
    assert found.choices[0].scores == SCORES
    assert found.active_share == pytest.approx((4 * 6 + 3 * 2 + 3 * 1) / (10 * 6))


def test_spans_are_joined_where_they_adjoin(tmp_path: Path) -> None:
    found = activity(tmp_path, [*TWO_WINDOWS, *steps(range(12, 14))])
    assert found.spans() == ((0, 10), (12, 14)), "steps that were not done stay white"
    assert found.spans(windows=True) == ((0, 2), (5, 7))
    assert found.spans(V1) == ((0, 10), (12, 14))
    assert found.spans(V1, windows=False) == ((2, 5), (7, 10), (12, 14))
    assert found.spans(Q0, windows=False) == ((2, 5),)
    assert found.spans(K0, windows=False) == ()


def test_before_the_first_decision_the_whole_pool_is_observed(tmp_path: Path) -> None:
    found = activity(tmp_path, [*steps(range(3)), choice(3, [K1]), *steps(range(3, 5))])
    assert found.segments == (Segment(0, 3, POOL, True), Segment(3, 5, (K1,), False))


def test_the_whole_pool_kept_by_choice_is_no_window(tmp_path: Path) -> None:
    found = activity(tmp_path, [window(0), *steps(range(2)), choice(2, POOL), *steps(range(2, 4))])
    assert [(own.first, own.is_window) for own in found.segments] == [(0, True), (2, False)]


def test_a_window_at_the_step_of_a_choice_hides_no_choice(tmp_path: Path) -> None:
    found = activity(tmp_path, [window(0), *steps(range(2)), choice(2, [K1]), window(2), *steps(range(2, 4))])
    assert found.segments == (Segment(0, 4, POOL, True),)
    assert [own.step for own in found.choices] == [2]


def test_steps_done_anew_leave_one_history(tmp_path: Path) -> None:
    undone = [window(0), *steps(range(2)), choice(2, [Q0]), *steps([2])]
    found = activity(tmp_path, [*undone, *TWO_WINDOWS])
    assert [(own.step, own.active) for own in found.choices] == [(2, (Q0, V1)), (7, (V1,))]
    assert found.spans(Q0, windows=False) == ((2, 5),)


def test_only_the_federated_phase_counts(tmp_path: Path) -> None:
    others = [window(0, phase="central"), *steps(range(50), phase="local-only"), *steps(range(50), edge="south")]
    found = activity(tmp_path, [*others, *TWO_WINDOWS])
    assert found.segments[-1].end == 10


def test_modules_are_in_the_pool_s_order_as_far_as_it_is_known(tmp_path: Path) -> None:
    events = [choice(0, [V1, Q0], scores={}, policy="random"), *steps(range(2))]
    assert activity(tmp_path / "known", events, POOL[::-1]).modules == POOL[::-1]
    found = activity(tmp_path / "unknown", events, ())
    assert found.modules == (K0, Q0, V0, K1, Q1, V1), "by block and name"
    assert found.segments == (Segment(0, 2, (Q0, V1), False),)


def test_labels_are_block_and_last_name_and_unique() -> None:
    assert short_labels(POOL[:2]) == ("0.q_proj", "0.k_proj")
    gpt2 = ("transformer.h.11.attn.c_attn", "transformer.h.11.attn.c_proj", "transformer.h.11.mlp.c_proj", "score")
    assert short_labels(gpt2) == ("11.c_attn", "11.attn.c_proj", "11.mlp.c_proj", "score")


def test_costs_stand_beside_the_full_pool() -> None:
    adapters, blocks, head = compute_pairs(COMPUTE)
    assert [own.saving for own in (adapters, blocks, head)] == ["83.7 % saved", "12.5 % saved", "the same for the full pool"]
    assert (blocks.done, blocks.full_pool, head.full_pool) == (2.1e12, 2.4e12, None)
    shared, unshared, real = wire_pairs(SPLIT)
    assert (shared.saving, unshared.saving) == ("87.5 % saved", "90.0 % saved")
    assert (real.done, real.full_pool) == (110, None), "nothing was written for a full pool"
    assert wire_pairs(Traffic(60, 50)) == ()
    assert [own.name for own in compute_pairs(EdgeCompute(3.0, 1.0, 2.0, 0.0, 4.0, 0.0))] == ["adapters", "head"]


def test_more_than_the_full_pool_is_said() -> None:
    assert Pair("x", 11, 10).saving == "10.0 % more"
    assert Pair("x", 10.000001, 10).saving == "0.0 % saved"


def test_the_numbers_of_a_pair_have_one_unit() -> None:
    assert in_one_unit([8e11, 4.9e12], "FLOP") == ("0.8 TFLOP", "4.9 TFLOP")
    assert in_one_unit([999.6e6], "B") == ("1 GB",)
    assert in_one_unit([5, 0], "B") == ("5 B", "0 B")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_figures(written(tmp_path_factory.mktemp("drawn") / "run", TWO_WINDOWS))


def test_figures_are_files_with_labels(drawn: tuple[Path, ...]) -> None:
    names = ["modules-north.svg", "modules-north.png", "cost.svg", "cost.png"]
    assert [path.name for path in drawn] == names
    assert {path.parent.name for path in drawn} == {"report"}
    assert sorted(path.name for path in drawn[0].parent.iterdir()) == sorted(names)
    modules, cost = texts(drawn[0]), texts(drawn[2])
    assert modules.count("0.q_proj") == 2, "one label in each panel"
    assert {"1.v_proj", "killed", "step", "2", "7"} <= set(modules)
    assert any("6 modules, 55.0 % active" in text for text in modules)
    assert any(text.startswith("variation in the window: norm of the parameters' change") for text in modules)
    assert {"0.8 TFLOP", "4.9 TFLOP", "6.2 TFLOP", "640 B", "1.2 kB", "110 B", "83.7 % saved", "90.0 % saved"} <= set(cost)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn[1::2])


def test_the_same_run_gives_the_same_bytes_whatever_style_a_person_has(drawn: tuple[Path, ...]) -> None:
    import matplotlib

    before = [path.read_bytes() for path in drawn]
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.facecolor": "red"}):
        again = write_figures(RunDirectory(drawn[0].parents[1]))
        assert matplotlib.rcParams["font.size"] == 20
    assert [path.read_bytes() for path in again] == before


def test_each_edge_has_its_figure_and_a_local_run_no_wire(tmp_path: Path) -> None:
    events = [window(0, "south"), *steps(range(3), "south"), *TWO_WINDOWS]
    paths = write_figures(written(tmp_path / "run", events, traffic=Traffic(10, 10), edges=("north", "south")))
    assert [path.name for path in paths[::2]] == ["modules-south.svg", "modules-north.svg", "cost.svg"]
    assert not any("wire" in text for text in texts(paths[-2]))


@pytest.mark.parametrize(
    ("events", "labels"),
    [
        ([window(0), *steps(range(2)), choice(2, [V1]), *steps(range(2, 4))], 2),
        ([choice(0, [V1], scores={}, policy="random"), *steps(range(4))], 1),
        ([window(0)], 1),
        ([window(0), *steps(range(2)), choice(2, [V1], scores=dict.fromkeys(POOL, float("nan"))), choice(4, [V1])], 2),
        ([choice(2, [V1], scores=dict.fromkeys(POOL, 0.0)), choice(4, [V1], scores=dict.fromkeys(POOL, 0.0))], 2),
        ([choice(2, [V1]), choice(4, [V1], scores={**SCORES, Q0: 0.0, K0: 1e-9})], 2),
    ],
    ids=["one choice", "no scores", "no step", "not finite", "nothing moved", "logarithmic"],
)
def test_unusual_runs_are_drawn_too(tmp_path: Path, events: list[Event], labels: int) -> None:
    assert texts(write_figures(written(tmp_path / "run", events))[0]).count("1.v_proj") == labels


def test_a_large_pool_has_fewer_labels(tmp_path: Path) -> None:
    pool = tuple(f"model.layers.{block}.mlp.{name}" for block in range(32) for name in "abcdefg")
    events = [ModulesChosen("federated", 1, "north", 0, "choice", "random", pool[:28], pool[28:], (), {}), *steps(range(5))]
    labels = [text for text in texts(write_figures(written(tmp_path / "run", events))[0]) if text in short_labels(pool)]
    assert labels == [f"{block}.a" for block in range(32)]


def test_a_run_without_choices_has_no_figures(tmp_path: Path) -> None:
    run = written(tmp_path / "run", steps(range(5)))
    assert write_figures(run) == ()
    assert not (run.path / "report").exists()


@pytest.mark.parametrize(
    ("line", "what", "got"),
    [
        ("{torn", "an event cannot be read", "torn"),
        ("[1]", "an event lacks what it must have", "the line"),
        ('{"event": "step_done", "phase": "federated", "edge": "north"}', "an event lacks what it must have", "step: Field required"),
        ('{"event": "modules_chosen", "phase": "federated", "edge": "north", "step": 1, "reason": "mood", "policy": "random", '
         '"active": ["a"], "killed": [], "scores": {}}', "an event lacks what it must have", "reason: Input should be"),
        ('{"event": "modules_chosen", "phase": "federated", "edge": "north", "step": 1, "reason": "choice", "policy": "random", '
         '"active": [], "killed": ["a"], "scores": {}}', "an event lacks what it must have", "no module is active"),
    ],
)  # fmt: skip
def test_a_damaged_log_is_refused_and_nothing_is_written(tmp_path: Path, line: str, what: str, got: str) -> None:
    run = written(tmp_path / "run", TWO_WINDOWS)
    with run.events_path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(RunFolderError) as caught:
        write_figures(run)
    assert what in caught.value.what
    assert caught.value.where.endswith(f"line {len(TWO_WINDOWS) + 1}")
    assert got in caught.value.got
    assert not (run.path / "report").exists()


@pytest.mark.parametrize("name", ["events.jsonl", "summary.json", "config.json"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    run = written(tmp_path / "run", TWO_WINDOWS)
    (run.path / name).unlink()
    with pytest.raises(RunFolderError):
        write_figures(run)
    assert not (run.path / "report").exists()


def test_matplotlib_opens_with_the_first_figure_only() -> None:
    code = "import sys, atoll.report.figures; print([name for name in ('matplotlib', 'numpy', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_another_process_draws_the_same_and_leaves_the_library_s_settings(drawn: tuple[Path, ...]) -> None:
    before, run = [path.read_bytes() for path in drawn], drawn[0].parents[1]
    # Asking for the backend would itself open pyplot.
    code = (
        "import sys, warnings; from pathlib import Path; warnings.simplefilter('error'); import matplotlib as m; "
        "from atoll.report.figures import write_figures; from atoll.runs.layout import RunDirectory; before = m.rcParams.copy(); "
        f"write_figures(RunDirectory(Path({str(run)!r}))); "
        "print('matplotlib.pyplot' in sys.modules, [name for name in before if name != 'backend' and m.rcParams[name] != before[name]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False []\n", "")
    assert [path.read_bytes() for path in drawn] == before
