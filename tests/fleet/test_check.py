"""`atoll doctor --fleet`: what is right is ok, and each thing that is broken is a failed check that says what to do."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_server

import pytest

from atoll.base.load import load_base
from atoll.cli.app import main
from atoll.commands.doctor import Check, DoctorReport
from atoll.errors import FleetFolderError
from atoll.fleet import check as examination
from atoll.fleet.check import check_fleet
from atoll.fleet.files import CoordinatorFolder, EdgeFolder, HostFolder, split_address
from atoll.fleet.init import init
from atoll.fleet.processes import free_port
from atoll.fleet.superlink import SuperLink
from atoll.jobs.split import serve, start_host
from atoll.split.authority import issuer as issuing
from atoll.split.authority.issuer import Issuer
from atoll.split.certificates import HostTls, server_credentials
from atoll.split.host.tenants import HostLimits

from tests.conftest import save_model_folder

PATIENCE_SECONDS = 60.0
DAY = datetime.timedelta(days=1)


def found(report: DoctorReport) -> dict[str, Check]:
    """The checks by name; each that is not well says what to do."""
    assert all(check.do for check in report.checks if check.status != "ok")
    by_name = {check.name: check for check in report.checks}
    assert len(by_name) == len(report.checks)
    return by_name


def not_ok(folder: Path) -> dict[str, str]:
    return {name: check.status for name, check in found(check_fleet(folder)).items() if check.status != "ok"}


@pytest.fixture
def coordinator(folder: Path) -> CoordinatorFolder:
    """As on its own machine, with what run.toml names there; its SuperLink does not run."""
    (folder / "coordinator" / "north.json").write_text('{"version": 1}')
    (folder / "coordinator" / "held").mkdir()
    (folder / "coordinator" / "held" / "out.csv").write_text("q,a\n1,2\n")
    return CoordinatorFolder(folder / "coordinator")


@pytest.fixture
def south(folder: Path) -> EdgeFolder:
    """The split edge, as on its own machine; neither SuperLink nor host run."""
    (folder / "edges" / "south" / "north.json").write_text('{"version": 1}')
    (folder / "edges" / "south" / "south.csv").write_text("q,a\n1,2\n")
    return EdgeFolder(folder / "edges" / "south")


def test_what_init_wrote_is_well_but_for_what_is_elsewhere(folder: Path, coordinator: CoordinatorFolder, south: EdgeFolder) -> None:
    report = check_fleet(folder)
    assert report.is_well
    assert {"coordinator SuperLink", "edges/south SuperLink", "edges/south host", "edges/north run.toml"} < set(not_ok(folder))
    assert "hosts/gpu certificate" in found(report)
    assert not_ok(coordinator.path) == {"SuperLink": "warn"}
    assert not_ok(south.path) == {"SuperLink": "fail", "host": "fail"}
    assert not_ok(folder / "hosts" / "gpu") == {}


def test_a_fleet_on_one_machine_has_no_warning_but_silence(folder: Path) -> None:
    for path in (folder / "coordinator", *folder.glob("edges/*")):
        for name in ("north.json", "held/out.csv", "north.csv", "south.csv", "all.csv"):
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text('{"version": 1}')
    assert {name.split()[1] for name in not_ok(folder)} == {"SuperLink", "host"}


@pytest.mark.parametrize("name", ["", "edges", "hosts", "absent"])
def test_a_folder_that_is_of_no_fleet(name: str, folder: Path) -> None:
    with pytest.raises(FleetFolderError, match="not a folder of a fleet"):
        check_fleet(folder / name if name else folder.parent)


@pytest.mark.parametrize("name", [
    "run.toml", "ca.pem", "superlink.pem", "superlink.key", "nodes/north.pub", "app/pyproject.toml", "app/atoll_app/apps.py",
])  # fmt: skip
def test_a_file_of_the_coordinator_is_missing(name: str, coordinator: CoordinatorFolder) -> None:
    (coordinator.path / name).unlink()
    check = found(check_fleet(coordinator.path))["files"]
    assert (check.status, check.found) == ("fail", f"{name}: missing")


@pytest.mark.parametrize("name", ["run.toml", "ca.pem", "node.key", "node.pub", "client.pem", "client.key"])
def test_a_file_of_an_edge_is_missing(name: str, south: EdgeFolder) -> None:
    (south.path / name).unlink()
    assert found(check_fleet(south.path))["files"].found == f"{name}: missing"


def test_a_file_that_cannot_be_read(south: EdgeFolder) -> None:
    south.node_key.unlink()
    south.node_key.mkdir()
    assert found(check_fleet(south.path))["files"].found.startswith("node.key: ")


@pytest.mark.skipif(os.name != "posix", reason="no such permissions")
def test_a_private_key_that_others_may_read(south: EdgeFolder) -> None:
    south.node_key.chmod(0o640)
    check = found(check_fleet(south.path))["private keys"]
    assert (check.status, check.found) == ("fail", "others may read node.key")
    assert check.do == f"chmod 600 {south.node_key}"


def renewed(folder: EdgeFolder, monkeypatch: pytest.MonkeyPatch, *, since: datetime.timedelta, valid: datetime.timedelta) -> None:
    """Another certificate and authority for the edge, that hold from so long ago and for so long."""
    monkeypatch.setattr(issuing, "CLOCK_SKEW", since)
    monkeypatch.setattr(issuing, "VALID", valid)
    issuer = Issuer("another")
    for name, content in {**issuer.own("ca"), **issuer.device("client", "south")}.items():
        (folder.path / name).write_bytes(content)
    (folder.path / "ca.key").unlink()


@pytest.mark.parametrize(("since", "valid", "status", "says", "clock"), [
    (DAY, 40 * DAY, "ok", "38 days more", "ok"),
    (DAY, 20 * DAY, "warn", "18 days more", "ok"),
    (9 * DAY, 8 * DAY, "fail", "has expired", "ok"),
    (-DAY, 40 * DAY, "fail", "does not hold yet", "fail"),
    (DAY / 48, 40 * DAY, "ok", "39 days more", "warn"),
])  # fmt: skip
def test_certificates_and_the_clock(
    since: datetime.timedelta, valid: datetime.timedelta, status: str, says: str, clock: str, south: EdgeFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    renewed(south, monkeypatch, since=since, valid=valid)
    checks = found(check_fleet(south.path))
    assert checks["certificate"].status == status
    assert says in checks["certificate"].found
    assert checks["clock"].status == clock


def test_a_certificate_of_another_authority(south: EdgeFolder) -> None:
    south.ca.write_bytes(Issuer("another").own("ca")["ca.pem"])
    assert "not signed by this authority" in found(check_fleet(south.path))["certificate"].found


def test_a_key_that_does_not_fit(coordinator: CoordinatorFolder, folder: Path) -> None:
    shutil.copyfile(folder / "hosts" / "gpu" / "host.key", coordinator.key)
    check = found(check_fleet(coordinator.path))["certificate"]
    assert "does not belong to the certificate" in check.found


@pytest.mark.parametrize("name", ["ca.pem", "client.pem", "client.key"])
def test_files_that_are_no_certificates(name: str, south: EdgeFolder) -> None:
    (south.path / name).write_text("no")
    assert found(check_fleet(south.path))["certificate"].status == "fail"


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address is called, as some are no loopback."""
    monkeypatch.setattr(examination, "_superlink", lambda *_: Check("SuperLink", "ok", ""))


