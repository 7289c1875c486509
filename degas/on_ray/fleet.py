"""Owns the workers that are wanted and those that there are: places, asks, counts and takes away. Loop of `degas ray up`.

It knows actors by `actors.Placed`, what they have to do by a function, and the time as an argument, and waits for nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from degas.on_ray.actors import Asked, Away, Gone, Placed
from degas.on_ray.scaling import History, ScaleLimits, WorkerLoad, choose_leavers, decide
from degas.restarts import RestartLimits, Restarts

AWAY_S: Final = 3.0  # without an answer for so long, an actor's node may be dead
PATIENCE_S: Final = 15.0  # without a place for so long, somebody should know
WRONG_SETTINGS: Final = 2


@dataclass(slots=True)
class Member:
    """One worker, from the wish to the end."""

    number: int
    placed: Placed
    asked: Asked
    since_s: float  # of the last answer, or the placing
    state: str = "placing"  # placing → starting → serving → leaving; away: nobody answers
    endpoint: str = ""
    node_ip: str = ""
    serves_since_s: float | None = None
    leaves_by_s: float = 0.0
    told: bool = False  # that it is without a place, or an answer

    @property
    def name(self) -> str:
        """What people call it."""
        return f"worker {self.number}" + (f" on {self.node_ip}" if self.node_ip else "")


class Fleet:
    """See the module. `failure` says why it cannot go on, with `failure_code`, once it cannot."""

    def __init__(
        self,
        place: Callable[[], Placed],
        load: Callable[[str], WorkerLoad | None],
        note: Callable[[str], None],
        *,
        limits: ScaleLimits,
        drain_s: float,
        restarts: RestartLimits | None = None,
    ) -> None:
        """`load` tells what the worker at an endpoint has to do. `drain_s`: how long one may take to leave."""
        self._place, self._load, self._note = place, load, note
        self._limits, self._drain_s = limits, drain_s
        self._restarts = Restarts(restarts or RestartLimits())
        self._members: list[Member] = []
        self._history = History()
        self._num_placed = 0
        self._place_again_s = 0.0
        self._is_ending = False
        self.wanted = limits.min_workers
        self.failure = ""
        self.failure_code = 0

    @property
    def members(self) -> list[Member]:
        """Those there are, oldest first."""
        return self._members

    @property
    def endpoints(self) -> set[str]:
        """Where workers are, or were last seen and may be still."""
        return {member.endpoint for member in self._members if member.endpoint}

    @property
    def num_serving(self) -> int:
        """How many serve."""
        return sum(member.state == "serving" for member in self._members)

    def end(self, now_s: float) -> None:
        """Take all away, from now on. Idempotent."""
        self._is_ending = True
        for member in list(self._members):
            self._let_go(member, now_s)

    def kill(self) -> None:
        """End all at once."""
        for member in self._members:
            member.placed.kill()
        self._members.clear()

    def on_tick(self, now_s: float) -> None:
        """Look at what was answered, and do what follows; call about twice a second."""
        for member in list(self._members):
            self._look_at(member, now_s)
        if self._is_ending or self.failure:
            return
        self._scale(now_s)
        staying = [member for member in self._members if member.state != "leaving"]
        if now_s >= self._place_again_s:
            for _ in range(self.wanted - len(staying)):
                self._add(now_s)
        if len(staying) > self.wanted:
            loads = {member.number: self._load_of(member) for member in staying}
            leavers = choose_leavers(loads, len(staying) - self.wanted)
            for member in staying:
                if member.number in leavers:
                    self._let_go(member, now_s)

    def _scale(self, now_s: float) -> None:
        found = [self._load_of(member) for member in self._members if member.state == "serving"]
        loads = [load for load in found if load is not None]
        before = self.wanted
        self._history, self.wanted = decide(self._history, now_s, before, loads, self._limits)
        if self.wanted != before:
            waiting = sum(load.num_waiting for load in loads)
            running = sum(load.num_running for load in loads)
            pages = sum(load.pages_in_use for load in loads) / max(1, sum(load.total_pages for load in loads))
            self._note(
                f"{before} → {self.wanted} workers: {running} running, {waiting} waiting, {100 * pages:.0f} % of pages in use"
            )

    def _load_of(self, member: Member) -> WorkerLoad | None:
        return self._load(member.endpoint) if member.endpoint else None

    def _add(self, now_s: float) -> None:
        self._num_placed += 1
        placed = self._place()
        self._members.append(Member(self._num_placed, placed, placed.ask(), now_s))

    def _let_go(self, member: Member, now_s: float) -> None:
        if member.state == "leaving":
            return
        if member.state in ("placing", "away"):  # there is nothing to finish
            self._remove(member)
            return
        member.state, member.leaves_by_s = "leaving", now_s + self._drain_s
        member.placed.stop()
        self._note(f"{member.name} is taken away once it has finished what it began")

    def _remove(self, member: Member) -> None:
        member.placed.kill()
        self._members.remove(member)

    # ------------------------------------------------------------------ one member

    def _look_at(self, member: Member, now_s: float) -> None:
        if member.state == "leaving" and now_s >= member.leaves_by_s:
            self._note(f"{member.name} did not end in time and is ended")
            self._remove(member)
            return
        if not member.asked.is_answered():
            self._on_silence(member, now_s)
            return
        try:
            answer = member.asked.answer()
        except Away as away:
            self._on_away(member, str(away), now_s)
            return
        except Gone as gone:
            self._members.remove(member)
            if member.state != "leaving":
                self._on_death(member, f"its actor ended: {gone}", now_s)
            return
        member.asked, member.since_s, member.told = member.placed.ask(), now_s, False
        self._on_answer(member, answer, now_s)

    def _on_silence(self, member: Member, now_s: float) -> None:
        silent_s = now_s - member.since_s
        if member.state == "placing":
            if silent_s >= PATIENCE_S and not member.told:
                member.told = True
                self._note(f"{member.name} still waits for a place: no node has its CPUs or GPUs free")
        elif member.state in ("starting", "serving") and silent_s >= AWAY_S:
            self._on_away(member, "nobody answers there", now_s, ask=False)

    def _on_away(self, member: Member, why: str, now_s: float, *, ask: bool = True) -> None:
        if ask:
            member.asked = member.placed.ask()
        if member.state == "leaving":
            return
        if member.state != "away":
            self._note(f"{member.name} is away ({why}); Ray places it anew when its node is dead")
        member.state, member.since_s, member.serves_since_s = "away", now_s, None

    def _on_answer(self, member: Member, answer: dict[str, Any], now_s: float) -> None:
        if member.endpoint != answer["endpoint"]:
            member.endpoint, member.node_ip = answer["endpoint"], answer["node_ip"]
            member.serves_since_s = None
            self._note(f"{member.name} starts at {member.endpoint}")
            if member.state == "leaving":  # placed anew in the meantime: nothing of what it began is there
                self._remove(member)
                return
            member.state = "starting"
        for line in answer["lines"]:
            if not line.startswith("DEGAS-") and line.strip():
                self._note(f"{member.name}: {line}")
        if answer["code"] is not None:
            self._on_end(member, int(answer["code"]), now_s)
        elif member.state != "leaving":
            self._on_state(member, is_ready=answer["ready"], now_s=now_s)

    def _on_state(self, member: Member, *, is_ready: bool, now_s: float) -> None:
        state = "serving" if is_ready else "starting"
        if state == "serving" and member.serves_since_s is None:
            self._note(f"{member.name} serves")
            member.serves_since_s = now_s
        elif state == "starting":
            member.serves_since_s = None
        member.state = state

    def _on_end(self, member: Member, code: int, now_s: float) -> None:
        self._remove(member)
        if member.state == "leaving":
            self._note(f"{member.name} has ended")
        elif code == WRONG_SETTINGS and member.serves_since_s is None:
            self._fail(f"{member.name} refuses its settings; what it said is above", code)
        else:
            self._on_death(member, f"exit code {code}", now_s)

    def _on_death(self, member: Member, why: str, now_s: float) -> None:
        served_s = None if member.serves_since_s is None else now_s - member.serves_since_s
        delay_s = self._restarts.on_death(served_s)
        if delay_s is None:
            self._fail(f"workers died {self._restarts.quick_deaths} times in a row (last: {why})", 1)
            return
        self._note(f"{member.name} ended ({why}); another one is placed")
        self._place_again_s = now_s + delay_s

    def _fail(self, why: str, code: int) -> None:
        self.failure, self.failure_code = why, code
