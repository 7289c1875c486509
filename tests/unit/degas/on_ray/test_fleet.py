"""A fleet over actors that a test plays: who is placed, who is taken away, and what is made of deaths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from degas.on_ray.actors import Away, Gone
from degas.on_ray.fleet import AWAY_S, PATIENCE_S, Fleet
from degas.on_ray.scaling import ScaleLimits, WorkerLoad
from degas.restarts import RestartLimits


@dataclass
class Actor:
    """One that answers what it is told to, at once; None: not yet."""

    number: int
    says: dict[str, Any] | Exception | None = None
    stopped: bool = False
    killed: bool = False

    def ask(self) -> Actor:
        return self

    def is_answered(self) -> bool:
        return self.says is not None

    def answer(self) -> Any:
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    def stop(self) -> None:
        self.stopped = True

    def kill(self) -> None:
        self.killed = True

    def at(
        self, node: int, *, ready: bool = True, code: int | None = None, lines: tuple[str, ...] = ()
    ) -> None:
        self.says = {
            "endpoint": f"tcp://10.0.0.{node}:{5600 + self.number}",
            "node_ip": f"10.0.0.{node}",
            "ready": ready,
            "code": code,
            "lines": list(lines),
        }


@dataclass
class World:
    """The fleet, its actors in the order of their placing, and a clock of half seconds."""

    limits: ScaleLimits
    restarts: RestartLimits = field(
        default_factory=lambda: RestartLimits(first_delay_s=1.0, max_failed_starts=3)
    )
    loads: dict[str, WorkerLoad] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.actors: list[Actor] = []
        self.notes: list[str] = []
        self.now_s = 100.0
        self.fleet = Fleet(
            self._place,
            self.loads.get,
            self.notes.append,
            limits=self.limits,
            drain_s=30,
            restarts=self.restarts,
        )

    def _place(self) -> Actor:
        self.actors.append(Actor(len(self.actors) + 1))
        return self.actors[-1]

    def run(self, seconds: float = 0.5) -> None:
        for _ in range(round(seconds * 2)):
            self.now_s += 0.5
            self.fleet.on_tick(self.now_s)

    @property
    def states(self) -> list[str]:
        return [member.state for member in self.fleet.members]

    @property
    def text(self) -> str:
        return "\n".join(self.notes)


def world(least: int = 2, most: int | None = None) -> World:
    made = World(ScaleLimits(least, most or least, up_after_s=1, down_after_s=5))
    made.run()
    return made


def serving(least: int = 2, most: int | None = None) -> World:
    made = world(least, most)
    for actor in made.actors:
        actor.at(actor.number)
    made.run()
    return made


def test_as_many_as_wanted_are_placed_and_found() -> None:
    made = world()
    assert made.states == ["placing", "placing"] and not made.fleet.endpoints
    made.actors[0].at(1, ready=False, lines=("DEGAS-PHASE {}", "loading", " "))
    made.run()
    assert made.states == ["starting", "placing"]
    assert "worker 1 on 10.0.0.1: loading" in made.notes and "PHASE" not in made.text
    made.actors[0].at(1)
    made.run()
    assert made.states == ["serving", "placing"] and made.fleet.num_serving == 1
    assert made.fleet.endpoints == {"tcp://10.0.0.1:5601"}


def test_one_without_a_place_is_told_of_once() -> None:
    made = world()
    made.run(3 * PATIENCE_S)
    assert sum("waits for a place" in note for note in made.notes) == 2
    assert len(made.actors) == 2


def test_an_actor_whose_node_died_is_waited_for_where_it_comes_back() -> None:
    made = serving()
    made.actors[0].says = Away("the node died")
    made.run()
    assert made.states == ["away", "serving"]
    assert "tcp://10.0.0.1:5601" in made.fleet.endpoints  # a gateway may reach it still
    made.actors[0].says = None
    made.run(60)
    assert len(made.actors) == 2 and sum("is away" in note for note in made.notes) == 1
    made.actors[0].at(3, ready=False)
    made.run()
    assert made.states == ["starting", "serving"]
    made.actors[0].at(3)
    made.run()
    assert made.states == ["serving", "serving"] and made.notes[-1] == "worker 1 on 10.0.0.3 serves"
    assert made.fleet.endpoints == {"tcp://10.0.0.3:5601", "tcp://10.0.0.2:5602"}


def test_silence_is_an_absence_too() -> None:
    made = serving()
    made.actors[0].says = None
    made.run(AWAY_S + 1)
    assert made.states == ["away", "serving"]
    made.actors[0].at(1)
    made.run()
    assert made.states == ["serving", "serving"]


def test_a_worker_that_ended_is_replaced_and_a_loop_of_it_is_not() -> None:
    made = serving(1)
    made.run(10)
    made.actors[0].at(1, code=1)
    made.run(0.5)
    assert made.actors[0].killed
    made.run(1)
    assert len(made.actors) == 2 and not made.fleet.failure
    for _ in range(3):
        made.actors[-1].says = Gone("OSError: every port is taken")
        made.run(10)
    assert "3 times in a row" in made.fleet.failure and "every port is taken" in made.fleet.failure
    assert made.fleet.failure_code == 1
    count = len(made.actors)
    made.run(60)
    assert len(made.actors) == count


def test_refused_settings_end_it() -> None:
    made = world(1)
    made.actors[0].at(1, ready=False, code=2, lines=("degas worker: no such model",))
    made.run()
    assert made.fleet.failure_code == 2 and "no such model" in made.text


def test_growth_and_shrinking_follow_the_load() -> None:
    made = serving(1, 3)
    full = WorkerLoad(4, 20, max_rows=4, pages_in_use=50, total_pages=100)
    made.loads["tcp://10.0.0.1:5601"] = full
    made.run(1.5)
    assert len(made.actors) == 2 and "1 → 2 workers: 4 running, 20 waiting, 50 % of pages in use" in made.text
    made.actors[1].at(2)
    made.loads |= dict.fromkeys(["tcp://10.0.0.1:5601", "tcp://10.0.0.2:5602"], WorkerLoad(0, 0, 4, 0, 100))
    made.loads["tcp://10.0.0.1:5601"] = WorkerLoad(1, 0, 4, 10, 100)
    made.run(8)
    assert made.fleet.wanted == 1
    assert made.actors[1].stopped and not made.actors[0].stopped, "the one with nothing to do"
    assert made.states == ["serving", "leaving"]
    assert len(made.fleet.endpoints) == 2, "it still finishes what it began"
    made.actors[1].at(2, code=0)
    made.run()
    assert (
        made.actors[1].killed
        and made.states == ["serving"]
        and "worker 2 on 10.0.0.2 has ended" in made.notes
    )
    made.run(10)
    assert len(made.actors) == 2


def test_one_that_does_not_leave_is_ended() -> None:
    made = serving(1)
    made.fleet.end(made.now_s)
    made.run(29)
    assert made.states == ["leaving"] and not made.actors[0].killed
    made.run(2)
    assert not made.states and made.actors[0].killed


def test_the_end_waits_for_those_that_serve_and_for_nobody_else() -> None:
    made = serving(2)
    made.actors[1].says = Away("gone")
    made.run()
    made.fleet.end(made.now_s)
    assert made.states == ["leaving"] and made.actors[1].killed
    made.actors[0].says = Gone("killed")
    made.run()
    assert not made.fleet.members and not made.fleet.failure
    made.run(10)
    assert len(made.actors) == 2, "nobody is placed any more"


def test_all_end_at_once_when_they_must() -> None:
    made = serving(3)
    made.fleet.kill()
    assert all(actor.killed for actor in made.actors) and not made.fleet.members