def test_a_certificate_that_is_for_another_address(coordinator: CoordinatorFolder, unasked: None) -> None:
    value = json.loads(coordinator.fleet_json.read_text())
    coordinator.fleet_json.write_text(json.dumps({**value, "address": "other.invalid:7440"}))
    check = found(check_fleet(coordinator.path))["address"]
    assert (check.status, check.found) == ("fail", "superlink.pem is not for other.invalid")


def test_public_keys_that_are_none(coordinator: CoordinatorFolder) -> None:
    coordinator.node_public("north").write_text("ssh-ed25519 AAAA\n")
    check = found(check_fleet(coordinator.path))["node keys"]
    assert (check.status, check.found) == ("fail", "no public key of a node: north.pub")


@pytest.mark.parametrize(("name", "says"), [("node.key", "node.key is no private key"), ("node.pub", "node.pub is no public key")])
def test_node_keys_that_are_none(name: str, says: str, south: EdgeFolder) -> None:
    (south.path / name).write_text("no")
    assert says in found(check_fleet(south.path))["node key"].found


def test_a_public_key_of_another_node(folder: Path, south: EdgeFolder) -> None:
    shutil.copyfile(folder / "edges" / "north" / "node.pub", south.node_public)
    assert found(check_fleet(south.path))["node key"].found == "node.pub is not of node.key"
    checks = found(check_fleet(folder))
    assert checks["edges/south agreement"].found == "not as the coordinator has it: node.pub"
    assert checks["edges/north agreement"].status == "ok"


