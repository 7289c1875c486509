"""Owns cleaning up after a supervisor that was killed. A process of its own, which reads the supervisor's pipe.

The kernel kills a killed supervisor's children, not their descendants: this process kills the children's process
groups and removes the runtime folder. Lines: `watch PGID`, `forget PGID`, `folder PATH`, `done`. With the argument `apart` it
is nobody's child: Ray, for one, kills the children of a process that it ends.
"""

import os
import shutil
import signal
import stat
import sys


def main() -> None:
    """Follow the supervisor's lines to their end, then clean up what is left."""
    if sys.argv[1:] == ["apart"] and os.fork():
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    folder = ""
    for line in sys.stdin:
        word, _, value = line.rstrip("\n").partition(" ")
        if word == "watch":
            groups.add(int(value))
        elif word == "forget":
            groups.discard(int(value))
        elif word == "folder":
            folder = value
        elif word == "done":
            return
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    if folder and _is_ours(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _is_ours(folder: str) -> bool:
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and "degas-" in os.path.basename(folder)
    )


if __name__ == "__main__":
    main()
