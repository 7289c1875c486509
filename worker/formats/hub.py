"""Owns a model hub's names: its cache on this machine, and fetching into it through huggingface_hub. Any thread."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from worker.formats.errors import CheckpointError

# The files that a served folder needs; repositories also hold pickles, ONNX and the makers' own layouts.
_WANTED = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "spiece.model", "merges.txt"]
ANSWER_S = 10.0  # for a hub to answer at all
_UNKNOWN = (
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
    "EntryNotFoundError",
    "RemoteEntryNotFoundError",
)
_UNWANTED = ["*/*.safetensors", "original/*", "onnx/*", "consolidated*"]


@dataclass(frozen=True, slots=True)
class HubName:
    """`org/name`, a branch, tag or commit (None: the main one), and one GGUF file of several."""

    repository: str
    revision: str | None = None
    file: str | None = None


def cache_folder() -> Path:
    """The folder of the hub library's cache, found by the same variables as the library's."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(named).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface" / "hub"


def snapshot_in(folder: Path, revision: str | None = None) -> Path:
    """The snapshot of a cached repository (`models--org--name`): the revision's, else the main one's, else the newest.

    Raises CheckpointError.
    """
    reference = folder / "refs" / (revision or "main")
    if reference.is_file():
        found = folder / "snapshots" / reference.read_text().strip()
        if found.is_dir():
            return found
    if revision is not None:
        by_commit = [path for path in (folder / "snapshots").glob("*") if path.name.startswith(revision)]
        if len(by_commit) == 1 and len(revision) >= 7:
            return by_commit[0]
        raise CheckpointError(f"the revision {revision!r} is not in this cache", file=folder)
    snapshots = sorted(
        (path for path in (folder / "snapshots").glob("*") if path.is_dir()),
        key=lambda path: path.stat().st_mtime,
    )
    if not snapshots:
        raise CheckpointError("no snapshot here: the download is incomplete", file=folder)
    return snapshots[-1]


def fetch(wanted: HubName) -> Path:
    """The repository's files in the cache, brought there first where the hub can be reached.

    A folder, or the file that was asked for. Raises CheckpointError.
    """
    try:
        import huggingface_hub
    except ImportError:
        return _cached(wanted, "huggingface_hub is not installed: pip install huggingface_hub")
    try:
        # Asked once, where listing files would be tried again for half a minute.
        found = huggingface_hub.model_info(wanted.repository, revision=wanted.revision, timeout=ANSWER_S)
        names = [file.rfilename for file in found.siblings or ()]
    except Exception as error:  # the library and its HTTP client raise many kinds
        return _cached(wanted, _reason(error, wanted))
    file = wanted.file or _only_gguf(wanted, names)
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(wanted.repository, file, revision=wanted.revision))
        return Path(
            huggingface_hub.snapshot_download(
                wanted.repository, revision=wanted.revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
        )
    except Exception as error:
        kind = type(error).__name__
        if kind in _UNKNOWN:
            raise CheckpointError(f"{wanted.repository} has no file {file}; it has {_some(names)}") from None
        raise CheckpointError(
            f"the download of {wanted.repository} broke off ({kind}: {str(error)[:200]}); start it again: it goes on where "
            "it stopped"
        ) from error


def _only_gguf(wanted: HubName, names: list[str]) -> str | None:
    """The one GGUF file of a repository that has no other weights; None of any other. Raises CheckpointError for several."""
    models = [name for name in names if name.endswith(".gguf") and "mmproj" not in name.lower()]
    if not models or any(name.endswith(".safetensors") for name in names):
        return None
    if len(models) > 1:
        raise CheckpointError(
            f"{wanted.repository} holds {len(models)} GGUF files; name one, as in {wanted.repository}/{models[0]}: "
            f"{_some(models)}"
        )
    return models[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (" …" if len(names) > 12 else "")


def _reason(error: Exception, wanted: HubName) -> str:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return f"{wanted.repository} asks for its licence to be accepted: do so on its page, then `hf auth login`"
    if kind in _UNKNOWN:
        return "the hub knows no such repository, revision or file, or `hf auth login` is needed to see it"
    if kind == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE says not to ask the hub"
    return f"the hub ({os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}) cannot be reached ({kind})"


def _cached(wanted: HubName, reason: str) -> Path:
    """The wanted model in the cache. Raises CheckpointError with the reason why it was not fetched."""
    folder = cache_folder() / ("models--" + wanted.repository.replace("/", "--"))
    called = wanted.repository + ("" if wanted.revision is None else f"@{wanted.revision}")
    problem = f"{called} is not in the cache ({cache_folder()}), and {reason}"
    if not (folder / "snapshots").is_dir():
        raise CheckpointError(
            f"{problem}; fetch it where there is a network (`hf download {wanted.repository}`) and copy it here, or give "
            "a folder or a GGUF file"
        )
    try:
        found = snapshot_in(folder, wanted.revision)
    except CheckpointError as error:
        raise CheckpointError(f"{problem} ({error.problem})", file=folder) from None
    if wanted.file is None:
        return found
    if not (found / wanted.file).is_file():
        raise CheckpointError(f"{wanted.file} is not in the cache, and {reason}", file=found)
    return found / wanted.file