@pytest.mark.parametrize(("change", "says"), [
    (lambda edge: edge.run_toml.write_text("[train]\naccumulate = 2\n" + edge.run_toml.read_text()), "run.toml"),
    (lambda edge: edge.run_toml.write_text("no"), "run.toml"),
    (lambda edge: edge.ca.write_bytes(Issuer("another").own("ca")["ca.pem"]), "ca.pem"),
    (lambda edge: edge.edge_json.write_text(edge.edge_json.read_text().replace("south", "west")), "name"),
    (lambda edge: edge.edge_json.write_text(edge.edge_json.read_text().replace('superlink": "127', 'superlink": "128')), "address"),
])  # fmt: skip
def test_an_edge_that_does_not_agree_with_the_coordinator(
    change: Callable[[EdgeFolder], object], says: str, folder: Path, south: EdgeFolder, unasked: None
) -> None:
    change(south)
    check = found(check_fleet(folder))["edges/south agreement"]
    assert (check.status, check.found) == ("fail", f"not as the coordinator has it: {says}")


def test_paths_may_differ_between_machines(folder: Path, south: EdgeFolder, coordinator: CoordinatorFolder) -> None:
    text = south.run_toml.read_text().replace('"south.csv"', '"here/rows.csv"').replace('"north.json"', '"here.json"')
    south.run_toml.write_text(text + "# mine\n")
    (south.path / "here.json").write_text('{"version": 1}')
    assert found(check_fleet(folder))["edges/south agreement"].status == "ok"


def test_an_edge_without_a_folder(folder: Path) -> None:
    shutil.rmtree(folder / "edges" / "west")
    assert found(check_fleet(folder))["edges/west"].status == "fail"


def test_a_host_that_nobody_has_a_certificate_for(folder: Path, south: EdgeFolder) -> None:
    south.edge_json.write_text(south.edge_json.read_text().replace('"host": "127.0.0.1', '"host": "127.0.0.2'))
    check = found(check_fleet(folder))["edges/south host address"]
    assert (check.status, check.found) == ("fail", "no hosts/*/host.pem is for 127.0.0.2")


@pytest.mark.parametrize(("text", "says"), [
    ("[run]\nroundz = 1\n", "roundz"), ('[[edge]]\nname = "east"\n', "no [[edge]] called south"), ("no", "not valid TOML"),
])  # fmt: skip
def test_a_run_toml_that_is_not_right(text: str, says: str, south: EdgeFolder) -> None:
    south.run_toml.write_text(text)
    check = found(check_fleet(south.path))["run.toml"]
    assert check.status == "fail"
    assert says in check.found


def test_rows_that_are_not_on_their_machine(south: EdgeFolder, coordinator: CoordinatorFolder) -> None:
    (south.path / "south.csv").unlink()
    check = found(check_fleet(south.path))["rows"]
    assert (check.status, check.found) == ("fail", "south.csv is not there")
    assert str(south.path / "south.csv") in check.do
    (coordinator.path / "held" / "out.csv").unlink()
    assert found(check_fleet(coordinator.path))["held-out rows"].status == "fail"


def test_a_base_that_may_be_on_the_hub_or_missing(run_toml: Path, tmp_path: Path) -> None:
    run_toml.write_text('[model]\nbase = "models/llama"\n' + run_toml.read_text())
    init(run_toml, tmp_path / "fleet", f"127.0.0.1:{free_port()}", [f"127.0.0.1:{free_port()}"])
    (tmp_path / "fleet" / "coordinator" / "north.json").write_text('{"version": 1}')
    check = found(check_fleet(tmp_path / "fleet" / "coordinator"))["base"]
    assert check.status == "warn"
    assert "taken for a Hugging Face id" in check.found


