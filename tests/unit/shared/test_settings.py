"""Where settings come from: flag before variable before file before default, and no name that is nobody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.config import GATEWAY_SETTINGS, GatewayConfig
from shared.settings import ConfigError, File, Section, as_text, read_file
from worker.config import WORKER_SETTINGS

BOTH: list[Section[Any]] = [WORKER_SETTINGS, GATEWAY_SETTINGS]
EACH = [(section, name) for section in BOTH for name in section.settings]
SPECIAL = {
    "admin_listen": "127.0.0.1:9090",
    "threads": "77",
    "endpoint": "ipc:///tmp/other",
    "workers": "ipc:///tmp/a,tcp://10.0.0.1:5000",
    "kv_events": "tcp://*:5557",
    "kv_events_replay": "tcp://*:5558",
    "model_aliases": '{"other name": "m"}',
    "public": "page,metrics",
    "cors_origins": "https://a.example,https://b.example",
    "api_keys": "first-key-of-all,second-key-of-all",
    "otlp_endpoint": "http://collector:4318",
    "max_body_bytes": "25 MiB",
    "max_image_bytes": "1 MiB",
    "image_memory_bytes": "3 GiB",
}


def another(section: Section[Any], name: str) -> str:
    """A text that the setting accepts and that is not its default."""
    setting = section.settings[name]
    if name in SPECIAL:
        return SPECIAL[name]
    if setting.form == "true|false":
        return as_text(not setting.default)
    if "|" in setting.form:
        return next(choice for choice in setting.form.split("|") if choice != setting.default)
    if setting.form == "BYTES":
        return str(setting.default + (1 << 20))
    if setting.form in ("NUMBER", "SECONDS"):
        return str((setting.default or 0) + 1)
    return "one,two" if setting.is_list else "a name with spaces"


def load(
    section: Section[Any], flags: dict[str, Any], variables: dict[str, str], lines: dict[str, Any]
) -> Any:
    return section.parse(section.gather(flags, variables, File("degas.toml", {section.name: lines})))


@pytest.mark.parametrize(("section", "name"), EACH)
def test_every_setting_is_a_flag_a_variable_and_a_line(section: Section[Any], name: str) -> None:
    text = another(section, name)
    by_flag = load(section, {name: text}, {}, {})
    assert getattr(by_flag, name) != getattr(load(section, {}, {}, {}), name)
    assert by_flag == load(section, {}, {section.variable(name): text}, {})
    assert by_flag == load(section, {}, {}, {name: text})


@pytest.mark.parametrize(("section", "name"), EACH)
def test_what_a_child_is_told_is_what_was_given(section: Section[Any], name: str) -> None:
    found = section.gather({name: another(section, name)}, {}, File())
    texts = section.texts(found)
    assert list(texts) == [section.variable(name)]
    assert section.parse(section.gather({}, texts, File())) == section.parse(found)


def test_flag_before_variable_before_file_before_default() -> None:
    flags, variables, lines = {"depth": "1"}, {"DEGAS_WORKER_DEPTH": "3"}, {"depth": 4}
    for given, depth, origin in (
        ((flags, variables, lines), 1, "--depth"),
        (({"depth": None}, variables, lines), 3, "DEGAS_WORKER_DEPTH"),
        (({}, {}, lines), 4, "degas.toml [worker]"),
    ):
        found = WORKER_SETTINGS.gather(given[0], given[1], File("degas.toml", {"worker": given[2]}))
        assert (WORKER_SETTINGS.parse(found).depth, found["depth"].origin) == (depth, origin)
    assert load(WORKER_SETTINGS, {}, {}, {}).depth == 2


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("DEGAS_WORKER_DEPHT", "did you mean DEGAS_WORKER_DEPTH"),
        ("DEGAS_WORKER_NOTHING_LIKE_IT", "DEGAS_WORKER_NOTHING_LIKE_IT is not a setting of the worker"),
        ("DEGAS_WORKR_DEPTH", "did you mean DEGAS_WORKER_DEPTH"),
        ("DEGAS_WORKER_", "is not a setting"),
        ("degas_worker_depth", "did you mean DEGAS_WORKER_DEPTH"),
        ("DEGAS_MODEL", "did you mean DEGAS_WORKER_MODEL"),
        ("DEGAS_MAX_ROWS", "did you mean DEGAS_WORKER_MAX_ROWS"),
    ],
)
def test_a_variable_that_is_no_setting_is_refused(variable: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        WORKER_SETTINGS.gather({}, {variable: "1"}, File())


def test_variables_of_others_are_none_of_ours() -> None:
    others = (
        "PATH",
        "WORKER_DEPHT",
        "DEGAS_API_KEY",
        "DEGAS_CHROMIUM",
        "DEGAS_BROWSER_URL",
        "DEGASSER_DEPTH",
    )
    environment = dict.fromkeys((*others, "DEGAS_GATEWAY_NOT_THE_WORKERS_AFFAIR", "DEGAS_CONFIG"), "1")
    assert WORKER_SETTINGS.gather({}, environment, File()) == {}


def test_a_flag_or_line_that_is_no_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"depht is not a setting of the worker; did you mean depth"):
        load(WORKER_SETTINGS, {"depht": "1"}, {}, {})
    with pytest.raises(ConfigError, match=r"degas.toml \[worker\]: max-rows .* did you mean max_rows"):
        load(WORKER_SETTINGS, {}, {}, {"max-rows": 16})


@pytest.mark.parametrize("text", ["none", "None"])
def test_text_can_say_that_nothing_is_set(text: str) -> None:
    assert load(GATEWAY_SETTINGS, {"grpc_port": text}, {}, {}).grpc_port is None
    assert load(GATEWAY_SETTINGS, {}, {"DEGAS_GATEWAY_OTLP_ENDPOINT": text}, {}).otlp_endpoint is None
    assert load(GATEWAY_SETTINGS, {"grpc_port": "-1"}, {}, {}).grpc_port is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"depth": "9"}, ["depth", "--depth is 9", "a safe value is 2"]),
        ({"kv_bytes": "1 KiB"}, ["kv_bytes", "1 KiB", "a safe value is 512 MiB"]),
        ({"device": "tpu"}, ["device", "tpu", "'cuda'", "a safe value is auto"]),
        ({"max_rows": "many"}, ["max_rows", "many", "a safe value is 32"]),
        ({"mixed_tokens": "20"}, ["mixed_tokens is 20", "a safe value is 544"]),
    ],
)
def test_a_wrong_value_is_named_with_a_safe_one(flags: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(WORKER_SETTINGS, flags, {}, {})
    message = str(refused.value)
    assert "\n" not in message and not [word for word in words if word not in message], message


def test_a_wrong_key_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match="8 characters") as refused:
        load(GATEWAY_SETTINGS, {}, {"DEGAS_GATEWAY_API_KEYS": "hush"}, {})
    assert "hush" not in str(refused.value) and "DEGAS_GATEWAY_API_KEYS" in str(refused.value)


def test_what_a_childs_variable_cannot_say_is_refused() -> None:
    found = GATEWAY_SETTINGS.gather({}, {}, File("degas.toml", {"gateway": {"workers": ["ipc:///a,b"]}}))
    with pytest.raises(ConfigError, match="comma"):
        GATEWAY_SETTINGS.texts(found)


def test_code_is_not_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEGAS_GATEWAY_PORT", "1")
    assert GatewayConfig().port == 8080


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("depth = 2", r"depth is not one of the tables \[worker\]"),
        ("[wroker]\ndepth = 2", r"wroker .* did you mean \[worker\]"),
        ("[worker\n", "is not TOML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "degas.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        read_file(path, {})
    assert str(path) in str(refused.value)


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    path = tmp_path / "degas.toml"
    path.write_text("[worker]\ndepth = 4\nkv_bytes = '1 GiB'\n")
    config = WORKER_SETTINGS.load({}, {"DEGAS_CONFIG": str(path)})
    assert (config.depth, config.kv_bytes) == (4, 1 << 30)
    with pytest.raises(ConfigError, match=r"DEGAS_CONFIG /nowhere\.toml: No such file"):
        read_file(None, {"DEGAS_CONFIG": "/nowhere.toml"})
