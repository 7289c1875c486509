"""Owns nothing; becomes the given command, tied to its parent's life. Run as a script: `leash.py PARENT_PID COMMAND…`.

On Linux the kernel kills the command when the parent dies, even by SIGKILL. Done in a program of its own,
before exec, because Python code between fork and exec is not safe once a process has threads.
"""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Set the parent-death signal, then exec."""
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            os.write(2, b"degas: cannot set the parent-death signal\n")
    if os.getppid() != parent_pid:
        os._exit(1)  # the parent died before the signal was armed
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
