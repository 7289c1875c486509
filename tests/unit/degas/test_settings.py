"""`degas serve`, `degas config` and their kin: what they are told, by whom, and what the children then hear."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from degas import config_view, supervisor
from degas.cli import app
from degas.options import ServeOptions
from degas.settings import ALL, BUILT_IN, resolve, serve_options
from gateway.config import GATEWAY_SETTINGS
from shared.settings import ConfigError, Section
from worker.config import WORKER_SETTINGS, default_threads

KEY = "sk-nobody-may-see-this"


def run(*words: str, **variables: str) -> Any:
    return CliRunner(env={"COLUMNS": "80", **variables}).invoke(app, list(words))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    """What `degas serve` hands to the supervisor, which does not run."""
    options: list[ServeOptions] = []

    def serve(given: ServeOptions) -> int:
        options.append(given)
        return 0

    monkeypatch.setattr(supervisor, "serve", serve)
    return options


def test_an_explicit_variable_is_not_beaten_by_a_default(served: list[ServeOptions]) -> None:
    variables = {
        "DEGAS_GATEWAY_GRPC_PORT": "0",
        "DEGAS_GATEWAY_PORT": "9001",
        "DEGAS_GATEWAY_HOST": "::1",
        "DEGAS_GATEWAY_DRAIN_DEADLINE_S": "7",
        "DEGAS_SERVE_START_TIMEOUT_S": "8",
    }
    assert run("serve", **variables).exit_code == 0
    options = served[0]
    assert (options.host, options.port, options.grpc_port) == ("::1", 9001, 0)
    assert (options.drain_s, options.start_timeout_s) == (7.0, 8.0)
    told = options.gateway_environment("ipc:///tmp/x")
    assert (told["DEGAS_GATEWAY_PORT"], told["DEGAS_GATEWAY_DRAIN_DEADLINE_S"]) == ("9001", "7")


@pytest.mark.parametrize(
    ("flags", "port"), [([], 8081), (["--grpc-port", "-1"], None), (["--grpc-port", "none"], None)]
)
def test_grpc_is_on_unless_told(served: list[ServeOptions], flags: list[str], port: int | None) -> None:
    assert run("serve", *flags).exit_code == 0
    assert served[0].grpc_port == port
    told = served[0].gateway_environment(None)["DEGAS_GATEWAY_GRPC_PORT"]
    assert told == ("none" if port is None else str(port))


@pytest.mark.parametrize("words", [["~/my models/tiny"], ["--model", "~/my models/tiny"]])
def test_the_model_is_passed_on_untouched(served: list[ServeOptions], words: list[str]) -> None:
    assert run("serve", *words).exit_code == 0
    assert served[0].worker_environment(None)["DEGAS_WORKER_MODEL"] == "~/my models/tiny"


def test_two_models_are_one_too_many() -> None:
    done = run("serve", "pocket", "--model", "sim")
    assert done.exit_code == 2 and "give one of them" in done.output


@pytest.mark.parametrize(
    ("words", "variables", "told"),
    [
        (["serve"], {"DEGAS_WORKER_DEPHT": "1"}, "did you mean DEGAS_WORKER_DEPTH?"),
        (["serve"], {"DEGAS_GATEWAY_PROT": "1"}, "did you mean DEGAS_GATEWAY_PORT?"),
        (["serve"], {"DEGAS_SERVE_STATUS": "1"}, "did you mean DEGAS_SERVE_STATUS_FILE?"),
        (["serve"], {"DEGAS_SERVER_ONLY": "1"}, "did you mean DEGAS_SERVE_ONLY?"),
        (["serve", "--depht", "1"], {}, "--depth"),
        (["serve", "--depth", "9"], {}, "a safe value is 2"),
        (["serve", "--config", "/nowhere.toml"], {}, "/nowhere.toml: No such file"),
        (["serve"], {"DEGAS_WORKER_ENDPOINT": "ipc:///a"}, "a socket of its own"),
        (
            ["serve", "--only", "worker", "--max-queue", "4"],
            {},
            "--max-queue concerns what --only worker leaves",
        ),
        (["serve", "--role", "encode"], {}, "start encoders apart"),
        (["serve", "--role", "prefill"], {}, "start prefill workers apart"),
        (["worker", "--role", "encoder"], {}, "encode"),
        (["gateway", "--port", "9000", "--nonsense"], {}, "No such option: --nonsense"),
        (["gateway", "--prot", "9000"], {}, "--port"),
        (["worker", "--depht", "1"], {}, "--depth"),
        (["worker"], {"DEGAS_WORKER_DEPHT": "1"}, "did you mean DEGAS_WORKER_DEPTH?"),
        (["config", "--depth", "x"], {}, "depth"),
    ],
)
def test_what_is_wrong_ends_it_with_a_sentence_and_2(
    words: list[str], variables: dict[str, str], told: str
) -> None:
    done = run(*words, **variables)
    assert done.exit_code == 2
    assert told in " ".join(done.output.split()).replace(" │ ", " ") and "Traceback" not in done.output


@pytest.mark.parametrize("section", [WORKER_SETTINGS, GATEWAY_SETTINGS])
def test_help_lists_every_setting_with_its_default(section: Section[Any]) -> None:
    text = run(section.name, "--help").output
    flat = " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())
    for one in section.settings.values():
        if not one.is_hidden:
            assert one.description, one.name
            assert f"{one.flag} " in text, one.name
    assert flat.count("(default: ") == sum(not one.is_hidden for one in section.settings.values())


def test_serve_takes_every_setting_of_both_but_the_socket_between_them() -> None:
    text = run("serve", "--help").output
    left_out = {
        one.name for section in ALL for one in section.settings.values() if f"{one.flag} " not in text
    }
    assert left_out == {"endpoint", "workers", "beat_fd", "report_startup"}


def test_a_flag_that_both_have_goes_to_both() -> None:
    effective = resolve({"log_level": "debug"}, {})
    assert effective["worker"].config.log_level == effective["gateway"].config.log_level == "debug"


def test_supervisor_and_gateway_judge_by_the_workers_figure() -> None:
    effective = resolve({"progress_timeout_s": 9}, {})
    assert effective["worker"].config.progress_timeout_s == 9
    holders = [one.name for one in ALL if "progress_timeout_s" in one.settings]
    assert holders == ["worker"], "a second setting could disagree"


def test_a_worker_alone_looks_at_no_gateway() -> None:
    options = serve_options(
        resolve({"only": "worker", "endpoint": "tcp://0.0.0.0:5555"}, {"DEGAS_GATEWAY_PORT": "not a port"})
    )
    assert options.roles == ("worker",) and options.worker_grace_s == 25
    assert options.worker_environment(None)["DEGAS_WORKER_ENDPOINT"] == "tcp://0.0.0.0:5555"


def test_an_encoder_may_be_supervised_alone() -> None:
    options = serve_options(resolve({"only": "worker", "role": "encode"}, {}))
    assert options.worker_environment(None)["DEGAS_WORKER_ROLE"] == "encode"


def test_children_hear_the_file_through_variables_and_no_secret_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "degas.toml"
    path.write_text(
        f'[worker]\nmax_rows = 7\n[gateway]\napi_keys = ["{KEY}"]\n[serve]\nstart_timeout_s = 1\n'
    )
    monkeypatch.setenv("DEGAS_CONFIG", str(path))
    options = serve_options(resolve({}, {"DEGAS_CONFIG": str(path)}))
    worker, gateway = options.worker_environment("ipc:///x"), options.gateway_environment("ipc:///x")
    assert worker["DEGAS_WORKER_MAX_ROWS"] == "7" and gateway["DEGAS_GATEWAY_API_KEYS"] == KEY
    assert KEY not in worker.values() and options.start_timeout_s == 1
    assert "DEGAS_CONFIG" not in worker and "DEGAS_CONFIG" not in gateway


# ------------------------------------------------------------------ degas config


def test_config_says_where_each_value_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "degas.toml"
    path.write_text("[worker]\nmax_rows = 16\ndepth = 1\n[gateway]\nmax_queue = 5\n")
    variables = {"DEGAS_WORKER_MAX_ROWS": "24", "DEGAS_GATEWAY_API_KEYS": KEY}
    done = run("config", "--config", str(path), "--depth", "3", "--json", **variables)
    found = json.loads(done.stdout)
    assert found["worker"]["depth"] == {"value": 3, "from": "--depth"}
    assert found["worker"]["max_rows"] == {"value": 24, "from": "DEGAS_WORKER_MAX_ROWS"}
    assert found["worker"]["threads"] == {"value": default_threads(), "from": "default"}
    assert found["gateway"]["max_queue"] == {"value": 5, "from": f"{path} [gateway]"}
    assert found["gateway"]["grpc_port"] == {"value": 8081, "from": BUILT_IN}
    assert found["gateway"]["api_keys"]["value"] == [config_view.HIDDEN]


@pytest.mark.parametrize("form", [[], ["--json"], ["--toml"]])
def test_config_hides_keys(form: list[str]) -> None:
    done = run("config", *form, DEGAS_GATEWAY_API_KEYS=KEY)
    assert done.exit_code == 0 and KEY not in done.output and "DEGAS_GATEWAY_API_KEYS" in done.output


def test_the_printed_file_is_a_file_to_serve_with(tmp_path: Path) -> None:
    flags = {
        "depth": "3",
        "public": ["page", "metrics"],
        "model_aliases": '{"a \\"b\\" ü": "c"}',
        "model": "/a folder/with \\ 'quotes'\x7f\t",
        "log_json": "true",
        "curve_key_dir": "none",
        "warm_up_s": "1e-7",
        "worker_grace_s": "3",
    }
    before = resolve(flags, {})
    path = tmp_path / "degas.toml"
    path.write_text(config_view.as_toml(before))
    after = resolve({}, {}, path)
    assert {name: one.config for name, one in after.items()} == {
        name: one.config for name, one in before.items()
    }
    assert set(after["worker"].found) == set(before["worker"].found)  # defaults stay defaults


def test_its_comments_are_lines_that_can_be_taken_up(tmp_path: Path) -> None:
    text = re.sub(r"^# (?=\w+ = )", "", config_view.as_toml(resolve({}, {})), flags=re.MULTILINE)
    path = tmp_path / "degas.toml"
    path.write_text(re.sub(r"^(endpoint|workers) = .*$", "", text, flags=re.MULTILINE))
    effective = resolve({}, {}, path)
    assert {name: one.config for name, one in effective.items()} == {
        name: one.config for name, one in resolve({}, {}).items()
    }


def test_the_table_fits_a_terminal() -> None:
    output = StringIO()
    model = "/a/very/long/path" * 8
    config_view.show(resolve({"model": model}, {}), Console(file=output, width=80))
    text = output.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert model in "".join(text.replace("--model", "").split())


def test_version() -> None:
    done = run("--version")
    assert done.exit_code == 0 and re.fullmatch(r"degas \S.*\n", done.stdout)


def test_resolve_refuses_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="a safe value is 2"):
        resolve({}, {"DEGAS_WORKER_DEPTH": "0"})


def test_each_of_several_gateways_has_the_operators_routes_on_its_own_port() -> None:
    options = ServeOptions(
        gateways=3, own_ports=(9001, 9002, 9003), gateway_settings={"admin_listen": "127.0.0.1:9090"}
    )
    ports = [options.gateway_environment(None, number)["DEGAS_GATEWAY_ADMIN_LISTEN"] for number in range(3)]
    assert ports == ["127.0.0.1:9090", "127.0.0.1:9091", "127.0.0.1:9092"]
