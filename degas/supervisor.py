"""Owns worker and gateway as child processes: start, watch, restart, stop in order. One asyncio loop, main thread.

Each child has one task, which alone starts, watches and ends it. Nothing outlives the supervisor: on a stop
the gateway drains first and the worker follows; if the supervisor itself is killed, the kernel kills the
children (`leash`) and a small process their descendants (`guard`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from degas.child import LEASH, SCRIPT, Beat, Child, Guard, describe_exit
from degas.forks import Nursery, reap_orphans
from degas.options import BEAT_VARIABLE, OptionsError, ServeOptions, claim_own_ports, claim_port
from degas.posts import Post, make_posts, write_status
from degas.probe import base_url, fetch_status
from degas.startup_view import StartupView, open_view

TICK_S: Final = 0.1
LATE_TICK_S: Final = (
    1.0  # a tick later than this: the supervisor itself was stopped or starved, and blames no child
)
PROBE_INTERVAL_S: Final = 0.1
HEALTH_INTERVAL_S: Final = 2.0
STATUS_INTERVAL_S: Final = 1.0
REAP_INTERVAL_S: Final = 1.0
KILL_MARGIN_S: Final = 5.0  # what a child gets beyond its own deadline before it is killed
MAX_IPC_PATH: Final = 107
WRONG_SETTINGS: Final = 2  # a child's exit code for settings that no restart will mend
FORCED: Final = 130


class Supervisor:
    """Runs `degas serve`. `run` returns the exit code."""

    def __init__(self, options: ServeOptions, view: StartupView | None = None) -> None:
        self._options = options
        self._view = view or open_view(json=options.log_json)
        self._stopping = asyncio.Event()
        self._forced = asyncio.Event()
        self._changed = asyncio.Event()
        self._exit_code = 0
        self._started_s = time.monotonic()
        self._posts = make_posts(options)
        self._endpoint: str | None = None
        self._model: str | None = None  # where a model that had to be fetched lies

    async def run(self) -> int:
        """Start everything, keep it running, stop on a signal or when a child cannot be kept running."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        folder = make_runtime_folder(self._options.runtime_parent)
        self._guard = Guard()
        self._nursery: Nursery | None = None
        self._guard.say(f"folder {folder}")
        if len(self._options.roles) > 1:
            self._endpoint = f"ipc://{folder}/worker.sock"
        if self._options.preload and "worker" in self._posts:
            leash = (*SCRIPT, str(LEASH))
            self._nursery = Nursery(self._options.worker_environment(self._endpoint), leash)
        tasks = {name: asyncio.create_task(self._keep(post), name=name) for name, post in self._posts.items()}
        side_tasks = [asyncio.create_task(self._announce()), asyncio.create_task(self._reap())]
        if self._options.status_file is not None:
            side_tasks.append(asyncio.create_task(self._write_status(self._options.status_file)))
        try:
            stopping = asyncio.create_task(self._stopping.wait())
            await asyncio.wait((stopping, *tasks.values()), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            self._stopping.set()
            for role in ("gateway", "worker"):  # gateways drain while their worker still serves
                ending = [post for post in self._posts.values() if post.role == role]
                for post in ending:
                    post.halt.set()
                await asyncio.gather(*(tasks[post.name] for post in ending))
        finally:
            for post in self._posts.values():  # a child is left here only after a fault of our own
                if post.child is not None:
                    post.child.kill()
                    await post.child.exited
            for task in (*side_tasks, *tasks.values()):
                task.cancel()
            await asyncio.gather(*side_tasks, *tasks.values(), return_exceptions=True)
            if self._nursery is not None:
                self._nursery.close()
            self._view.close()
            if self._options.status_file is not None:
                self._options.status_file.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            self._guard.close()
        self._view.note("stopped" if self._exit_code == 0 else f"ended with exit code {self._exit_code}")
        return self._exit_code

    # ------------------------------------------------------------------ one child's life

    async def _keep(self, post: Post) -> None:
        if post.role == "worker" and self._options.fetch_command and not await self._fetch(post):
            return None
        while not self._stopping.is_set():
            starting = asyncio.create_task(self._start(post))
            stopping = asyncio.create_task(self._stopping.wait())
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not starting.done():  # libraries were still being loaded
                starting.cancel()
                return None
            child = post.child = starting.result()
            cause = await self._watch(post, child)
            code = await child.exited
            ready_for_s = post.on_death(time.monotonic())
            self._changed.set()
            if post.halt.is_set() or self._stopping.is_set():
                return None
            cause = cause or describe_exit(code)
            if code == WRONG_SETTINGS and not post.was_ready:
                return self._give_up(
                    f"the {post.name} refuses its settings ({cause}); its message is above", code
                )
            delay_s = post.restarts.on_death(ready_for_s)
            if delay_s is None:
                return self._give_up(
                    f"the {post.name} died {post.restarts.quick_deaths} times in a row right after starting "
                    f"(last: {cause}); not trying again. What it said is above",
                    1,
                )
            when = f" in {delay_s:.1f} s" if delay_s else ""
            self._view.note(f"{post.name} ended ({cause}); starting it again{when}", style="yellow")
            await _wait_any(self._stopping, timeout_s=delay_s)
        return None

    async def _fetch(self, post: Post) -> bool:
        """Bring the worker's model onto this machine, however long that takes; the child says how far it is. False: it is
        not there, or we are to stop."""
        started_s = time.monotonic()
        options = self._options
        post.child = child = Child.start(
            options.fetch_command,
            options.worker_environment(None),
            guard=self._guard,
            on_line=self._reader_of(post),
        )
        halt = asyncio.create_task(post.halt.wait())
        await asyncio.wait((child.exited, halt), return_when=asyncio.FIRST_COMPLETED)
        halt.cancel()
        if post.halt.is_set():
            child.kill()
        code = await child.exited
        post.child = None
        if post.halt.is_set() or self._stopping.is_set():
            return False
        if code or self._model is None:
            reason = f"the model was not fetched ({describe_exit(code)}); the reason is above"
            self._give_up(reason, code if code > 0 else 1)
            return False
        self._view.phase(post.role, "fetch model", time.monotonic() - started_s)
        return True

    async def _start(self, post: Post) -> Child:
        options = self._options
        on_line = self._reader_of(post)
        if post.role == "gateway":
            environment = options.gateway_environment(self._endpoint, post.number)
            return Child.start(options.gateway_command, environment, guard=self._guard, on_line=on_line)
        environment = options.worker_environment(self._endpoint, self._model)
        if self._nursery is not None:
            child = await Child.fork(
                self._nursery, environment, guard=self._guard, on_line=on_line, beat_variable=BEAT_VARIABLE
            )
            if child is not None:
                return child
        return Child.start(
            options.worker_command,
            environment,
            guard=self._guard,
            on_line=on_line,
            beat_variable=BEAT_VARIABLE,
        )

    async def _reap(self) -> None:
        """Descendants whose parents were killed become our children, whose exit codes someone has to collect."""
        while True:
            await asyncio.sleep(REAP_INTERVAL_S)
            own = {
                self._guard.pid,
                *(post.child.pid for post in self._posts.values() if post.child is not None),
            }
            if self._nursery is not None and self._nursery.pid is not None:
                own.add(self._nursery.pid)
            reap_orphans(own)

    async def _watch(self, post: Post, child: Child) -> str | None:
        """Return when the child is gone; the cause is a text if it had to be killed."""
        halt = asyncio.create_task(post.halt.wait())
        checks = asyncio.create_task(
            self._check_worker(post, child) if post.role == "worker" else self._check_gateway(post)
        )
        try:
            await asyncio.wait((child.exited, halt, checks), return_when=asyncio.FIRST_COMPLETED)
            if child.exited.done():
                return None
            if halt.done():
                await self._stop(post, child)
                return None
            cause = checks.result()  # only returns with a reason to end the child
            self._view.note(f"{post.name}: {cause}; killing it", style="red")
            await child.kill_hung()
            return cause
        finally:
            halt.cancel()
            checks.cancel()
            await asyncio.gather(halt, checks, return_exceptions=True)

    async def _stop(self, post: Post, child: Child) -> None:
        drain_s = self._options.drain_notice_s + self._options.drain_s
        grace_s = drain_s if post.role == "gateway" else self._options.worker_grace_s
        if post.role == "gateway" and post.number == 0:
            self._view.note(f"draining: streams have up to {grace_s:g} s; a second signal ends them now")
        if not await child.stop(grace_s + KILL_MARGIN_S, self._forced):
            self._view.note(f"{post.name} did not end in time and was killed", style="yellow")

    async def _check_worker(self, post: Post, child: Child) -> str:
        """Return when the worker hangs: still loading after the limit, or no decode progress once ready."""
        deadline_s = time.monotonic() + self._options.start_timeout_s
        beat, beat_s, tick_s = (
            Beat(),
            time.monotonic(),
            time.monotonic(),
        )  # ready, perhaps, before the first look
        while True:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            was_late, tick_s = now_s - tick_s > LATE_TICK_S, now_s
            if not post.is_ready:
                beat_s = now_s
                if now_s > deadline_s:
                    return f"not ready after {self._options.start_timeout_s:g} s"
                continue
            latest = child.beat()
            if latest != beat or was_late:
                beat, beat_s = latest, now_s
            elif now_s - beat_s >= beat.patience_s:
                return f"no decode progress for {beat.patience_s:.3g} s"

    async def _check_gateway(self, post: Post) -> str:
        """Wait for the gateway to come up; later return when it has answered nothing for `gateway_silence_s`."""
        options = self._options
        answered_s = tick_s = time.monotonic()
        started_s = answered_s
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_S if post.is_ready else PROBE_INTERVAL_S)
            status = await fetch_status(options.host, post.port or options.port, "/healthz")
            now_s = time.monotonic()
            was_late, tick_s = now_s - tick_s > options.gateway_silence_s, now_s
            if status is not None or was_late:
                answered_s = now_s
            if status is not None and not post.is_ready:
                self._view.phase(post.name, "listen", now_s - started_s)
                post.on_ready(now_s)
                self._changed.set()
            if now_s - answered_s > options.gateway_silence_s:
                return f"no answer for {options.gateway_silence_s:g} s"

    # ------------------------------------------------------------------ what is told

    def _reader_of(self, post: Post) -> Callable[[str], None]:
        """Reads a child's stdout: start-up lines are shown, anything else is passed on."""

        def on_line(line: str) -> None:
            kind, _, rest = line.partition(" ")
            try:
                fields = json.loads(rest) if kind.startswith("DEGAS-") else None
                if kind == "DEGAS-PHASE" and fields is not None:
                    self._view.phase(post.role, str(fields["phase"]), float(fields["seconds"]))
                elif kind == "DEGAS-PROGRESS" and fields is not None:
                    self._view.progress(
                        post.role, str(fields["phase"]), float(fields["done"]), float(fields["total"])
                    )
                elif kind == "DEGAS-MODEL" and fields is not None:
                    self._model = str(fields["path"])
                elif kind == "DEGAS-READY" and post.role == "worker":
                    post.on_ready(time.monotonic())
                    self._changed.set()
                else:
                    self._view.note(line)
            except (ValueError, KeyError, TypeError):
                self._view.note(line)

        return on_line

    async def _announce(self) -> None:
        """Print that everything is up, the first time and again after each restart."""
        options = self._options
        num_times = 0
        while True:
            await self._changed.wait()
            self._changed.clear()
            if not all(post.is_ready for post in self._posts.values()):
                continue
            if len(options.roles) > 1 and not await self._have_met():
                await asyncio.sleep(PROBE_INTERVAL_S)  # all are up, but have not met yet
                self._changed.set()
                continue
            self._view.close()
            num_times += 1
            if num_times > 1:
                self._view.note("serving again", style="green")
                continue
            seconds = time.monotonic() - self._started_s
            if "gateway" not in self._posts:
                self._view.note(f"the worker is ready after {seconds:.1f} s", style="green")
                continue
            url = base_url(options.host, options.port)
            self._view.note(f"\nDegas is ready after {seconds:.1f} s:  {url}/", style="bold green")
            if options.grpc_port is not None:
                self._view.note(f"gRPC on port {options.grpc_port}; Ctrl-C stops it")
            if options.report:
                print(f"DEGAS-READY {json.dumps({'url': url, 'grpc_port': options.grpc_port})}", flush=True)

    async def _have_met(self) -> bool:
        """Whether every gateway says that it has a worker."""
        ports = [post.port for post in self._posts.values() if post.port is not None]
        told = [await fetch_status(self._options.host, port, "/readyz") for port in ports]
        return not any(status in (None, 503) for status in told)

    async def _write_status(self, path: Path) -> None:
        """Refresh the file that `python -m degas.health` looks at: its age shows whether we still run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            write_status(path, self._posts.values())
            await asyncio.sleep(STATUS_INTERVAL_S)

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._exit_code = FORCED
            self._forced.set()
        self._stopping.set()

    def _give_up(self, message: str, code: int) -> None:
        self._view.fault(message)
        self._exit_code = code
        self._stopping.set()


def make_runtime_folder(parent: Path | None) -> Path:
    """A fresh folder that only we may enter, for the socket between gateway and worker."""
    if parent is None:
        given = os.environ.get("XDG_RUNTIME_DIR")
        parent = Path(given) if given and os.access(given, os.W_OK) else Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="degas-", dir=parent))  # mkdtemp makes it 0700
    if len(str(folder / "worker.sock")) > MAX_IPC_PATH:
        folder.rmdir()
        raise OptionsError(
            f"{parent} is too long a path for a socket; set XDG_RUNTIME_DIR or TMPDIR to a shorter one"
        )
    return folder


def serve(options: ServeOptions) -> int:
    """Run the supervisor to its end in this thread; returns the exit code."""
    try:
        if "gateway" in options.roles:
            grpc_port = options.grpc_port
            if grpc_port is not None:
                grpc_port = claim_port(options.host, grpc_port, "--grpc-port")
            port = claim_port(options.host, options.port, "--port")
            if port == grpc_port:
                raise OptionsError(f"--port and --grpc-port are both {port}; give them different ones")
            options = dataclasses.replace(options, port=port, grpc_port=grpc_port)
            options = dataclasses.replace(options, own_ports=claim_own_ports(options))
        return asyncio.run(_run(options))
    except OptionsError as error:
        print(f"degas serve: {error}", file=sys.stderr, flush=True)
        return WRONG_SETTINGS


async def _run(options: ServeOptions) -> int:
    return await Supervisor(options).run()


async def _wait_any(event: asyncio.Event, *, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
