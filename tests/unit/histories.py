"""How long the state machines of the ordinary tests run: so many seeds of 100 steps."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def histories(num: int) -> settings:
    """On top of the profile in force, which says whether failures are shrunk."""
    return settings(
        max_examples=num,
        stateful_step_count=100,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
