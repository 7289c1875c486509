"""Who is tried again, when, and who is quarantined: by example, and under random histories."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway.decisions.recovery import (
    FEW,
    MAX_ATTEMPTS,
    TRIAL_S,
    Record,
    Recovery,
    Verdict,
    fair_order,
    judge,
)

WAIT_S = 30.0


@dataclass(eq=False)
class Request:
    """A request; `kills` makes it the death of every worker that begins it."""

    tenant: str = ""
    started_s: float = 0.0
    kills: bool = False
    record: Record = field(default_factory=Record)


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        (Record(num_attempts=1, num_crashes=1), Verdict.RETRY),
        (Record(num_attempts=1, num_crashes=1, was_alone=True), Verdict.RETRY),
        (Record(num_attempts=2, num_crashes=2, was_alone=True), Verdict.QUARANTINE),
        (Record(num_attempts=5, num_crashes=5), Verdict.RETRY),  # among many each time: nothing follows
        (Record(num_attempts=5, num_crashes=5, num_trials=4), Verdict.RETRY),
        (Record(num_attempts=2, num_crashes=2, num_trials=1, num_singled_out=1), Verdict.RETRY),
        (Record(num_attempts=3, num_crashes=3, num_trials=2, num_singled_out=2), Verdict.QUARANTINE),
        (Record(num_attempts=4, num_crashes=4, num_trials=3, num_singled_out=1), Verdict.QUARANTINE),
        (Record(num_attempts=2, num_crashes=1, num_silences=1, was_alone=True), Verdict.RETRY),
        (Record(num_attempts=2, num_silences=2), Verdict.GIVE_UP),  # two that were slow, stopped or hung
        (Record(num_attempts=MAX_ATTEMPTS, num_crashes=MAX_ATTEMPTS), Verdict.GIVE_UP),
    ],
)
def test_evidence(record: Record, verdict: Verdict) -> None:
    assert judge(record) is verdict


def lose(recovery: Recovery[Request], held: list[Request], now_s: float = 0.0, **fields: int) -> None:
    for request in held:
        request.record.num_attempts += 1
    recovery.on_loss(held, now_s, num_held=fields.get("num_held", len(held)), crashed=True)


def test_tenants_take_turns_and_the_oldest_goes_first() -> None:
    requests = [Request("a", 1.0), Request("a", 2.0), Request("a", 3.0), Request("b", 2.5), Request("c", 0.5)]
    order = fair_order(requests)
    assert [(r.tenant, r.started_s) for r in order] == [
        ("c", 0.5),
        ("a", 1.0),
        ("b", 2.5),
        ("a", 2.0),
        ("a", 3.0),
    ]


def sizes_of_rounds(recovery: Recovery[Request], *, by_time: bool = False) -> list[int]:
    """Clear round after round, each by its tokens, or by time."""
    sizes, now_s = [], 0.0
    while batch := recovery.next_round(now_s):
        sizes.append(len(batch))
        assert not recovery.next_round(now_s), "a round begins while another is on trial"
        now_s += TRIAL_S if by_time else 0.01
        if by_time:
            recovery.on_time(now_s - 0.01)
            assert recovery.on_trial
            recovery.on_time(now_s)
        else:
            assert [recovery.on_settled(request) for request in batch] == [False] * (len(batch) - 1) + [True]
    return sizes


def test_few_go_one_by_one_and_many_in_growing_rounds() -> None:
    few: Recovery[Request] = Recovery(WAIT_S)
    lose(few, [Request() for _ in range(FEW)])
    assert sizes_of_rounds(few) == [1] * FEW
    many: Recovery[Request] = Recovery(WAIT_S)
    lose(many, [Request() for _ in range(104)])
    assert sizes_of_rounds(many) == [6, 12, 24, 48, 14]


def test_even_few_are_through_in_seconds_where_tokens_are_slow() -> None:
    recovery: Recovery[Request] = Recovery(WAIT_S)
    lose(recovery, [Request() for _ in range(FEW)])
    assert sizes_of_rounds(recovery, by_time=True) == [1, 2, 4, 1]


def test_what_crashed_on_trial_goes_first_by_itself_and_a_crash_besides_is_no_evidence() -> None:
    recovery: Recovery[Request] = Recovery(WAIT_S)
    lose(recovery, requests := [Request(started_s=i) for i in range(40)])
    first = recovery.next_round(0.0)
    assert first == requests[:2]
    lose(recovery, first)
    assert recovery.next_round(0.0) == [requests[0]]
    recovery.on_settled(requests[0])
    assert recovery.next_round(0.0) == [requests[1]]
    recovery.on_settled(requests[1])
    assert recovery.next_round(0.0) == requests[2:4], "the others have lost nothing by it"
    recovery.on_settled(requests[2])
    recovery.on_time(TRIAL_S)
    assert not recovery.on_trial
    recovery.next_round(TRIAL_S)
    lose(recovery, [requests[3]], num_held=9)  # it has been let off the trial
    assert requests[3].record.level == 0


def test_a_round_that_could_not_be_sent_teaches_nothing() -> None:
    recovery: Recovery[Request] = Recovery(WAIT_S)
    lose(recovery, requests := [Request(started_s=i) for i in range(64)])
    for _ in range(10):  # nobody has room
        batch = recovery.next_round(0.0)
        assert batch == requests[:4]
        for request in batch:
            recovery.put_back(request)
    assert len(recovery) == 64 and not recovery.on_trial


def test_who_waits_for_a_worker_in_vain_leaves_and_who_has_one_does_not() -> None:
    recovery: Recovery[Request] = Recovery(WAIT_S)
    lose(recovery, requests := [Request("a"), Request("b")])
    assert recovery.expired(WAIT_S - 0.1, lambda request: request.tenant == "a") == []
    assert recovery.expired(WAIT_S, lambda request: False) == [requests[1]]
    assert recovery.expired(2 * WAIT_S - 0.1, lambda request: False) == [requests[0]]
    assert not len(recovery)


class Service(RuleBasedStateMachine):
    """One worker that is killed at any time and dies of every request that kills, once it begins that."""

    def __init__(self) -> None:
        super().__init__()
        self.recovery: Recovery[Request] = Recovery(WAIT_S)
        self.now_s = 0.0
        self.is_up = True
        self.held: list[Request] = []  # by the worker, in the order in which it begins them
        self.begun: list[Request] = []  # those have shown a token
        self.quarantined: list[Request] = []
        self.given_up: list[Request] = []
        self.crashes: list[tuple[list[Request], list[Request]]] = []  # who was held, and on trial
        self.num_silences = 0

    def accept(self, tenant: str, kills: bool) -> None:
        request = Request(tenant, self.now_s, kills)
        request.record.num_attempts = 1
        self.held.append(request)

    @precondition(lambda self: self.is_up)
    @rule(
        num=st.sampled_from([1, 1, 3, 20]),
        tenant=st.sampled_from("ab"),
        kills=st.sampled_from([False] * 5 + [True]),
    )
    def newcomers(self, num: int, tenant: str, kills: bool) -> None:
        for i in range(num):
            self.accept(tenant, kills and i == num // 2)

    @precondition(lambda self: self.is_up)
    @rule(num=st.sampled_from([1, 2, 4, 100]))
    def work(self, num: int) -> None:
        """The worker begins so many, those that are tried again first."""
        order = sorted(self.held, key=lambda request: request.record.num_attempts < 2)
        for request in order[:num]:
            if request.kills:
                self.lose(crashed=True)
                return
            self.held.remove(request)
            self.begun.append(request)
            self.recovery.on_settled(request)
            self.send()

    @precondition(lambda self: self.is_up)
    @rule(crashed=st.sampled_from([True, True, False]))
    def dies(self, crashed: bool) -> None:
        """By somebody's hand; or it hangs."""
        self.lose(crashed=crashed)

    def lose(self, *, crashed: bool) -> None:
        held, self.held, self.is_up = self.held, [], False
        if crashed:
            self.crashes.append((held, list(self.recovery.on_trial)))
        self.num_silences += not crashed
        for request, verdict in self.recovery.on_loss(held, self.now_s, num_held=len(held), crashed=crashed):
            if verdict is Verdict.QUARANTINE:
                self.quarantined.append(request)
                self.check_evidence(request)
            elif verdict is Verdict.GIVE_UP:
                self.given_up.append(request)

    def check_evidence(self, request: Request) -> None:
        """By what happened, not by the record: twice at least, and alone once; or three times, and of these twice the only one
        tried, or once and tried in all."""
        there = [(held, tried) for held, tried in self.crashes if request in held]
        assert len(there) >= 2
        singled_out = sum(tried == [request] for _, tried in there)
        trials = sum(request in tried for _, tried in there)
        was_alone = any(held == [request] for held, _ in there)
        assert was_alone or (len(there) >= 3 and (singled_out >= 2 or (singled_out and trials >= 3)))

    @precondition(lambda self: not self.is_up)
    @rule()
    def starts(self) -> None:
        self.is_up = True
        self.send()

    @rule(seconds=st.sampled_from([0.01, 0.3, TRIAL_S, 2 * TRIAL_S]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.recovery.on_time(self.now_s)
        self.recovery.expired(self.now_s, lambda _: True)
        self.send()

    @rule(at=st.integers(0, 50))
    def client_leaves(self, at: int) -> None:
        waiting = [*self.recovery, *self.held]
        if waiting:
            request = waiting[at % len(waiting)]
            if request in self.held:
                self.held.remove(request)
            self.recovery.on_settled(request)
            self.begun.append(request)
            self.send()

    def send(self) -> None:
        while self.is_up and (batch := self.recovery.next_round(self.now_s)):
            for request in batch:
                request.record.num_attempts += 1
                self.held.append(request)

    @invariant()
    def holds(self) -> None:
        waiting = list(self.recovery)
        assert not set(waiting) & set(self.held), "at two places"
        assert set(self.recovery.on_trial) <= set(self.held), "on trial, and on no worker"
        assert len(self.recovery.on_trial) <= 1 or all(r.record.level < 2 for r in self.recovery.on_trial)
        if self.is_up and waiting:
            assert self.recovery.on_trial, "some wait, and nothing goes on"
        for request in (*waiting, *self.held):
            assert request.record.num_attempts <= MAX_ATTEMPTS

    def teardown(self) -> None:
        """Left alone, the service gets through: whoever does not kill is served, whoever kills is found."""
        for _ in range(2000):
            if not self.is_up:
                self.starts()
            if not self.held and not len(self.recovery):
                break
            self.work(1)
        else:
            raise AssertionError("it never ends")
        assert not self.recovery.on_trial
        assert all(request.kills or self.num_silences or self.crashes for request in self.given_up)


def test_any_history_of_losses_ends_and_nobody_is_quarantined_without_evidence() -> None:
    run_state_machine_as_test(
        Service, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )


def test_a_third_crash_counts_though_somebody_else_is_on_trial() -> None:
    """What a random history found: twice singled out, then let off after a second; the next worker dies of neither."""
    service = Service()
    service.newcomers(num=3, tenant="a", kills=False)
    service.dies(crashed=False)
    service.starts()
    service.client_leaves(at=0)
    service.newcomers(num=1, tenant="a", kills=False)
    service.dies(crashed=True)
    service.starts()
    service.newcomers(num=1, tenant="a", kills=False)
    service.dies(crashed=True)
    service.starts()
    (tried,) = service.recovery.on_trial
    assert not service.quarantined and tried.record.num_singled_out == 2
    service.time_passes(seconds=TRIAL_S)
    assert service.recovery.on_trial != [tried] and tried in service.held
    service.dies(crashed=True)
    assert service.quarantined == [tried]
    service.teardown()


@pytest.mark.parametrize("num", [2, 5, 9, 40, 104, 300])
@pytest.mark.parametrize("at", [0.0, 0.3, 0.99])
def test_a_request_that_kills_is_found_in_a_few_crashes_wherever_it_stands(num: int, at: float) -> None:
    service = Service()
    for i in range(num):
        service.accept("ab"[i % 2], i == int(at * num))
    while service.held or len(service.recovery):
        service.work(1) if service.is_up else service.starts()
    assert [request.kills for request in service.quarantined] == [True] and not service.given_up
    assert len(service.begun) == num - 1 and len(service.crashes) <= 6
