"""Owns all that is said to Ray: joining a cluster, placing actors, asking them, the board. Thread of `degas ray`'s loop.

The only module of ours that imports Ray. No call here waits for an actor: what was asked is looked at later (`Question`), because
an actor that is being placed, or whose node just died, answers when it is back, or never.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any, Final

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from degas.on_ray.actors import Away, Gone
from degas.on_ray.config import RayConfig
from degas.on_ray.post import Task, WorkerPost

NAMESPACE: Final = "degas"
STORE_BYTES: Final = 80 << 20  # nothing of ours passes through Ray's object store; less is refused
PROBE_S: Final = 3.0
LOOPBACK: Final = "127.0.0.2"  # Ray takes 127.0.0.1 for "whatever address this machine has"


class ClusterError(Exception):
    """The cluster cannot be used like this; the message says what to do."""


def join(config: RayConfig, *, only_existing: bool = False) -> bool:
    """Become part of the cluster that is there, or start one of this machine alone; True: it is ours, and ends with us.

    Raises `ClusterError`; with `only_existing` also where none is there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that we start: it reports to nobody
    common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
    address = _find(config.address)
    if address is None and only_existing:
        raise ClusterError("no Ray cluster runs on this machine; --address names one elsewhere")
    try:
        if address is not None:
            # A cluster's token (~/.ray/auth_token) is used unasked only where the address is left to Ray.
            named = "auto" if config.address is None else address
            ray.init(address=named, _node_ip_address=config.node_ip, **common)
            return False
        node_ip = config.node_ip or (LOOPBACK if sys.platform == "linux" else None)
        ray.init(
            address="local",
            _node_ip_address=node_ip,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            **common,
        )
        return True
    except (ConnectionError, OSError, RuntimeError, ValueError, RayError) as error:
        if address is None:
            raise ClusterError(f"Ray does not start: {error}") from None
        raise ClusterError(
            f"cannot join the cluster at {address}: {error}. If it wants a token: RAY_AUTH_MODE=token, and the token in "
            f"~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from None


def leave() -> None:
    """Leave the cluster; what we placed and did not take away ends. Idempotent."""
    ray.shutdown()


def num_gpus() -> float:
    """GPUs of the whole cluster."""
    return float(ray.cluster_resources().get("GPU", 0))


def missing(num_cpus: float, gpus: float) -> str:
    """What no node of the cluster has enough of for one worker, were it idle; empty if one has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("CPU", 0) >= num_cpus and node.get("GPU", 0) >= gpus for node in nodes):
        return ""
    most = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    return f"no node has {num_cpus:g} CPUs and {gpus:g} GPUs for a worker; there are {most or 'no nodes'}"


class Question:
    """A question to an actor, and its answer once there is one."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def is_answered(self) -> bool:
        """Whether there is an answer, or will be none."""
        return bool(ray.wait([self._reference], timeout=0, fetch_local=False)[0])

    def answer(self) -> Any:
        """The answer; only once `is_answered`. Raises `Gone`, or `Away` when it may be asked again."""
        try:
            return ray.get(self._reference)
        except ActorDiedError as error:
            raise Gone(_first_line(error)) from None
        except RayError as error:
            raise Away(_first_line(error)) from None


class PlacedWorker:
    """A worker's actor. Ray places it anew when its node or its process dies; it is then a new worker elsewhere."""

    def __init__(self, task: Task, *, num_cpus: float, gpus: float) -> None:
        self._actor = _WorkerActor.options(num_cpus=num_cpus, num_gpus=gpus).remote(task)

    def ask(self) -> Question:
        """`WorkerPost.describe`."""
        return Question(self._actor.describe.remote())

    def stop(self) -> None:
        """`WorkerPost.stop`."""
        self._actor.stop.remote()

    def kill(self) -> None:
        """End the actor, and with it whatever it still runs."""
        ray.kill(self._actor, no_restart=True)


class Board:
    """Where `degas ray status` reads how a fleet is, and `degas ray down` asks it to end. An actor on the node of `up`."""

    def __init__(self, fleet: str) -> None:
        """Raises `ClusterError` when the fleet is up already."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        try:
            self._actor = _BoardActor.options(name=_board_name(fleet), scheduling_strategy=here).remote()
        except ValueError:
            raise ClusterError(
                f"the fleet {fleet!r} is up on this cluster already; end it with `degas ray down --fleet {fleet}`, or choose "
                f"another name with --fleet"
            ) from None

    def tell(self, state: dict[str, Any]) -> Question:
        """Say how the fleet is; answered with whether it is asked to end."""
        return Question(self._actor.tell.remote(state))


class SeenBoard:
    """The board of a fleet that somebody else keeps."""

    def __init__(self, fleet: str) -> None:
        """Raises `ClusterError` when there is no such fleet."""
        try:
            self._actor = ray.get_actor(_board_name(fleet), namespace=NAMESPACE)
        except ValueError:
            raise ClusterError(f"no fleet {fleet!r} is up on this cluster") from None

    def read(self) -> dict[str, Any]:
        """How the fleet was at most a second ago. Raises `Gone` once it has ended."""
        try:
            state: dict[str, Any] = ray.get(self._actor.read.remote(), timeout=10)
        except RayError as error:
            raise Gone(_first_line(error)) from None
        return state

    def stop(self) -> None:
        """Ask the fleet to end."""
        self._actor.stop.remote()


class _OnNode(WorkerPost):
    """`WorkerPost` on the node that Ray chose."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id())


class _Notes:
    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._is_stopping = False

    def tell(self, state: dict[str, Any]) -> bool:
        self._state = state
        return self._is_stopping

    def read(self) -> dict[str, Any]:
        return self._state

    def stop(self) -> None:
        self._is_stopping = True


_WorkerActor: Final = ray.remote(max_restarts=-1, max_task_retries=0, scheduling_strategy="SPREAD")(_OnNode)
_BoardActor: Final = ray.remote(num_cpus=0, max_restarts=0)(_Notes)


def _board_name(fleet: str) -> str:
    return f"degas-board-{fleet}"


def _find(address: str | None) -> str | None:
    """The head's <host>:<port>; None where a cluster has to be started. Raises `ClusterError` for one that is not there."""
    if address == "local":
        return None
    is_named = address is not None or bool(os.environ.get("RAY_ADDRESS"))
    if address is None:
        from ray._private.services import canonicalize_bootstrap_address

        try:
            address = canonicalize_bootstrap_address("auto")
        except (ConnectionError, ValueError) as error:
            if is_named:
                raise ClusterError(f"RAY_ADDRESS: {error}") from None
            return None
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    try:  # Ray itself would try for a minute and then end this process
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
    except OSError as error:
        if not is_named:
            return None  # the trace of a cluster that was killed
        raise ClusterError(
            f"no Ray head answers at {address}: {error}; `ray start --head` starts one"
        ) from None
    return address


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
