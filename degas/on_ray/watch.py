"""Owns listening to the workers' heartbeats, as a gateway that asks for nothing. Loop of `degas ray up`.

A heartbeat tells of all gateways' requests together, wherever those gateways run, so nobody else has to be asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import zmq

from degas.on_ray.scaling import WorkerLoad
from gateway.core.worker_link import WorkerLink

if TYPE_CHECKING:
    from gateway.generation import RequestError
    from shared.protocol import Beat, Features, Rejected, StepOutputs


class _Unheard:
    """The link itself keeps what is looked at here."""

    def on_ready(self, link: WorkerLink, tokenizer_json: bytes, chat_template: bytes) -> None: ...
    def on_outputs(self, link: WorkerLink, outputs: StepOutputs) -> None: ...
    def on_rejected(self, link: WorkerLink, rejected: Rejected) -> None: ...
    def on_features(self, link: WorkerLink, features: Features, payloads: list[bytes]) -> None: ...
    def on_beat(self, link: WorkerLink, beat: Beat) -> None: ...
    def on_lost(self, link: WorkerLink, error: RequestError) -> None: ...
    def on_recording(self, link: WorkerLink, recording: bytes) -> None: ...


class Watch:
    """Heartbeats of the workers behind some endpoints. `keys_dir` has a gateway's keys."""

    def __init__(self, keys_dir: str) -> None:
        self._keys_dir = keys_dir
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._links: dict[str, WorkerLink] = {}

    def follow(self, endpoints: set[str]) -> None:
        """Listen to these and to nobody else, from now on. Raises `shared.settings.ConfigError` for bad keys."""
        for endpoint in self._links.keys() - endpoints:
            self._links.pop(endpoint).close()
        for endpoint in endpoints - self._links.keys():
            link = WorkerLink(
                endpoint, _Unheard(), self._context, gateway_id="degas-ray", curve_key_dir=self._keys_dir
            )
            self._links[endpoint] = link
            link.open()

    def load(self, endpoint: str) -> WorkerLoad | None:
        """What the worker there has to do; None while none serves."""
        link = self._links.get(endpoint)
        if link is None or link.ready is None or link.beat is None:
            return None
        beat = link.beat
        return WorkerLoad(
            num_running=beat.num_running,
            num_waiting=beat.num_waiting,
            max_rows=link.ready.limits.max_rows,
            pages_in_use=beat.total_pages - beat.free_pages,
            total_pages=beat.total_pages,
        )

    def refusal(self, endpoint: str) -> str:
        """Why the worker there cannot be used (another version), if so."""
        link = self._links.get(endpoint)
        return "" if link is None else link.refusal

    def close(self) -> None:
        """Listen no more. Idempotent."""
        self.follow(set())
        self._context.destroy(0)
