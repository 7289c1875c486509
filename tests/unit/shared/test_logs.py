"""Whoever writes a line, and however: no known secret is in it, and nothing that looks like one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import redaction
from shared.redaction import redact

SECRET = 'the known secret: Ünï"q'
UNKNOWN = "unheard-of-key-9"

PROGRAM = f"""
import asyncio, logging, sys, threading, warnings
import structlog
early = logging.getLogger("early"); early.addHandler(logging.StreamHandler()); early.propagate = False
from shared.logs import configure_logs
from shared.redaction import hide
hide({SECRET!r})
configure_logs("test", level="debug", json=sys.argv[1] == "json")
S, U = {SECRET!r}, {UNKNOWN!r}
log = structlog.get_logger("mine")
log.info("said " + S, key=S, nested={{"a": [S]}}, header=f"Authorization: Bearer {{U}}")
for name in ("aiohttp.websocket", "grpc._cython", "early", "asyncio"):
    logging.getLogger(name).warning("Client offered %r", ["openai-insecure-api-key." + U, S])
    logging.getLogger(name).error(f"formatted already: Bearer {{U}} {{S}}")
    try:
        raise ValueError(S + U)
    except ValueError:
        logging.getLogger(name).exception("it broke: %s", S)
warnings.warn(f"look: {{S}}")
try:
    raise ValueError(S)
except ValueError:
    log.exception("mine broke")
thread = threading.Thread(target=lambda: [].index(S)); thread.start(); thread.join()
class Broken:
    def __del__(self): raise ValueError(S)
Broken()
async def lost():
    asyncio.get_running_loop().create_task(fail()); await asyncio.sleep(0)
async def fail():
    raise ValueError(S)
asyncio.run(lost())
def deep():
    held = S
    raise KeyError(f"Bearer {{U}}")
deep()
"""


@pytest.mark.parametrize("form", ["json", "console"])
def test_every_writer_is_redacted(form: str) -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", PROGRAM, form], cwd=root, capture_output=True, text=True)
    said = done.stdout + done.stderr
    spellings = (
        SECRET,
        json.dumps(SECRET)[1:-1],
        json.dumps(SECRET, ensure_ascii=False)[1:-1],
        "Ünï",
        UNKNOWN,
    )
    assert [spelling for spelling in spellings if spelling in said] == [], said
    for expected in ("aiohttp.websocket", "Client offered", "look: ", "mine broke", "KeyError", "ValueError"):
        assert expected in said, said
    assert done.returncode == 1 and "asyncio" in said


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer {}",
        "authorization=bearer {}",
        "{{'Authorization': 'Bearer {}'}}",
        '{{"api_key": "{}"}}',
        '{{\\"api_key\\": \\"{}\\"}}',
        "X-Moondream-Auth: {}",
        "x-api-key: {}",
        "['realtime', 'openai-insecure-api-key.{}']",
        "Cookie: {}",
        "Proxy-Authorization: Basic {}",
        "api_keys=('{}',)",
    ],
)
@settings(max_examples=20, deadline=None)
@given(secret=st.from_regex(r"[A-Za-z0-9_.~+/=-]{6,40}", fullmatch=True))
def test_what_looks_like_a_secret_goes(text: str, secret: str) -> None:
    assert secret not in redact(text.format(secret)).replace(redaction.MASK, "")


@settings(deadline=None)
@given(st.text(max_size=60), st.text(min_size=4, max_size=20), st.text(max_size=60))
def test_known_secrets_go_wherever_they_are(before: str, secret: str, behind: str) -> None:
    known, pattern = set(redaction._known), redaction._known_pattern
    try:
        redaction.hide(secret)
        assert secret not in redact(before + secret + behind).replace(redaction.MASK, "")
    finally:
        redaction._known, redaction._known_pattern = known, pattern


@pytest.mark.parametrize(
    "line", ['{"event": "http", "route": "/v1/models", "code": "unauthorized"}', "set api_keys"]
)
def test_ordinary_lines_stay_as_they_are(line: str) -> None:
    assert redact(line) == line
