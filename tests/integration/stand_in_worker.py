"""A child that behaves as the supervisor expects of a worker, or does not: `STAND_IN` says how. No imports of ours.

The number of earlier starts is counted in `STAND_IN_FOLDER`, where each start also leaves its process id.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["STAND_IN_FOLDER"])
FAULT, _, WHEN = os.environ.get("STAND_IN", "").partition("@")
PATIENCE_S = float(os.environ.get("STAND_IN_BEAT_TIMEOUT", "0.6"))
START = len(list(FOLDER.glob("worker-*.pid")))
FAULTY = bool(FAULT) and (not WHEN or START in {int(number) for number in WHEN.split(",")})


def say(kind: str, **fields: object) -> None:
    print(f"DEGAS-{kind} {json.dumps(fields)}", flush=True)


def leave_pid(name: str, pid: int) -> None:
    fresh = FOLDER / f".{name}"
    fresh.write_text(str(pid))
    fresh.rename(FOLDER / name)


leave_pid(f"worker-{START}.pid", os.getpid())
(FOLDER / "worker-environment.json").write_text(json.dumps(dict(os.environ)))
if not (FAULTY and FAULT == "stubborn"):
    signal.signal(signal.SIGTERM, lambda *_: (print("worker says goodbye", flush=True), sys.exit(0)))
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
leave_pid(f"grandchild-{START}.pid", grandchild.pid)
if FAULTY and FAULT == "refuse":
    print("degas worker: depth: must be 4 at most", file=sys.stderr)
    sys.exit(2)
if FAULTY and FAULT == "die-early":
    sys.exit(7)
say("PHASE", phase="load weights", seconds=0.01)
for done in range(0, 101, 5):
    say("PROGRESS", phase="warm up", done=done, total=100)
print("DEGAS-PHASE {not json", flush=True)
print("x" * (3 << 20), flush=True)  # a line too long to keep must not end the reader
say("READY", endpoint=os.environ["DEGAS_WORKER_ENDPOINT"], model="stand-in", startup_s={})
beats = 0
if FAULTY and FAULT == "late-beat":
    time.sleep(0.4)
while True:
    hung = FAULTY and FAULT == "hang" and beats >= 3
    if FAULTY and FAULT == "die" and beats >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if not hung:
        beats += 1
        os.pwrite(int(os.environ["DEGAS_WORKER_BEAT_FD"]), struct.pack("<Qd", beats, PATIENCE_S), 0)
    time.sleep(0.02)
