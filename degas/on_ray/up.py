"""Owns `degas ray up`: a cluster, a fleet of workers on it, gateways here, and their end in order. One asyncio loop, main thread.

Nothing outlives it: the workers' actors belong to this process, as far as Ray is concerned, and end with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

from degas.child import Child, Guard
from degas.keys import WORKER_FILES, KeysError, make_keys
from degas.on_ray import cluster
from degas.on_ray.actors import Away, Gone
from degas.on_ray.fleet import Fleet
from degas.on_ray.post import Task
from degas.on_ray.registry import Registry
from degas.on_ray.settings import UpSettings, gpus_and_device
from degas.on_ray.watch import Watch
from degas.options import OptionsError
from degas.probe import fetch_status
from degas.startup_view import StartupView
from degas.supervisor import FORCED, KILL_MARGIN_S, make_runtime_folder
from shared.logs import configure_logs
from shared.settings import ConfigError

TICK_S: Final = 0.5
LOOKUP_S: Final = "0.5"  # how often our gateways read the list: a file, so it costs next to nothing
WRONG_SETTINGS: Final = 2
_GATEWAYS: Final = (sys.executable, "-m", "degas", "serve", "--only", "gateway", "--report", "true")
_UNSAID: Final = ("DEGAS-", "Degas is ready", "gRPC on port", "serving again", "stopped")


class Up:
    """Runs `degas ray up`. `run` returns the exit code."""

    def __init__(self, settings: UpSettings, folder: Path, view: StartupView | None = None) -> None:
        """`folder` is ours alone, and removed by the caller."""
        self._settings = settings
        self._folder = folder
        given = settings.ray.keys_dir
        self._keys_dir = folder / "keys" if given is None else Path(given).resolve()
        self._view = view or StartupView()
        self._stopping = asyncio.Event()
        self._forced = asyncio.Event()
        self._started_s = time.monotonic()
        self._url = ""  # of the gateways here
        self._told_ready = False
        self._refusals: set[str] = set()  # told of already
        self._gateways: Child | None = None
        self._code = 0

    async def run(self) -> int:
        """Start everything, keep it running, and end it on a signal, on `degas ray down`, or when it cannot go on.

        Raises `cluster.ClusterError`, `KeysError`, `ConfigError` or OSError when it cannot start.
        """
        ray, guard = self._settings.ray, Guard()
        guard.say(f"folder {self._folder}")
        keys_dir = self._keys_dir
        make_keys(keys_dir, apart=True)
        watch: Watch | None = None
        fleet: Fleet | None = None
        registry = Registry(self._folder / "workers")
        try:
            is_ours = cluster.join(ray)
            self._listen_for_signals()  # Ray took SIGTERM for itself
            self._view.note(
                "started a Ray cluster of this machine alone" if is_ours else "joined the Ray cluster"
            )
            self._board = cluster.Board(ray.fleet)
            await self._open(registry)
            watch = Watch(str(keys_dir / "gateway"))
            fleet = self._make_fleet(keys_dir / "worker", watch)
            if ray.run_gateway:
                self._gateways = self._start_gateways(keys_dir / "gateway", registry.source, guard)
            await self._tend(fleet, watch, registry)
            await self._end(fleet, watch, registry)
        finally:
            if self._gateways is not None:
                self._gateways.kill()
                await self._gateways.exited
            if fleet is not None:
                fleet.kill()
            if watch is not None:
                watch.close()
            await registry.close()
            cluster.leave()
            guard.close()
        self._view.note("stopped" if self._code == 0 else f"ended with exit code {self._code}")
        return self._code

    # ------------------------------------------------------------------ what runs

    async def _open(self, registry: Registry) -> None:
        if (address := self._settings.ray.registry_address()) is None:
            return
        try:
            page = await registry.listen(*address)
        except OSError as error:
            raise OptionsError(
                f"registry cannot listen on {self._settings.ray.registry}: {error.strerror}; choose another address of this "
                f"machine (port 0 picks a free one)"
            ) from None
        self._view.note(f"gateways elsewhere find the workers at {page}")

    def _make_fleet(self, keys_dir: Path, watch: Watch) -> Fleet:
        settings, ray = self._settings, self._settings.ray
        gpus, device = gpus_and_device(ray.num_gpus, settings.worker.device, cluster.num_gpus())
        if missing := cluster.missing(ray.num_cpus, gpus):
            self._view.note(
                f"{missing}; waiting for one (num_cpus and num_gpus say what a worker is given)",
                style="yellow",
            )
        task = Task(
            settings={
                **settings.worker_variables,
                "DEGAS_WORKER_DEVICE": device,
                "DEGAS_WORKER_DRAIN_S": str(ray.worker_drain_s),
                "DEGAS_SERVE_WORKER_GRACE_S": str(ray.worker_drain_s),
            },
            keys=None
            if ray.worker_keys_dir
            else {name: (keys_dir / name).read_bytes() for name in WORKER_FILES},
            keys_dir=ray.worker_keys_dir,
            ports=ray.ports(),
        )
        return Fleet(
            lambda: cluster.PlacedWorker(task, num_cpus=ray.num_cpus, gpus=gpus),
            watch.load,
            self._view.note,
            limits=ray.limits(),
            drain_s=ray.worker_drain_s + 2 * KILL_MARGIN_S,
        )

    def _start_gateways(self, keys_dir: Path, workers: str, guard: Guard) -> Child:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DEGAS_")}
        environment["DEGAS_GATEWAY_WORKER_LOOKUP_S"] = LOOKUP_S
        environment |= self._settings.gateway_variables
        environment |= {"DEGAS_GATEWAY_WORKERS": workers, "DEGAS_GATEWAY_CURVE_KEY_DIR": str(keys_dir)}
        return Child.start(_GATEWAYS, environment, guard=guard, on_line=self._on_line)

    def _on_line(self, line: str) -> None:
        """What the gateways' supervisor says."""
        if line.startswith("DEGAS-READY "):
            self._url = str(json.loads(line.removeprefix("DEGAS-READY "))["url"])
        elif line.strip() and not line.startswith(_UNSAID):
            self._view.note(f"gateway: {line}")

    async def _tend(self, fleet: Fleet, watch: Watch, registry: Registry) -> None:
        """Until we are to stop, or something cannot go on."""
        told = self._board.tell(self._state(fleet))
        while not self._stopping.is_set():
            self._turn(fleet, watch, registry)
            if told.is_answered():
                try:
                    if told.answer():
                        return self._view.note("degas ray down asks for the end")
                except (Away, Gone) as error:
                    return self._give_up(f"Ray lost this node of its cluster: {error}", 1)
                told = self._board.tell(self._state(fleet))
            if fleet.failure:
                return self._give_up(fleet.failure, fleet.failure_code)
            if self._gateways is not None and self._gateways.exited.done():
                code = self._gateways.exited.result()
                return self._give_up("the gateways ended; the reason is above", code if code > 0 else 1)
            await self._tell_ready(fleet)
            await self._pause(self._stopping)
        return None

    def _turn(self, fleet: Fleet, watch: Watch, registry: Registry) -> None:
        fleet.on_tick(time.monotonic())
        watch.follow(fleet.endpoints)
        registry.tell(fleet.endpoints)
        for endpoint in fleet.endpoints:
            if (why := watch.refusal(endpoint)) and why not in self._refusals:
                self._refusals.add(why)
                self._view.note(f"the worker at {endpoint} cannot be used: {why}", style="red")

    async def _end(self, fleet: Fleet, watch: Watch, registry: Registry) -> None:
        """Gateways drain while their workers serve, then the workers end."""
        gateway, gateways = self._settings.gateway, self._gateways
        if gateways is not None and not gateways.exited.done():
            grace_s = gateway.drain_notice_s + gateway.drain_deadline_s
            self._view.note(f"draining: streams have up to {grace_s:g} s; a second signal ends them now")
            stopping = asyncio.create_task(gateways.stop(grace_s + 2 * KILL_MARGIN_S, self._forced))
            while not stopping.done():
                self._turn(fleet, watch, registry)
                await asyncio.wait((stopping,), timeout=TICK_S)
        watch.follow(set())
        fleet.end(time.monotonic())
        while fleet.members and not self._forced.is_set():
            fleet.on_tick(time.monotonic())
            await self._pause(self._forced)

    async def _pause(self, cut_short: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(TICK_S):
                await cut_short.wait()
        except TimeoutError:
            pass

    # ------------------------------------------------------------------ what is told

    async def _tell_ready(self, fleet: Fleet) -> None:
        if self._told_ready or not fleet.num_serving:
            return
        if self._settings.ray.run_gateway:
            port = int(self._url.rpartition(":")[2]) if self._url else 0
            if not port or await fetch_status(self._settings.gateway.host, port, "/readyz") in (None, 503):
                return
        self._told_ready = True
        seconds = time.monotonic() - self._started_s
        self._view.note(
            f"\nDegas is ready after {seconds:.1f} s:  {self._url or 'workers serve'}", style="bold green"
        )
        self._view.note("Ctrl-C or `degas ray down` ends it; `degas ray status` tells how it is")

    def _state(self, fleet: Fleet) -> dict[str, Any]:
        """What `degas ray status` shows."""
        return {
            "url": self._url,
            "wanted": fleet.wanted,
            "ready": self._told_ready,
            "workers": [
                {"number": one.number, "state": one.state, "endpoint": one.endpoint, "node": one.node_ip}
                for one in fleet.members
            ],
        }

    def _listen_for_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._code = FORCED
            self._forced.set()
        self._stopping.set()

    def _give_up(self, message: str, code: int) -> None:
        print(f"degas ray up: {message}", file=sys.stderr, flush=True)
        self._code = code


def up(settings: UpSettings) -> int:
    """Run to the end in this thread; returns the exit code."""
    configure_logs("ray", level="error", json=settings.gateway.log_json)
    folder: Path | None = None
    try:
        folder = make_runtime_folder(None)
        return asyncio.run(_run(settings, folder))
    except (cluster.ClusterError, KeysError, ConfigError, OptionsError, OSError) as error:
        print(f"degas ray up: {error}", file=sys.stderr, flush=True)
        return WRONG_SETTINGS
    except KeyboardInterrupt:  # while the cluster was being joined
        return FORCED
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


async def _run(settings: UpSettings, folder: Path) -> int:
    return await Up(settings, folder).run()
