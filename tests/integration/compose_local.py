"""Runs services of compose.yaml as local processes: their commands, environments, mounts and health checks.

No container engine is needed. What a container would isolate is mapped instead: volumes and tmpfs become
folders, container ports become free local ports, and service names become 127.0.0.1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
_VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}")


def load_compose(variables: dict[str, str] | None = None) -> dict[str, Any]:
    """The file as compose would see it with these variables set."""
    given = variables or {}
    text = (ROOT / "compose.yaml").read_text()
    filled = _VARIABLE.sub(lambda match: given.get(match[1]) or match[2] or "", text)
    return dict(yaml.safe_load(filled))


class LocalService:
    """One service, run here."""

    def __init__(self, name: str, service: dict[str, Any], folder: Path, ports: dict[str, int]) -> None:
        self.name = name
        self._service = service
        self._ports = ports
        self._mounts = sorted(self._find_mounts(folder), key=lambda mount: -len(mount[0]))
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        return [self._localise(word) for word in self._service["command"]]

    def environment(self) -> dict[str, str]:
        declared = self._service.get("environment") or {}
        local = {name: self._localise(str(value)) for name, value in declared.items() if value is not None}
        own = {name: value for name, value in os.environ.items() if not name.startswith("DEGAS_")}
        return {**own, **local, "PYTHONPATH": str(ROOT)}

    def health_command(self) -> list[str]:
        kind, *words = self._service["healthcheck"]["test"]
        assert kind == "CMD"
        return [self._localise(word) for word in words]

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), env=self.environment(), cwd=self.log.parent, stdout=log, stderr=log
            )
        return self.process

    def is_healthy(self) -> bool:
        done = subprocess.run(
            self.health_command(),
            env=self.environment(),
            cwd=self.log.parent,
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    def stop(self, timeout_s: float = 40.0) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def _find_mounts(self, folder: Path) -> list[tuple[str, Path]]:
        mounts: list[tuple[str, Path]] = []
        for volume in self._service.get("volumes", []):
            source, target = volume.split(":")[:2]
            mounts.append((target, folder / "volumes" / Path(source).name))
        for tmpfs in self._service.get("tmpfs", []):
            target = tmpfs.split(":")[0]
            if target != "/tmp":
                mounts.append((target, folder / "tmpfs" / self.name / Path(target).name))
        for _, path in mounts:
            path.mkdir(parents=True, exist_ok=True)
        targets = {str(Path(target).parent) for target, _ in mounts}
        if targets == {"/keys"}:  # the keys service writes under the folder that both volumes are mounted in
            top = folder / "keys-service"
            top.mkdir()
            for target, path in mounts:
                (top / Path(target).name).symlink_to(path)
            return [("/keys", top)]
        return mounts

    def _localise(self, text: str) -> str:
        if text == "python":
            return sys.executable
        if text == "0.0.0.0":
            return "127.0.0.1"
        if text.isdecimal() and text in self._ports:
            return str(self._ports[text])
        text = re.sub(r"\b(?:0\.0\.0\.0|worker|127\.0\.0\.1):(\d+)", self._local_address, text)
        for target, path in self._mounts:
            if text == target or text.startswith(target + "/"):
                return str(path) + text.removeprefix(target)
        return text

    def _local_address(self, match: re.Match[str]) -> str:
        return f"127.0.0.1:{self._ports[match[1]]}"
