"""What `degas ray up` is told, and how it answers what it cannot use. Ray itself is not needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from degas.cli import app
from degas.config_view import as_markdown, with_tables
from degas.on_ray import commands
from degas.on_ray.config import RAY_SETTINGS
from degas.on_ray.settings import gpus_and_device, resolve
from shared.settings import ConfigError

DOC = (Path(__file__).parents[4] / "docs" / "ray.md").read_text()


def test_defaults_are_one_worker_and_a_gateway_here() -> None:
    found = resolve({}, {})
    assert found.ray.run_gateway and found.ray.limits().max_workers == found.ray.limits().min_workers == 1
    assert found.ray.ports() is None and found.ray.registry_address() is None
    assert found.worker_variables == {"DEGAS_WORKER_THREADS": "1"}
    assert found.gateway_variables == {"DEGAS_GATEWAY_GRPC_PORT": "8081"}


def test_flags_variables_and_file_reach_whom_they_concern(tmp_path: Path) -> None:
    file = tmp_path / "degas.toml"
    file.write_text("[ray]\nmin_workers = 2\nmax_workers = 5\n[worker]\nmax_rows = 8\nthreads = 3\n")
    environment = {"DEGAS_RAY_MIN_WORKERS": "3", "DEGAS_GATEWAY_PORT": "9001", "DEGAS_SERVE_REPORT": "true"}
    found = resolve({"num_cpus": "4", "depth": "1", "worker_ports": "5600-5663"}, environment, file)
    assert (found.ray.min_workers, found.ray.max_workers, found.ray.num_cpus) == (3, 5, 4.0)
    assert found.worker_variables == {
        "DEGAS_WORKER_MAX_ROWS": "8",
        "DEGAS_WORKER_DEPTH": "1",
        "DEGAS_WORKER_THREADS": "3",
    }
    assert found.gateway_variables["DEGAS_GATEWAY_PORT"] == "9001"
    assert found.ray.ports() == (5600, 5663)


def test_a_worker_has_as_many_threads_as_cpus_unless_it_is_told() -> None:
    assert resolve({"num_cpus": "4"}, {}).worker.threads == 4
    assert "DEGAS_WORKER_THREADS" not in resolve({"num_cpus": "0.5"}, {}).worker_variables


@pytest.mark.parametrize(
    ("asked", "device", "in_cluster", "given"),
    [
        (None, "auto", 0, (0, "cpu")),
        (None, "auto", 8, (1, "auto")),
        (None, "cuda", 0, (1, "cuda")),
        (None, "sim", 8, (0, "sim")),
        (None, "cpu", 8, (0, "cpu")),
        (0.0, "auto", 8, (0, "cpu")),
        (0.5, "auto", 8, (0.5, "auto")),
    ],
)
def test_a_worker_without_a_gpu_is_one_on_the_cpu(
    asked: float | None, device: str, in_cluster: float, given: tuple[float, str]
) -> None:
    assert gpus_and_device(asked, device, in_cluster) == given


def test_a_path_of_this_machine_is_told_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "pocket").mkdir()
    assert resolve({"model": "./models"}, {}).worker.model == str(tmp_path / "models")
    assert resolve({"model": "pocket"}, {}).worker.model == "pocket"
    assert resolve({"model": "/on/the/nodes"}, {}).worker.model == "/on/the/nodes"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"min_workers": "0"}, "min_workers"),
        ({"min_workers": "3", "max_workers": "2"}, "max_workers 2 is below min_workers 3"),
        ({"address": "ray://head:10001"}, "run this on a node of the cluster"),
        ({"address": "head"}, "such as 10.0.0.1:6379"),
        ({"fleet": "a/b"}, "letters, digits"),
        ({"worker_ports": "5600"}, "such as 5600-5663"),
        ({"worker_ports": "5700-5600"}, "such as 5600-5663"),
        ({"registry": "5550"}, "such as 10.0.0.1:5550"),
        ({"run_gateway": "false"}, "set registry"),
        ({"run_gateway": "false", "registry": "10.0.0.1:5550"}, "set keys_dir"),
        ({"worker_keys_dir": "/keys"}, "needs keys_dir"),
        ({"target_load": "0"}, "target_load"),
        ({"num_gpus": "-1"}, "num_gpus"),
        ({"max_rows": "0"}, "max_rows"),
    ],
)
def test_what_cannot_be_used_is_named(flags: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        resolve(flags, {})


@pytest.mark.parametrize(
    "variable",
    [
        "DEGAS_WORKER_ENDPOINT",
        "DEGAS_WORKER_CURVE_KEY_DIR",
        "DEGAS_GATEWAY_WORKERS",
        "DEGAS_GATEWAY_CURVE_KEY_DIR",
    ],
)
def test_how_they_meet_is_not_for_others_to_say(variable: str) -> None:
    with pytest.raises(ConfigError, match="which degas ray up sets itself"):
        resolve({}, {variable: "tcp://10.0.0.1:5555"})


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="is not a setting of degas ray up; did you mean DEGAS_RAY_MIN_WORKERS"
    ):
        resolve({}, {"DEGAS_RAY_MIN_WORKER": "2"})


def run(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "200", "DEGAS_CONFIG": None}).invoke(app, list(words))


def test_every_setting_is_a_flag_of_up() -> None:
    shown = run("ray", "up", "--help").output
    for name in ("--min-workers", "--num-gpus", "--registry", "--max-rows", "--max-queue", "--model"):
        assert name in shown
    assert "--curve-key-dir" not in shown and "--endpoint" not in shown


@pytest.mark.parametrize("words", [("up",), ("down",), ("status",)])
def test_without_ray_it_says_what_to_install(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    found = run("ray", *words)
    assert found.exit_code == 2 and "pip install 'degas-serve[gateway,ray]'" in found.output


def test_two_models_are_one_too_many() -> None:
    found = run("ray", "up", "pocket", "--model", "sim")
    assert found.exit_code == 2 and "give one of them" in found.output


def test_a_fleet_is_described_in_lines() -> None:
    workers = [
        {"number": 1, "state": "serving", "endpoint": "tcp://10.0.0.1:5600", "node": "10.0.0.1"},
        {"number": 2, "state": "placing", "endpoint": "", "node": ""},
    ]
    state = {"url": "http://127.0.0.1:8080", "ready": True, "wanted": 2, "workers": workers}
    assert commands.describe("degas", state).splitlines() == [
        "degas: serves http://127.0.0.1:8080",
        "2 workers, 2 wanted",
        "     1  serving   tcp://10.0.0.1:5600           10.0.0.1",
        "     2  placing   -                             -",
    ]
    assert commands.describe("x", {}).splitlines() == ["x: is starting", "0 workers, 0 wanted"]


def test_every_setting_stands_in_the_documentation() -> None:
    heading = f"`[{RAY_SETTINGS.name}]`, `{RAY_SETTINGS.prefix}…`\n\n"
    assert heading + as_markdown(RAY_SETTINGS) in DOC, "run: python -m degas.config_view docs/ray.md"
    assert with_tables(DOC) == DOC
