"""compose.yaml and the Dockerfile: what they say, and that their own commands serve and report their health."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from gateway.config import GatewayConfig
from loadtest.peers.waiting import Watched, wait_until
from tests.integration.compose_local import ROOT, LocalService, load_compose
from worker.config import WorkerConfig

WORKERS = ("worker", "encoder", "prefill", "worker-gpu", "encoder-gpu")
SERVICES = ("keys", "gateway", *WORKERS)
COMPOSE = load_compose()["services"]


def module_of(command: list[str]) -> str:
    """What a command runs; a wheel has the rooms inside `degas`, so `python -m gateway` would find nothing there."""
    assert command[:2] == ["python", "-m"] and command[2].partition(".")[0] == "degas"
    return command[3] if command[2] == "degas.rooms" else command[2]


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_confined(name: str) -> None:
    service = COMPOSE[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service and "user" not in service  # the image's user is not root
    assert service["restart"] == ("no" if name == "keys" else "unless-stopped")
    if name != "keys":
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}
        assert service["depends_on"] == {"keys": {"condition": "service_completed_successfully"}}
        assert service["healthcheck"]["test"][0] == "CMD"


def test_only_the_gateway_is_published_and_only_here() -> None:
    assert [name for name in SERVICES if "ports" in COMPOSE[name]] == ["gateway"]
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE["gateway"]["ports"])
    assert load_compose()["networks"]["wire"] == {"internal": True}
    assert list(COMPOSE["worker"]["networks"]) == ["wire"]


def test_behind_the_proxy_no_gateway_is_published() -> None:
    text = (ROOT / "deploy" / "compose.scale.yaml").read_text()
    scaled = yaml.safe_load(text.replace("!reset []", "[]"))["services"]
    assert "ports: !reset []" in text and scaled["gateway"]["ports"] == []
    proxy = scaled["proxy"]
    assert proxy["read_only"] is True and proxy["cap_drop"] == ["ALL"] and proxy["networks"] == ["front"]
    assert all(port.startswith("127.0.0.1:") for port in proxy["ports"])
    notice_s = float(scaled["gateway"]["environment"]["DEGAS_GATEWAY_DRAIN_NOTICE_S"])
    drain_s = float(COMPOSE["gateway"]["environment"]["DEGAS_GATEWAY_DRAIN_DEADLINE_S"])
    assert notice_s + drain_s < float(COMPOSE["gateway"]["stop_grace_period"].rstrip("s"))


def test_each_side_sees_its_own_keys_only() -> None:
    assert COMPOSE["gateway"]["volumes"] == ["gateway-keys:/keys:ro"]
    assert "worker-keys:/keys:ro" in COMPOSE["worker"]["volumes"]
    assert not [volume for volume in COMPOSE["worker"]["volumes"] if "gateway-keys" in volume]


def test_gpu_is_a_profile_with_a_reservation() -> None:
    assert "profiles" not in COMPOSE["worker"]
    for name in ("worker-gpu", "encoder-gpu"):
        assert COMPOSE[name]["profiles"] == ["gpu"] and COMPOSE[name]["image"] == "degas-worker:cuda"
        devices = COMPOSE[name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


@pytest.mark.parametrize("name", WORKERS)
def test_gateways_find_workers_of_every_role_by_one_name(name: str) -> None:
    host = COMPOSE["gateway"]["environment"]["DEGAS_GATEWAY_WORKERS"].removeprefix("dns://").partition(":")[0]
    assert COMPOSE[name]["networks"]["wire"]["aliases"] == [host]


@pytest.mark.parametrize(
    ("worker", "other", "role", "profile"),
    [
        ("worker", "encoder", "encode", "encoders"),
        ("worker", "prefill", "prefill", "prefills"),
        ("worker-gpu", "encoder-gpu", "encode", "gpu"),
    ],
)
def test_a_role_of_its_own_is_the_worker_in_another_role(
    worker: str, other: str, role: str, profile: str
) -> None:
    """With other settings its features, or its pages, would be of no use."""
    assert COMPOSE[other]["profiles"] == [profile]
    assert COMPOSE[worker]["environment"]["DEGAS_WORKER_ROLE"] == "decode"
    for key in COMPOSE[worker].keys() - {"environment"}:
        assert COMPOSE[other][key] == COMPOSE[worker][key] or key == "profiles"
    assert COMPOSE[other]["environment"] == COMPOSE[worker]["environment"] | {"DEGAS_WORKER_ROLE": role}


@pytest.mark.parametrize("name", SERVICES)
def test_commands_and_settings_exist(name: str) -> None:
    service = COMPOSE[name]
    commands = [service["command"]]
    if "test" in service["healthcheck"]:
        commands.append(service["healthcheck"]["test"][1:])
    for command in commands:
        assert importlib.util.find_spec(module_of(command)) is not None
    known = {"GATEWAY": GatewayConfig.model_fields, "WORKER": WorkerConfig.model_fields}
    for variable in service.get("environment") or {}:
        _, role, field = variable.split("_", 2)
        assert field.lower() in known[role], variable


def test_stopping_takes_less_than_the_grace() -> None:
    gateway = COMPOSE["gateway"]
    drain_s = float(gateway["environment"]["DEGAS_GATEWAY_DRAIN_DEADLINE_S"])
    assert drain_s < float(gateway["stop_grace_period"].rstrip("s"))
    command = COMPOSE["worker"]["command"]
    worker_s = float(command[command.index("--worker-grace-s") + 1])
    assert worker_s + 5 < float(COMPOSE["worker"]["stop_grace_period"].rstrip("s"))


def test_dockerfile_targets_and_user() -> None:
    text = (ROOT / "Dockerfile").read_text()
    names = set(re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE))
    targets = {COMPOSE[name]["build"]["target"] for name in SERVICES if "build" in COMPOSE[name]}
    assert targets == {"gateway", "worker"} <= names
    users = re.findall(r"^USER (\S+)", text, re.MULTILINE)
    assert users == ["10001:10001", "haproxy"]
    gateway_build = text.split("AS gateway-needs")[1].split("AS operations")[0]
    assert "-r gateway.txt" in gateway_build and "find_spec('torch')" in gateway_build
    copied = set(" ".join(re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE)).split())
    for name in copied:
        assert list(ROOT.glob(name)), name
    rooms = re.search(r"^ROOMS = (\(.*\))", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert rooms is not None
    for name in (*ast.literal_eval(rooms[1]), "degas"):
        assert f"COPY {name} " in text
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed <= copied and all(name in allowed or name.partition("/")[0] in allowed for name in copied)


def _health_commands_of_images() -> list[list[str]]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    return [json.loads(found) for found in re.findall(r"^HEALTHCHECK .*?CMD (\[.*\])", text, re.MULTILINE)]


def test_images_have_health_checks_that_exist() -> None:
    commands = _health_commands_of_images()
    assert len(commands) == 2
    assert all(importlib.util.find_spec(module_of(command)) for command in commands)


def test_deploy_files_parse_and_ask_for_metrics_that_exist() -> None:
    from gateway.config import GatewayConfig
    from gateway.core.service import Service
    from gateway.scrape import Scrape
    from worker.loop.metrics import WorkerMetrics
    from worker.step.contract import GraphCounts

    known = {
        family.name
        for family in Scrape(Service(GatewayConfig(workers=("ipc:///tmp/nobody.sock",)))).families()
    }
    worker = WorkerMetrics(GraphCounts())
    values = [name.partition("|")[0] for name in vars(worker)]
    known |= {f"degas_worker_{name}" for name in values} | {f"degas_worker_{name}_seconds" for name in values}
    beat = (
        "step",
        "num_running",
        "num_waiting",
        "free_pages",
        "total_pages",
        "drain_rate",
        "up",
        "anomalies",
    )
    known |= {f"degas_worker_{name}" for name in beat}
    known |= {
        f"degas_{name}" for name in ("requests_in_flight", "requests_recovering", "ready", "images_pending")
    }
    used: set[str] = set()
    for path in (ROOT / "deploy").rglob("*"):
        if path.suffix in (".yml", ".yaml"):
            # Compose's own mark, which takes away what the file below says.
            documents = list(yaml.safe_load_all(path.read_text().replace("!reset []", "[]")))
            assert all(documents), path
        elif path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix in (".yml", ".yaml", ".json") and "kubernetes" not in path.parts:
            used |= set(re.findall(r"\bdegas_[a-z0-9_]+", path.read_text()))
    used = {name for name in used if not name.startswith("degas_rule_")}
    assert len(used) > 15

    def exists(name: str) -> bool:
        bare = re.sub(r"_(bucket|sum|count)$", "", name)
        return bool({name, bare, name.removesuffix("_total"), bare.removesuffix("_total")} & known)

    assert not [name for name in sorted(used) if not exists(name)]


# ------------------------------------------------------------------ as processes


def until(condition: Callable[[], bool], what: str, services: list[LocalService]) -> None:
    watched = [
        Watched(service.name, service.process, service.log)
        for service in services
        if service.process is not None
    ]
    wait_until(condition, what, watched, timeout_s=60)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[dict[str, LocalService]]:
    compose = load_compose({"DEGAS_MODEL": "sim", "DEGAS_DEVICE": "sim"})
    ports: dict[str, int] = {}
    for port in ("8080", "8081", "5555"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports[port] = probe.getsockname()[1]
    made = {
        name: LocalService(name, compose["services"][name], tmp_path, ports)
        for name in ("keys", "gateway", "worker")
    }
    yield made
    for service in made.values():
        if service.process is not None:
            service.stop()


@pytest.mark.slow
def test_the_files_own_commands_serve_and_report_their_health(services: dict[str, LocalService]) -> None:
    keys, gateway, worker = services["keys"], services["gateway"], services["worker"]
    assert keys.start().wait(30) == 0, keys.log.read_text()
    assert keys.start().wait(30) == 0, "the second start must leave the keys alone"
    running = [gateway, worker]
    gateway.start()
    health_url = gateway.health_command()[-1]
    until(lambda: _status(health_url.replace("readyz", "healthz")) == 200, "gateway alive", [gateway])
    assert not gateway.is_healthy()  # no worker yet
    assert not worker.is_healthy()
    worker.start()
    until(worker.is_healthy, "worker healthy", running)
    until(gateway.is_healthy, "gateway healthy", running)
    body = {"messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 4}
    request = urllib.request.Request(
        health_url.replace("/readyz", "/v1/chat/completions"),
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        answer = json.load(reply)
    assert answer["usage"]["completion_tokens"] == 4
    assert gateway.stop() == 0
    assert worker.stop() == 0
    assert not worker.is_healthy()


def _status(url: str) -> int | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return int(reply.status)
    except OSError:
        return None


def test_python_is_the_one_the_images_use() -> None:
    found = re.search(r"ARG PYTHON=(\d+)\.(\d+)", (ROOT / "Dockerfile").read_text())
    assert found is not None and (int(found[1]), int(found[2])) >= (3, 11)
    assert sys.version_info >= (3, 11)
