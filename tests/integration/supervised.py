"""Runs the real supervisor over stand-in children: `python -m tests.integration.supervised` with `STAND_IN…` set."""

import os
import sys
from pathlib import Path

from degas.options import ServeOptions
from degas.restarts import RestartLimits
from degas.supervisor import serve

HERE = Path(__file__).parent
FETCH = os.environ.get("STAND_IN_FETCH", "")  # Python that stands in for fetching a model

if __name__ == "__main__":
    sys.exit(
        serve(
            ServeOptions(
                port=0,
                grpc_port=None,
                worker_command=(sys.executable, "-I", "-S", str(HERE / "stand_in_worker.py")),
                gateway_command=(sys.executable, "-I", "-S", str(HERE / "stand_in_gateway.py")),
                fetch_command=(sys.executable, "-I", "-S", "-c", FETCH) if FETCH else (),
                start_timeout_s=1.5 if FETCH else 900.0,
                worker_settings={"model": "stand-in"},
                preload=False,
                drain_s=0.5,
                worker_grace_s=-4.7,  # with the supervisor's own margin: 0.3 s
                restarts=RestartLimits(first_delay_s=0.02, max_delay_s=0.1, brief_s=0.5, max_brief_lives=5),
                status_file=Path(os.environ["STAND_IN_FOLDER"]) / "status" / "status.json",
                runtime_parent=Path(os.environ["STAND_IN_FOLDER"]) / "run",
                report=True,
            )
        )
    )
