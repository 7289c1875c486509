"""Owns the worker process: its threads, signals and exit code. The main thread only waits.

Threads: `worker-io` has the ROUTER socket; `grammar-compiler-quick` and `-slow` turn grammars into
constraints, each with a process of its own; `worker-pages` talks to prefill workers, where the role is decode; `decode` builds
the model and runs the engine, and alone touches torch.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from struct import Struct
from types import FrameType
from typing import Annotated

import structlog
import typer

from shared.errors import ErrorCode
from shared.logs import configure_logs
from shared.protocol import Drain, Fatal
from shared.settings import give_flags
from worker.config import WORKER_SETTINGS, ConfigError, WorkerConfig, load
from worker.loop.inbox import Inbox, Received
from worker.wire.compiler import GrammarCompiler
from worker.wire.kv_publisher import CannotPublish, KvPublisher
from worker.wire.outbox import WireOutbox
from worker.wire.prefill_client import PrefillClient
from worker.wire.transport import Transport

log = structlog.get_logger()

BEAT = Struct("<Qd")  # read by `degas.child`: the heartbeats so far, and seconds that the next one may take


class DecodeThread(threading.Thread):
    """Runs build and engine; `exit_code` says how it ended."""

    def __init__(
        self,
        config: WorkerConfig,
        transport: Transport,
        compiler: GrammarCompiler,
        inbox: Inbox,
        outbox: WireOutbox,
        epoch: int,
        prefills: PrefillClient | None = None,
    ) -> None:
        super().__init__(name="decode", daemon=True)
        self._prefills = prefills
        self._config = config
        self._transport = transport
        self._compiler = compiler
        self._inbox = inbox
        self._outbox = outbox
        self._epoch = epoch
        self._num_beats = 0
        self.exit_code = 1

    def run(self) -> None:
        try:
            self._serve()
            self.exit_code = 0
        except ConfigError as error:
            sys.stderr.write(f"degas worker: {error}\n")
            self.exit_code = 2
        except Exception as error:
            from worker.formats.source import (
                CheckpointError,
            )  # here, so that a bad flag answers before torch loads

            if isinstance(error, CheckpointError):
                sys.stderr.write(f"degas worker: {error}\n")
                self.exit_code = 2
            else:
                log.exception("worker_failed")
            self._outbox.broadcast(Fatal(self._epoch, ErrorCode.DEVICE_ERROR, type(error).__name__))

    def _serve(self) -> None:
        started_s = time.perf_counter()
        from worker.startup import Startup, build_worker  # torch is imported on this thread

        startup = Startup(self._config.report_startup)
        startup.phases_s["import torch"] = round(time.perf_counter() - started_s, 3)
        worker = build_worker(
            self._config,
            startup,
            inbox=self._inbox,
            outbox=self._outbox,
            epoch=self._epoch,
            on_beat=self._on_beat if self._config.beat_fd >= 0 else None,
            on_kv_events=self._outbox.publish if self._config.kv_events is not None else None,
            prefills=self._prefills,
        )
        if self._prefills is not None and worker.ready.pages is not None:
            self._prefills.start(worker.ready.pages)
        card = worker.ready.model
        self._compiler.open(worker.payloads[0], card.vocab_size, card.eos_ids)
        # Objects made at start-up stay alive, so no collection in the loop should walk torch's half a million objects.
        gc.collect()
        gc.freeze()
        self._transport.announce(worker.ready, worker.payloads)
        log.info(
            "worker_ready",
            model=worker.ready.model.model_id,
            role=worker.ready.role,
            device=worker.ready.device,
            epoch=self._epoch,
            pages=worker.ready.limits.num_pages,
            **{name.replace(" ", "_") + "_s": value for name, value in startup.phases_s.items()},
        )
        startup.ready(self._config.endpoint, worker.ready.model.model_id)
        worker.engine.run()

    def _on_beat(self, num_steps: int, expected_s: float) -> None:
        """Write the heartbeat that the supervisor watches: a counter that moves only while the decode loop runs, and for how
        long the loop may now be silent."""
        self._num_beats += 1
        patience_s = expected_s + self._config.progress_timeout_s
        os.pwrite(self._config.beat_fd, BEAT.pack(self._num_beats, patience_s), 0)


def serve(config: WorkerConfig) -> int:
    """Run a worker until it is drained, told to stop, or fails. Returns the exit code."""
    configure_logs("worker", level=config.log_level, json=config.log_json)
    inbox: Inbox = SimpleQueue()
    outbox = WireOutbox()
    epoch = (time.time_ns() // 1000) & ((1 << 53) - 1)
    secure = secure_client = None
    if config.curve_key_dir is not None:
        from worker.wire.keys import secure_client_with, secure_with

        secure = secure_with(config.curve_key_dir, admits_workers=config.role == "prefill")
        secure_client = secure_client_with(config.curve_key_dir)
    compiler = GrammarCompiler(inbox, outbox, epoch)
    publisher = None
    if config.kv_events is not None:
        publisher = KvPublisher(
            config.kv_events, config.kv_events_replay, config.kv_events_topic, config.kv_events_form
        )
    transport = Transport(
        config.endpoint, inbox, outbox, compiler=compiler, publisher=publisher, secure=secure
    )
    try:
        transport.start()
    except CannotPublish as error:
        sys.stderr.write(f"degas worker: {error}\n")
        return 2
    except Exception as error:
        sys.stderr.write(f"degas worker: cannot bind endpoint {config.endpoint}: {error}\n")
        return 2
    prefills = None
    if config.role == "decode":
        prefills = PrefillClient(inbox, f"worker-{os.getpid()}", secure_client)
    decode = DecodeThread(config, transport, compiler, inbox, outbox, epoch, prefills)
    signals = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        # A second signal ends running sequences at once.
        inbox.put(Received(b"", Drain(config.drain_s if signals == 1 else 0.0)))
        if signals > 2:
            os._exit(130)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    # The supervisor sends this signal before it kills a worker that hangs, to see where every thread stands.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    decode.start()
    while decode.is_alive():
        decode.join(0.2)
        if signals and not transport.is_announced:
            break  # still loading: nothing to drain
    compiler.close()
    if prefills is not None:
        prefills.close()
    transport.close()
    if decode.is_alive():
        os._exit(0)
    return decode.exit_code


def run(flags: Mapping[str, object], file: Path | None = None) -> int:
    """Parse the settings and serve; returns the exit code, 2 for settings that cannot be used."""
    try:
        return serve(load(flags, file))
    except ConfigError as error:
        sys.stderr.write(f"degas worker: {error}\n")
        return 2


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; its table worker is read.")
    ] = None,
    **flags: object,
) -> None:
    """Run a worker alone. Each setting is also the variable DEGAS_WORKER_<NAME> and a line of the file's table worker."""
    raise typer.Exit(run(flags, config))


give_flags(command, WORKER_SETTINGS.parameters(typer.Option))

if __name__ == "__main__":
    app(prog_name="degas worker")
