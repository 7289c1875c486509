"""Owns what a soak is judged by, and its tables. No clock, no processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any, Final

from rich.console import RenderableType

from loadtest.chaos.lives import Slope, middle_slope
from loadtest.chaos.promises import promise_table
from loadtest.chaos.readings import HELPERS
from loadtest.chaos.soak import Soaked
from loadtest.tables import Figures

MB_PER_HOUR: Final = 1.0
LONG_S: Final = 1200.0
"""A slope is judged only over lives with this much time after their warm-up."""

DRIFT_PCT_PER_HOUR: Final = 20.0
SPARE_DESCRIPTORS: Final = 12
"""A process may end with so many more descriptors than it had at rest in the beginning: helpers are started on first need, and
their pipes stay. What leaks with every request, cancel or kill passes this within minutes."""


class Verdict:
    """The promises of a soak; None: the run was too short to say."""

    def __init__(self, soaked: Soaked) -> None:
        self.soaked = soaked
        warm_up_s = soaked.plan.warm_up_s
        self.slopes: dict[str, Slope] = {
            post: slope
            for post in soaked.lives.posts
            if (slope := soaked.lives.slope(post, warm_up_s, LONG_S))
        }
        legs = soaked.legs
        self.errors: Counter[str] = sum((leg.errors for leg in legs), Counter())
        self.unexplained: Counter[str] = sum((leg.unexplained for leg in legs), Counter())
        quiet = [(leg.at_s / 3600, leg.ttft_p50_ms) for leg in legs if leg.at_s >= warm_up_s and leg.ok]
        per_hour = middle_slope(quiet)
        base = sorted(ms for _, ms in quiet)[len(quiet) // 2] if quiet else 0.0
        self.drift_pct: float | None = 100 * per_hour / base if per_hour is not None and base else None
        self.measured_s = max((slope.measured_s for slope in self.slopes.values()), default=0.0)
        self.descriptors = self._descriptors()

    def promises(self) -> dict[str, bool | None]:
        """Each promise and whether it was kept."""
        soaked = self.soaked
        is_long = soaked.seconds - soaked.plan.warm_up_s >= LONG_S
        rests = [leg.rest for leg in soaked.legs]
        judged = [slope for slope in self.slopes.values() if slope.is_long]
        return {
            "every failure is explained by a blow": not self.unexplained
            and any(leg.ok for leg in soaked.legs),
            "no leg ended early": not any(leg.stopped for leg in soaked.legs),
            "whoever was hurt is replaced": all(blow.back_s for blow in soaked.blows),
            "nobody else died": not soaked.other_deaths,
            "at rest after every leg": all(rest is not None for rest in rests),
            "pages come back": all(rest.pages == soaked.before.pages for rest in rests if rest is not None),
            "descriptors come back": not self.descriptors,
            f"memory ≤ {MB_PER_HOUR:g} MB/h": all(slope.mb_per_hour <= MB_PER_HOUR for slope in judged)
            if judged
            else None,
            f"first token's drift ≤ {DRIFT_PCT_PER_HOUR:g} %/h": self.drift_pct <= DRIFT_PCT_PER_HOUR
            if is_long and self.drift_pct is not None
            else None,
        }

    @property
    def is_clean(self) -> bool:
        """Whether nothing that could be judged was broken."""
        return all(kept is not False for kept in self.promises().values())

    def _descriptors(self) -> dict[str, tuple[int, int]]:
        """Posts that ended with more than they may have: before and after."""
        rest = next((leg.rest for leg in reversed(self.soaked.legs) if leg.rest is not None), None)
        if rest is None:
            return {}
        before = self.soaked.before.posts
        return {
            post: (before[post].descriptors, held.descriptors)
            for post, held in rest.posts.items()
            if post in before and post != HELPERS
            if held.descriptors > before[post].descriptors + SPARE_DESCRIPTORS
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        soaked = self.soaked
        return {
            "plan": asdict(soaked.plan),
            "seconds": round(soaked.seconds, 1),
            "promises": self.promises(),
            "is_clean": self.is_clean,
            "memory": {
                post: asdict(slope) | {"curve": soaked.lives.curve(post)}
                for post, slope in self.slopes.items()
            },
            "descriptors": {
                post: {"before": held.descriptors, "most": soaked.most_descriptors.get(post)}
                for post, held in soaked.before.posts.items()
            },
            "pages": {"before": soaked.before.pages, "most": soaked.most_pages},
            "drift_pct_per_hour": self.drift_pct,
            "errors": dict(self.errors.most_common()),
            "unexplained": dict(self.unexplained.most_common()),
            "blows": [
                asdict(blow) | {"took_s": blow.took_s if blow.back_s else None} for blow in soaked.blows
            ],
            "other_deaths": soaked.other_deaths,
            "endings": soaked.endings,
            "legs": [leg.to_json() for leg in soaked.legs],
        }

    def tables(self) -> list[RenderableType]:
        """Processes, then promises."""
        return [self._processes(), self._promises()]

    def _processes(self) -> Figures:
        soaked = self.soaked
        table = Figures(
            f"what processes held, {soaked.plan.model}, after {soaked.plan.warm_up_s:.0f} s of warm-up for each life",
            (
                "process",
                "lives",
                "MB first",
                "MB last",
                "MB/h",
                "over min",
                "descriptors before / most",
                "judged",
            ),
            left=("process",),
        )
        for post in sorted(soaked.lives.posts):
            slope, held = self.slopes.get(post), soaked.before.posts.get(post)
            most = soaked.most_descriptors.get(post, 0)
            numbers = f"{held.descriptors} / {most}" if held is not None else f"– / {most}"
            if slope is None:
                num = len(soaked.lives.posts[post])
                table.add(post, str(num), "", "", "", "", numbers, "too short")
                continue
            table.add(
                post,
                str(slope.num_lives),
                f"{slope.first_mb:.1f}",
                f"{slope.last_mb:.1f}",
                f"{slope.mb_per_hour:+.1f}",
                f"{slope.measured_s / 60:.1f}",
                numbers,
                ("yes" if slope.mb_per_hour <= MB_PER_HOUR else "NO") if slope.is_long else "too short",
            )
        return table

    def _promises(self) -> RenderableType:
        soaked = self.soaked
        sent, ok, left = (sum(getattr(leg, name) for leg in soaked.legs) for name in ("sent", "ok", "left"))
        took = ", ".join(
            f"{blow.post} {blow.signal[3:].lower()} {blow.took_s:.1f} s" for blow in soaked.blows[-6:]
        )
        memory = ", ".join(
            f"{post} {slope.mb_per_hour:+.2f}" for post, slope in self.slopes.items() if slope.is_long
        )
        drift = f"{self.drift_pct:+.1f} %/h" if self.drift_pct is not None else "–"
        facts = [
            f"{sent} sent, {ok} answered, {left} left by their client; failed: {_counts(self.errors)}; unexplained: "
            f"{_counts(self.unexplained)}{self._first_error()}",
            "; ".join(leg.stopped for leg in soaked.legs if leg.stopped) or f"{len(soaked.legs)} legs",
            f"{len(soaked.blows)} blows; the last: {took or 'none'}",
            f"{soaked.other_deaths}" + ("; ".join(["", *soaked.endings]) if soaked.other_deaths else ""),
            f"{sum(leg.rest is not None for leg in soaked.legs)} of {len(soaked.legs)}",
            f"{soaked.before.pages} before, {soaked.most_pages} at most, "
            + ", ".join(str(leg.rest.pages) for leg in soaked.legs[-4:] if leg.rest is not None)
            + " at rest",
            ", ".join(f"{post} {was} → {now}" for post, (was, now) in self.descriptors.items()) or "all",
            f"{memory} MB/h" if memory else f"no life of {LONG_S / 60:.0f} min after its warm-up",
            f"{drift}; p50 by leg "
            + ", ".join(f"{leg.ttft_p50_ms:.1f}" for leg in (soaked.legs[0], *soaked.legs[-3:]) if leg)
            + " ms",
        ]
        title = (
            f"soak: {soaked.seconds / 60:.1f} min, {soaked.plan.model}, {soaked.plan.rate:g} requests/s of all kinds, "
            f"{soaked.plan.gateways} gateways"
        )
        return promise_table(title, self.promises(), facts)

    def _first_error(self) -> str:
        for leg in self.soaked.legs:
            for code in leg.unexplained:
                if said := leg.first_errors.get(code):
                    return f" (the first {code}: {said})"
        return ""


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.most_common()) or "none"