def test_a_base_is_looked_for_where_the_run_will_look(run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where doctor was started, and not for its name alone."""
    run_toml.write_text('[model]\nbase = "llama"\n' + run_toml.read_text())
    init(run_toml, tmp_path / "fleet", f"127.0.0.1:{free_port()}", [f"127.0.0.1:{free_port()}"])
    coordinator = tmp_path / "fleet" / "coordinator"
    (coordinator / "north.json").write_text('{"version": 1}')
    assert found(check_fleet(coordinator))["base"].status == "warn", "a hub may have it"
    save_model_folder(tmp_path / "elsewhere" / "llama", "llama")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert found(check_fleet(coordinator))["base"].status == "fail", "the run would not take it from here"
    (coordinator / "llama").mkdir()
    assert found(check_fleet(coordinator))["base"].status == "fail", "an empty folder is no base"
    shutil.rmtree(coordinator / "llama")
    shutil.copytree(tmp_path / "elsewhere" / "llama", coordinator / "llama")
    check = found(check_fleet(coordinator))["base"]
    assert (check.status, check.found) == ("ok", "llama is there: llama, 2 blocks")


def test_rows_are_read_as_the_edge_reads_them(folder: Path, south: EdgeFolder) -> None:
    assert found(check_fleet(south.path))["reading rows"].found == "1 row"
    (south.path / "south.csv").write_text("x,y\n1,2\n")
    check = found(check_fleet(south.path))["reading rows"]
    assert check.status == "fail"
    assert "reading rows" not in {name.partition(" ")[2] for name in found(check_fleet(folder))}, "only on its own machine"


@contextmanager
def listening(address: str, talk: Callable[[object], object]) -> Iterator[None]:
    """Somebody who takes one connection there."""
    server = create_server(split_address(address, ""))

    def serve_one() -> None:
        connection, _ = server.accept()
        with connection:
            talk(connection)

    thread = threading.Thread(target=serve_one, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.close()
        thread.join(PATIENCE_SECONDS)


def test_somebody_else_at_the_superlinks_address(south: EdgeFolder) -> None:
    address = south.read().superlink
    with listening(address, lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")):  # type: ignore[attr-defined]
        check = found(check_fleet(south.path))["SuperLink"]
    assert check.status == "fail"
    assert "does not speak TLS" in check.found


def test_a_superlink_with_a_certificate_of_another_authority(south: EdgeFolder, tmp_path: Path) -> None:
    foreign = Issuer("another").server("superlink", "somebody", [])
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "superlink.pem", tmp_path / "superlink.key")

    def greet(connection: object) -> None:
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(connection, server_side=True)  # type: ignore[arg-type]

    with listening(south.read().superlink, greet):
        check = found(check_fleet(south.path))["SuperLink"]
    assert check.status == "fail"
    assert "is not believed" in check.found


def test_a_running_superlink_and_host_answer(folder: Path, south: EdgeFolder, coordinator: CoordinatorFolder) -> None:
    host, called = HostFolder(folder / "hosts" / "gpu"), south.read().host
    assert called is not None
    limits = HostLimits()
    credentials = server_credentials(called, HostTls(host.cert, host.key, host.ca), insecure=False)
    running = start_host(serve(load_base("tiny"), "tiny", "fp32", 32, limits), limits, called, credentials)
    try:
        with SuperLink(coordinator, print) as link:
            link.nodes()
            assert not_ok(coordinator.path) == not_ok(south.path) == {}
            assert not {name for name in not_ok(folder) if name.endswith(("SuperLink", "host"))}
            for name, content in Issuer("another").device("client", "south").items():
                (south.path / name).write_bytes(content)
            assert not_ok(south.path) == {"certificate": "fail", "host": "fail", "SuperLink": "fail"}
    finally:
        running.stop()


def test_the_command_line(folder: Path, south: EdgeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--fleet", str(folder)]) == 0
    assert "\nok    coordinator certificate " in capsys.readouterr().out
    assert main(["doctor", "--fleet", str(south.path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["well"] is False
    assert main(["doctor", "--fleet", str(folder.parent)]) == 2
    assert capsys.readouterr().err.startswith("error R505")
    assert main(["doctor", "--fleet", str(folder), "--profile", "p.json"]) == 2
    assert capsys.readouterr().err.startswith("error C107")


def test_the_command_line_of_init(run_toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fleet"
    arguments = ["fleet", "init", str(run_toml), "--out", str(out), "--address", "10.0.0.5:7440", "--host", "10.0.0.7:7431"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out}")
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error R502")
    assert main(["fleet", "ini"]) == 2
    assert "did you mean `atoll fleet init`?" in capsys.readouterr().err
    assert main(["fleet"]) == 0
    assert "Write the folder of every machine." in capsys.readouterr().out


def test_a_report_fits_its_columns_between_words_and_loses_none() -> None:
    report = DoctorReport((
        Check("edges/north certificate", "warn", "client.pem holds until 2027-11-30, 10 days more; signed by ca.pem", "renew " * 20),
        Check("flwr", "ok", ""), Check("SuperLink", "ok", "x" * 90),
    ))  # fmt: skip
    for columns in (60, 80, 140):
        lines = report.to_text(columns).splitlines()
        assert max(len(line) for line in lines if "x" * 90 not in line) <= columns
        assert " ".join(" ".join(lines).split()) == " ".join(report.to_text().split())
    assert len(report.to_text().splitlines()) == 4
