"""Owns health checks for containers: `python -m degas.health http URL` and `python -m degas.health file PATH`.

Standard library only and quick to start, since it runs every few seconds.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

MAX_AGE_S: Final = 5.0
TIMEOUT_S: Final = 3.0


def check_http(url: str) -> str | None:
    """What is wrong with the server behind `url`; None: nothing. 401 is an answer: it lives, and asks for a key."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply:
            return None if reply.status == 200 else f"status {reply.status}"
    except urllib.error.HTTPError as error:
        return None if error.code == 401 else f"status {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def check_file(path: Path, *, now_s: float) -> str | None:
    """What is wrong according to a supervisor's status file; None: nothing."""
    try:
        age_s = now_s - path.stat().st_mtime
        state = json.loads(path.read_text())
        waiting = [role for role, post in state.items() if not post["ready"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no status: {error}"
    if age_s > MAX_AGE_S:
        return f"the supervisor has not reported for {age_s:.0f} s"
    return f"not ready: {', '.join(waiting)}" if waiting else None


def main(arguments: list[str] | None = None) -> int:
    """Exit 0 when healthy, 1 with a reason when not."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 2 or given[0] not in ("http", "file"):
        print("usage: python -m degas.health http URL | file PATH", file=sys.stderr)
        return 2
    kind, target = given
    wrong = check_http(target) if kind == "http" else check_file(Path(target), now_s=time.time())
    if wrong is not None:
        print(wrong, file=sys.stderr)
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main())
