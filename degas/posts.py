"""Owns what the supervisor knows of each child's place: who runs there, how often it was replaced, is it ready. Main thread."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path

from degas.child import Child
from degas.options import ServeOptions
from degas.restarts import Restarts


class Post:
    """One role's place: the child that runs in it, how often it was replaced, whether it is ready.

    `port` is where a gateway answers for itself; several of them share the port that clients know.
    """

    def __init__(self, role: str, restarts: Restarts, number: int = 0, port: int | None = None) -> None:
        self.role = role
        self.number = number  # among those of its role
        self.name = role if number == 0 else f"{role}-{number + 1}"
        self.port = port
        self.restarts = restarts
        self.child: Child | None = None
        self.is_ready = False
        self.ready_since_s = 0.0
        self.was_ready = False
        self.halt = asyncio.Event()

    def on_ready(self, now_s: float) -> None:
        """The child serves."""
        self.is_ready = self.was_ready = True
        self.ready_since_s = now_s

    def on_death(self, now_s: float) -> float | None:
        """The child is gone; returns how long it was ready."""
        ready_for_s = now_s - self.ready_since_s if self.is_ready else None
        self.is_ready = False
        self.child = None
        return ready_for_s


def make_posts(options: ServeOptions) -> dict[str, Post]:
    """A post for each child, by its name: worker, gateway, gateway-2, …"""
    posts = []
    for role in options.roles:
        if role == "gateway":
            ports = options.own_ports or (options.port,)
            posts += [Post(role, Restarts(options.restarts), i, port) for i, port in enumerate(ports)]
        else:
            posts.append(Post(role, Restarts(options.restarts)))
    return {post.name: post for post in posts}


def write_status(path: Path, posts: Iterable[Post]) -> None:
    """Replace the file that `python -m degas.health` looks at, and scrapers of several gateways."""
    state: dict[str, dict[str, object]] = {}
    for post in posts:
        state[post.name] = {
            "ready": post.is_ready,
            "pid": post.child.pid if post.child is not None else None,
            "deaths": post.restarts.num_deaths,
        }
        if post.port is not None:
            state[post.name]["port"] = post.port
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(state) + "\n")
    fresh.replace(path)
