"""Fleets and profiles: edges that run.toml only names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atoll.config.fleet import Profile
from atoll.config.load import LoadedConfig, changed, config_hash, load, resolved, restored
from atoll.config.schema import Edge
from atoll.errors import BadValueError, ConfigFileError, ConflictError, InputError, ManyErrors, OverrideError, UnknownKeyError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "fleets"
TWO = '[[edge]]\nname = "north"\nmemory = "2 GB"\n[[edge]]\nname = "south"\nrank = 4\n'
MEASURED = {"version": 1, "memory": 10**9, "flops": 2e11, "bandwidth": 3e7, "latency": None, "measured": {"date": "today"}}


def fleet_of(folder: Path, text: str, run: str = '[run]\nseed = 1\nfleet = "fleets/two.toml"\n') -> Path:
    """A run.toml, and fleets/two.toml beside it."""
    (folder / "fleets").mkdir(exist_ok=True)
    (folder / "fleets" / "two.toml").write_text(text)
    (folder / "run.toml").write_text(run)
    return folder / "run.toml"


def profiled(folder: Path, value: object, edge: str = "") -> Path:
    """A run.toml with one edge whose profile holds `value`."""
    (folder / "north.json").write_text(value if isinstance(value, str) else json.dumps(value))
    (folder / "run.toml").write_text(f'[[edge]]\nname = "north"\nprofile = "north.json"\n{edge}')
    return folder / "run.toml"


def leaves(path: Path, *overrides: str) -> tuple[InputError, ...]:
    with pytest.raises(InputError) as caught:
        load(path, overrides)
    return caught.value.errors if isinstance(caught.value, ManyErrors) else (caught.value,)


def only(path: Path, *overrides: str) -> InputError:
    (leaf,) = leaves(path, *overrides)
    return leaf


def stands_by_itself(loaded: LoadedConfig) -> bool:
    """Whether what a run directory keeps comes back equal, and can be changed, without the files that were named."""
    return restored(json.loads(json.dumps(resolved(loaded.config)))) == loaded.config and changed(loaded, []) == loaded


def test_a_fleet_is_as_if_its_edges_stood_in_run_toml(tmp_path: Path) -> None:
    path = fleet_of(tmp_path, TWO)
    with_fleet = load(path)
    path.write_text("[run]\nseed = 1\n" + TWO)
    assert with_fleet.config == load(path).config
    assert config_hash(with_fleet.config) == config_hash(load(path).config)


def test_a_run_directory_needs_neither_fleet_nor_profile(tmp_path: Path) -> None:
    path = fleet_of(tmp_path, TWO + 'profile = "south.json"\n')
    (tmp_path / "fleets" / "south.json").write_text(json.dumps(MEASURED))
    loaded = load(path)
    assert loaded.config.run.fleet is None
    assert loaded.config.edge[1] == Edge(name="south", rank=4, memory=10**9, flops=2e11, bandwidth=3e7)
    for file in (tmp_path / "fleets").iterdir():
        file.unlink()
    assert stands_by_itself(loaded)
    assert changed(loaded, ["edge.south.rank=2"]).config.edge[1].rank == 2


@pytest.mark.parametrize(
    ("given", "name", "becomes"),
    [
        ("rows.csv", "fleets/two.toml", "fleets/rows.csv"),
        ("./rows", "fleets/two.toml", "fleets/rows"),
        ("../rows.parquet", "fleets/two.toml", "fleets/../rows.parquet"),
        ("lies-there", "fleets/two.toml", "fleets/lies-there"),
        ("rows.jsonl.gz", "two.toml", "rows.jsonl.gz"),
        ("org/name-v1.5:test", "fleets/two.toml", "org/name-v1.5:test"),
        ("demo", "fleets/two.toml", "demo"),
        ("/data/rows.csv", "fleets/two.toml", "/data/rows.csv"),
        ("~/rows.csv", "fleets/two.toml", "~/rows.csv"),
    ],
)
def test_paths_of_a_fleet_begin_at_its_folder(given: str, name: str, becomes: str, tmp_path: Path) -> None:
    (tmp_path / "fleets" / "lies-there").mkdir(parents=True)
    (tmp_path / name).write_text(f'[[edge]]\nname = "north"\ndata = "{given}"\n')
    (tmp_path / "run.toml").write_text(f'[run]\nfleet = "{name}"\n')
    assert load(tmp_path / "run.toml").config.edge[0].data == becomes


def test_an_override_reaches_an_edge_of_a_fleet_and_the_fleet_itself(tmp_path: Path) -> None:
    path = fleet_of(tmp_path, TWO, "")
    edges = load(path, ["edge.south.data=a.csv", "run.fleet=fleets/two.toml", "edge.north.memory=1 GB"]).config.edge
    assert [(edge.memory, edge.data) for edge in edges] == [(10**9, None), (None, "a.csv")]
    absolute = load(path, [f"run.fleet={tmp_path}/fleets/two.toml"]).config
    assert [edge.name for edge in absolute.edge] == ["north", "south"]
    wrong = only(path, "run.fleet=fleets/two.toml", "edge.suth.rank=2")
    assert isinstance(wrong, OverrideError)
    assert "edge.south.rank" in wrong.do


@pytest.mark.parametrize(
    ("text", "kind", "where"),
    [
        (TWO.replace("rank", "rnak"), UnknownKeyError, "two.toml, line 6: edge.south.rnak"),
        (TWO.replace("rank = 4", "rank = 0"), BadValueError, "two.toml, line 6: edge.south.rank"),
        (TWO.replace("south", "north"), ConflictError, "two.toml, line 5: edge.north.name"),
        ('[[edge]]\nmemory = "2 GB"\n', BadValueError, "two.toml, line 1: edge[1].name"),
        ('[edge]\nname = "north"\n', BadValueError, "two.toml, line 1: edge"),
        (TWO + "[train]\nbatch_size = 2\n", UnknownKeyError, "two.toml, line 7: train"),
        ("seed = 3\n" + TWO, UnknownKeyError, "two.toml, line 1: seed"),
        ("", ConfigFileError, "two.toml"),
        ("[[edge]\n", ConfigFileError, "two.toml, line 1, column 7"),
    ],
)
def test_what_is_wrong_in_a_fleet_is_found_in_its_file(text: str, kind: type[InputError], where: str, tmp_path: Path) -> None:
    leaf = only(fleet_of(tmp_path, text))
    assert isinstance(leaf, kind)
    assert leaf.where == str(tmp_path / "fleets" / where)


def test_edges_stand_in_one_place(tmp_path: Path) -> None:
    leaf = only(fleet_of(tmp_path, TWO, '[run]\nfleet = "fleets/two.toml"\n[[edge]]\nname = "east"\n'))
    assert isinstance(leaf, ConflictError)
    assert leaf.where == f"{tmp_path / 'run.toml'}, line 2: run.fleet"


def test_a_fleet_that_is_not_there_is_one_error_beside_those_of_run_toml(tmp_path: Path) -> None:
    run = '[run]\nfleet = "fleets/tow.toml"\n[federated]\nmin_edges = 2\n[train]\nbatch_size = 0\n'
    absent, wrong = leaves(fleet_of(tmp_path, TWO, run), "edge.north.rank=2")
    assert absent.where == f"{tmp_path / 'run.toml'}, line 2: run.fleet"
    assert "did you mean two.toml?" in absent.do
    assert "train.batch_size" in wrong.where
    assert isinstance(only(fleet_of(tmp_path, TWO, '[run]\nfleet = "fleets"\n')), ConfigFileError)
    assert isinstance(only(fleet_of(tmp_path, TWO, "[run]\nfleet = 3\n")), BadValueError)


def test_a_profile_fills_what_the_edge_does_not_declare(tmp_path: Path) -> None:
    loaded = load(profiled(tmp_path, MEASURED, 'memory = "3 GB"\nlatency = "5 ms"\n'), ["edge.north.flops=1 TFLOP/s"])
    assert loaded.config.edge == (Edge(name="north", memory=3 * 10**9, flops=1e12, bandwidth=3e7, latency=0.005),)
    assert stands_by_itself(loaded)
    (tmp_path / "other.json").write_text(json.dumps({"version": 1, "latency": "20 ms"}))
    other = load(tmp_path / "run.toml", ["edge.north.profile=other.json"]).config.edge[0]
    assert other == Edge(name="north", memory=3 * 10**9, latency=0.005)


def test_what_a_process_takes_holds_of_the_memory_that_was_measured(tmp_path: Path) -> None:
    on_accelerator = {"version": 1, "memory": 10**9, "process_memory": 0}
    assert load(profiled(tmp_path, on_accelerator)).config.edge == (Edge(name="north", memory=10**9, process_memory=0),)
    assert load(profiled(tmp_path, on_accelerator, 'memory = "3 GB"\n')).config.edge == (Edge(name="north", memory=3 * 10**9),)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("{", "Expecting"),
        ("[" * 100_000, "nested"),
        ("[1]", "no object"),
        ({**MEASURED, "version": 2}, "version 2"),
        ({"memory": 3}, "version null"),
        ({**MEASURED, "memory": "much"}, 'memory = "much"'),
        ({**MEASURED, "flops": 0}, "flops = 0"),
        ({**MEASURED, "latency": True}, "latency = true"),
        ('{"version": 1, "bandwidth": NaN}', "bandwidth = nan"),
        ({**MEASURED, "speed": 3}, "speed = 3"),
    ],
)
def test_a_profile_that_cannot_be_used_is_a_page_at_the_key_that_names_it(value: object, got: str, tmp_path: Path) -> None:
    leaf = only(profiled(tmp_path, value))
    assert isinstance(leaf, ConfigFileError)
    assert leaf.where == f"{tmp_path / 'run.toml'}, line 3: edge.north.profile"
    assert got in leaf.got
    assert leaf.do.endswith("atoll doctor --profile north.json")


def test_a_profile_that_is_not_there_or_not_a_file(tmp_path: Path) -> None:
    path = profiled(tmp_path, MEASURED)
    (tmp_path / "north.json").rename(tmp_path / "nroth.json")
    assert "did you mean nroth.json?" in only(path).do
    (tmp_path / "north.json").mkdir()
    assert "Is a directory" in only(path).got
    path.write_text('[[edge]]\nname = "north"\nprofile = ""\n')
    assert isinstance(only(path), BadValueError)


def test_a_profile_of_many_edges_is_found_fault_with_once(tmp_path: Path) -> None:
    path = fleet_of(tmp_path, "".join(f'[[edge]]\nname = "e{number}"\nprofile = "all.json"\n' for number in range(5)))
    assert only(path).where == f"{tmp_path / 'fleets' / 'two.toml'}, line 3: edge.e0.profile"


def test_what_a_profile_holds_are_keys_of_an_edge() -> None:
    assert set(Profile(memory=1, process_memory=0, flops=1.0, bandwidth=1.0, latency=0.0).of_edge()) <= set(Edge.model_fields)


def test_the_example_fleets_are_equal_in_sum_and_one_of_them_spreads_four_times(tmp_path: Path) -> None:
    fleets = {}
    for name in ("homogeneous-5", "heterogeneous-5"):
        (tmp_path / "run.toml").write_text(f'[run]\nfleet = "{EXAMPLES / name}.toml"\n')
        fleets[name] = load(tmp_path / "run.toml").config.edge
    for key, spreads in (("flops", True), ("memory", True), ("bandwidth", True), ("latency", False)):
        equal, spread = ([getattr(edge, key) for edge in fleet] for fleet in fleets.values())
        assert (len(equal), len(spread)) == (5, 5)
        assert len(set(equal)) == 1
        assert sum(equal) == pytest.approx(sum(spread))
        assert max(spread) / min(spread) == pytest.approx(4 if spreads else 1)


def test_a_thousand_errors_in_a_fleet_read_its_lines_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atoll.config import document

    calls, splits = [], document.split_dotted
    monkeypatch.setattr(document, "split_dotted", lambda dotted: calls.append(dotted) or splits(dotted))
    text = "".join(f'[[edge]]\nname = "e{number % 500}"\nrank = 0\nmemry = 1\n' for number in range(1000))
    found = leaves(fleet_of(tmp_path, text))
    assert len(found) == 2000
    assert len(calls) <= text.count("\n")
