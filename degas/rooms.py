"""Owns running a module of a room: `python -m degas.rooms worker --depth 1`. Main thread, then the module's.

It does what `python -m worker --depth 1` does in a checkout, and works wherever Degas is installed, from any folder.
"""

import runpy
import sys


def main() -> None:
    """Run the module named by the first argument as a program; the other arguments are the program's."""
    if len(sys.argv) < 2:
        sys.exit(
            "usage: python -m degas.rooms MODULE [ARGUMENT …]   (worker, gateway, worker.native.build …)"
        )
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
