"""Owns the command `python -m tests.fuzz`: so many odd inputs for each parser, how fast, and what came out uncaught.

An exception that is not one of a parser's answers is a finding: it is printed with the input that made it, and the exit
code is 1. Equal seeds make equal inputs.
"""

from __future__ import annotations

import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import structlog
import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.file_targets import file_targets
from tests.fuzz.said_targets import said_targets
from tests.fuzz.targets import Target, api_targets, text_targets
from tests.fuzz.wire_targets import wire_targets

BATCH: Final = 100  # inputs made of what Hypothesis draws once
SLOW_S: Final = 1.0
_SHOWN: Final = 600

SCALARS: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
)
VALUES: Final = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@dataclass(slots=True)
class Report:
    """What one target made of its inputs."""

    name: str
    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    slowest: bytes = b""
    findings: dict[str, tuple[bytes, str]] = field(
        default_factory=dict
    )  # by kind and place: first input, traceback
    counts: Counter[str] = field(default_factory=Counter)


def every_target() -> list[Target]:
    """All of them."""
    return [*wire_targets(), *text_targets(), *said_targets(), *file_targets(), *api_targets()]


def fuzz(target: Target, num_inputs: int, number: int = 0) -> Report:
    """Run a target over so many inputs, at most `BATCH` more."""
    report = Report(target.name)
    started_s = time.perf_counter()

    @seed(number)
    @settings(
        max_examples=max(1, -(-num_inputs // BATCH)),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(VALUES, min_size=1, max_size=4), st.integers(0, 2**63))
    def batch(donors: list[Any], chance: int) -> None:
        rng = random.Random(chance)
        for _ in range(BATCH):
            _try(target, target.make(rng, donors), report)

    batch()
    report.seconds = time.perf_counter() - started_s
    return report


def _try(target: Target, data: bytes, report: Report) -> None:
    report.inputs += 1
    started_s = time.perf_counter()
    try:
        target.call(data)
        report.accepted += 1
    except target.answers:
        pass
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} at {last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
        report.counts[kind] += 1
        report.findings.setdefault(kind, (data, "".join(traceback.format_exception(error)[-4:])))
    took_s = time.perf_counter() - started_s
    if took_s > report.slowest_s:
        report.slowest_s, report.slowest = took_s, data


def lines_of(report: Report) -> Iterator[str]:
    """A report for people."""
    rate = report.inputs / report.seconds if report.seconds else 0.0
    yield (
        f"{report.name:28} {report.inputs:>9,} inputs {rate:>9,.0f}/s  {report.accepted / max(1, report.inputs):>4.0%} accepted  "
        f"slowest {report.slowest_s * 1e3:>6.1f} ms  {len(report.findings)} findings"
    )
    if report.slowest_s > SLOW_S:
        yield f"  slow: {report.slowest[:_SHOWN]!r}"
    for kind, (data, trace) in report.findings.items():
        yield f"  {kind}, {report.counts[kind]} times; input: {data[:_SHOWN]!r}"
        yield "    " + trace.replace("\n", "\n    ").rstrip()


def main(
    inputs: Annotated[int, typer.Option(help="How many inputs, all targets together.")] = 100_000,
    target: Annotated[list[str] | None, typer.Option(help="Only this target; may be given again.")] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds make equal inputs.")] = 0,
) -> None:
    """Odd inputs for every parser of what comes from outside."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    found = every_target()
    if target:
        unknown = set(target) - {one.name for one in found}
        if unknown:
            raise typer.BadParameter(
                f"{', '.join(unknown)}; there are {', '.join(one.name for one in found)}"
            )
        found = [one for one in found if one.name in target]
    reports = []
    for one in found:
        reports.append(fuzz(one, inputs // len(found), seed))
        print("\n".join(lines_of(reports[-1])), flush=True)
    total, seconds = sum(report.inputs for report in reports), sum(report.seconds for report in reports)
    findings = sum(len(report.findings) for report in reports)
    print(f"{total:,} inputs in {seconds:.1f} s, {total / seconds:,.0f}/s, {findings} findings")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    typer.run(main)
