"""The wheel as a stranger installs it: what it puts into site-packages, and that it serves from another folder."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.http_client import ask

ROOT = Path(__file__).parents[2]
ROOMS = ("shared", "gateway", "worker", "loadtest", "pocket")
LIMIT_S = 250.0

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Installed:
    """An environment that had nothing in it before the wheel."""

    wheel: Path
    python: Path
    site_packages: Path
    gained: set[str]
    elsewhere: (
        Path  # a folder that is not the repository, with packages of a stranger's called as the rooms are
    )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=self.elsewhere,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )


def environment() -> dict[str, str]:
    """A stranger's: nothing in it leads to this repository."""
    ours = ("PYTHON", "DEGAS_", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*ROOMS, "degas"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*pip, *build, str(source)], check=True, timeout=LIMIT_S, env=environment())
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    before = {path.name for path in site_packages.iterdir()}
    install = ["--python", str(python), "install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=LIMIT_S, env=environment())
    gained = {path.name for path in site_packages.iterdir()} - before
    # The dependencies are lent by the environment that runs the tests; torch alone would take minutes to install.
    (site_packages / "zz_lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = folder / "elsewhere"
    for name in ROOMS:
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "__init__.py").write_text("MINE = True\n")
    return Installed(wheel, python, site_packages, gained, elsewhere)


@pytest.fixture(scope="module")
def url(installed: Installed) -> Iterator[str]:
    """The address at which `degas serve` of that environment serves its embedded model."""
    log = installed.elsewhere / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [installed.python.with_name("degas"), "serve", "--port", "0", "--grpc-port", "0"],
            cwd=installed.elsewhere,
            env=environment() | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    try:
        assert process.stdout is not None
        found = next(filter(None, (re.search(r"http://\S+?:\d+", line) for line in process.stdout)), None)
        assert found is not None, log.read_text()[-3000:]
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_site_packages_gain_degas_and_nothing_else(installed: Installed) -> None:
    assert {name.partition("-")[0] for name in installed.gained} == {"degas", "degas_serve"}
    assert (installed.site_packages / "degas" / "py.typed").exists()


def test_the_wheel_holds_every_file_of_the_rooms(installed: Installed) -> None:
    held = set(zipfile.ZipFile(installed.wheel).namelist())
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in name and path.suffix != ".so":
                assert f"degas/_rooms/{name}" in held, (
                    f"{name}: no __init__.py in its folder, or no data in setup.py"
                )


def test_a_strangers_packages_stay_theirs(installed: Installed) -> None:
    theirs = installed.run(
        "-c", "import worker, shared, gateway; print(worker.MINE, shared.MINE, gateway.MINE)"
    )
    assert theirs.stdout == "True True True\n", theirs.stderr
    for name in ROOMS:
        absent = installed.run("-P", "-c", f"import {name}")
        assert absent.returncode == 1 and f"No module named '{name}'" in absent.stderr


def test_a_modules_arguments_and_exit_code_pass_through(installed: Installed) -> None:
    refused = installed.run("-m", "degas.rooms", "worker", "--depth", "9")
    assert refused.returncode == 2 and "depth" in refused.stderr
    assert installed.run("-m", "degas.health", "file", "nowhere.json").returncode == 1
    usage = installed.run("-m", "degas.rooms")
    assert usage.returncode == 1 and "usage:" in usage.stderr


def test_it_serves_from_another_folder(url: str) -> None:
    picture = base64.b64encode((ROOT / "docs" / "shapes.png").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "What color is the circle?"},
    ]
    # The picture is decoded and the pattern compiled in confined processes, which inherit no environment.
    body = {
        "messages": [{"role": "user", "content": content}],
        "structured_outputs": {"regex": "(red|green|blue)"},
    }
    answer = ask(url, "/v1/chat/completions", body, timeout_s=60.0)
    assert answer.status == 200, answer.body
    assert answer.json["choices"][0]["message"]["content"] == "red"


def test_the_page_comes_along(url: str) -> None:
    assert b"app.js" in ask(url, "/").body
