"""Owns `GET /v1/stats`, with the fields of moondream-station's answer. No sockets; gateway's loop."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.api.parameters import Json
from gateway.generation import Core


@dataclass(frozen=True, slots=True)
class Load:
    """What a gateway knows of its requests and workers."""

    num_workers: int  # that take work
    num_running: int  # decoding now, by the workers' last beats
    num_waiting: int
    max_waiting: int
    num_accepted: int  # since the gateway started
    num_timed_out: int


def stats(core: Core, load: Load) -> Json:
    """As moondream-station spells it, of all workers together. Seconds."""
    served = core.models()
    default = core.config.default_model or (served[0].card.model_id if served else None)
    return {
        "status": "running" if load.num_workers else "stopped",
        "model": default,
        "workers": load.num_workers,
        "queue_size": load.num_waiting,
        "max_queue_size": load.max_waiting,
        "processing": load.num_running,
        "timeouts": load.num_timed_out,
        "default_timeout": core.config.request_deadline_s,
        "requests_processed": load.num_accepted,
    }
