"""Trackers that ship: what they write is read by their own readers, without a network. Each test needs its library."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import atoll
from atoll.errors import UnavailableError
from atoll.registry.parts import names
from atoll.runs.events import EdgeFinished, Evaluated, Event, Resumed, RoundFinished, RoundStarted, RunFinished, RunStarted, StepDone
from atoll.runs.tracker import TrackedRun, Tracking, check_trackers
from atoll.runs.trackers.points import points_of
from atoll.testing import check

from tests.conftest import write_job

CONFIG = {"run": {"name": "run", "seed": 3, "rounds": 2}, "track": {"to": ["x"], "project": "clinics"}, "edge": [{"name": "north"}]}
ROUND: tuple[Event, ...] = (
    RoundStarted("federated", 1, 2, ("north", "south")),
    StepDone("federated", 1, "north", 0, 2.5, 1e-3, 0.5, 64, 32, 8),
    StepDone("federated", 1, "north", 1, 2.25, 1e-3, 0.5, 64, 32, 8),
    StepDone("federated", 1, "south", 0, 3.5, 1e-3, 0.5, 64, 32, 8),
    EdgeFinished("federated", 1, "north", 2, 2.375, 100, 200, 10**9, 1.5),
    RoundFinished("federated", 1, ("north",), 0.0, 100, 200, 2.0, None),
    Evaluated("round-1", {"loss": 2.0, "num_rows": 4.0}),
)  # fmt: skip
END: tuple[Event, ...] = (
    Evaluated("federated", {"loss": 1.5}), Evaluated("local-only:north", {"loss": 1.75}), RunFinished("complete", 3.0),
)  # fmt: skip
TOLD = {
    "federated/north/loss": [(0, 2.5), (1, 2.25)], "federated/south/loss": [(0, 3.5)], "rounds/federated/north/mean_loss": [(1, 2.375)],
    "rounds/federated/up_bytes": [(1, 100.0)], "held-out/base/loss": [(0, 4.0)], "held-out/federated/loss": [(1, 2.0), (2, 1.5)],
    "held-out/local-only/north/loss": [(2, 1.75)],
}  # fmt: skip


def tell(tracker: str, folder: Path) -> None:
    """A run that was stopped after its first round, and went on in another process."""
    problems: list[str] = []
    run = TrackedRun("run-0001", folder, CONFIG)
    began = (RunStarted("run-0001", 3, 2, ("north", "south")), Evaluated("base", {"loss": 4.0}), *ROUND, RunFinished("interrupted", 1.0))
    for events in (began, (Resumed(1), *END)):
        tracking = Tracking([tracker], {}, run, problems.append)
        for event in events:
            tracking(event)
    assert not problems


def needs(library: str) -> None:
    if find_spec(library) is None:
        pytest.skip(f"the package {library} is not installed")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in; no tracker knows a server."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"config/text_summary", "status/text_summary"} <= set(read.Tags()["tensors"])
    return {tag: [(point.step, point.value) for point in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def read_mlflow(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("clinics")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["run.seed"]) == ("run-0001", "FINISHED", "3")
    return {key: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}


def wandb_records(file: Path) -> Iterator[bytes]:
    """wandb's own reader is compiled into its service: a log as LevelDB writes it, of blocks with fragments of records."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # A whole record, or the last fragment of one.
            yield record
            record = b""


def read_wandb(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from wandb.proto import wandb_internal_pb2

    found: dict[str, list[tuple[int, float]]] = {}
    ids = set()
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2, "one of each process"
    for file in files:
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
            line: dict[str, Any] = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            axes = {key: value for key, value in line.items() if key == "round" or key.endswith("/step")}
            for key, value in line.items():
                if key not in axes and not key.startswith("_"):
                    found.setdefault(key, []).append((next(iter(axes.values())), value))
    assert len(ids) == 1
    assert next(iter(ids))[1:] == ("clinics", "run-0001")
    return found


def read_trackio(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """In a process of its own, as it knows its folder when it is opened."""
    code = (
        "import json, trackio\nfrom trackio.sqlite_storage import SQLiteStorage\n"
        "(run,) = trackio.Api().runs('clinics')\nassert run.name.startswith('run-0001-'), run.name\n"
        "print(json.dumps(SQLiteStorage.get_logs('clinics', run.name)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, list[tuple[int, float]]] = {}
    for line in json.loads(done.stdout.splitlines()[-1]):
        for key, value in line.items():
            if "/" in key:
                found.setdefault(key, []).append((line["step"], value))
    return found


READERS: dict[str, Callable[[Path], dict[str, list[tuple[int, float]]]]] = {
    "tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb, "trackio": read_trackio,
}  # fmt: skip


@pytest.mark.parametrize("tracker", READERS)
def test_its_own_reader_finds_every_edge_and_round_also_after_a_stop(tracker: str, place: Path) -> None:
    needs(tracker)
    if tracker == "trackio":  # It has read its folder's name already, if it was opened before.
        code = "import sys; from pathlib import Path; from tests.runs.test_trackers import tell; tell('trackio', Path(sys.argv[1]))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run([sys.executable, "-c", code, str(place)], check=True, env=environment)
    else:
        tell(tracker, place)
    found = READERS[tracker](place)
    assert {key: [(step, pytest.approx(value)) for step, value in points] for key, points in TOLD.items()} == {
        key: found.get(key) for key in TOLD
    }


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow", "wandb", "trackio"])
def test_it_takes_whatever_happens(tracker: str, place: Path) -> None:
    needs(tracker)
    check("tracker", tracker)


def test_all_that_ship_are_tested() -> None:
    assert set(names("tracker")) == set(READERS)


def test_without_its_library_a_tracker_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atoll.runs.tracker.find_spec", lambda name: None)
    for tracker in READERS:
        with pytest.raises(UnavailableError) as caught:
            check_trackers([tracker])
        assert f"pip install 'atoll[{tracker}]'" in caught.value.do
    job = write_job(tmp_path, {"track": {"to": ["wandb"]}})
    for act in (lambda: atoll.plan(job), lambda: atoll.train(job, out=tmp_path / "run")):
        with pytest.raises(UnavailableError):
            act()
    assert not (tmp_path / "run").exists()


def test_a_whole_run_is_tracked(place: Path) -> None:
    needs("tensorboard")
    job = write_job(place, {"run": {"rounds": 1}, "track": {"to": ["tensorboard"]}})
    run = atoll.train(job, out=place / "run").run_dir
    found = read_tensorboard(run)
    assert {"federated/north/loss", "federated/south/loss", "rounds/federated/up_bytes", "held-out/federated/loss"} <= set(found)
    assert len(found["federated/north/loss"]) == 3


def test_what_has_no_numbers_has_no_points() -> None:
    assert points_of(RunFinished("complete", 1.0), 2) is None
    assert points_of(Evaluated("round-7", {"loss": 1.0}), 9) == points_of(Evaluated("round-7", {"loss": 1.0, "num_rows": 2.0}), 9)
