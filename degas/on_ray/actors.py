"""Owns what a fleet needs of an actor, so that it can be run without Ray: questions, answers, and their absence."""

from __future__ import annotations

from typing import Any, Protocol


class Gone(Exception):
    """The actor is no more, and does not come back."""


class Away(Exception):
    """The actor's node or process died; it is placed anew."""


class Asked(Protocol):
    """A question to an actor, and its answer once there is one."""

    def is_answered(self) -> bool:
        """Whether there is an answer, or will be none."""

    def answer(self) -> Any:
        """The answer; only once `is_answered`. Raises `Gone` or `Away`."""


class Placed(Protocol):
    """A worker's actor, perhaps still without a place."""

    def ask(self) -> Asked:
        """`WorkerPost.describe`."""

    def stop(self) -> None:
        """`WorkerPost.stop`."""

    def kill(self) -> None:
        """End the actor, and with it whatever it still runs."""
