"""The command line and the supervisor: the only place that knows both gateway and worker, and of them imports the settings only.

Importing it puts the folder of the rooms (`shared`, `gateway`, `worker` …) first on the import path: an installed
wheel keeps them inside this package, so that a stranger's site-packages gains no package called `worker`.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_INSTALLED = os.path.join(_HERE, "_rooms")

ROOMS: str = _INSTALLED if os.path.isdir(_INSTALLED) else os.path.dirname(_HERE)

sys.path.insert(0, ROOMS)
