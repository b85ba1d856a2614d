"""A finished run on the Hugging Face hub: the adapter, its card, the selection and the record."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from weightlora.errors import ConfigError, ExportError
from weightlora.runs.run import RECORD
from weightlora.runs.serve import export_run
from weightlora.tasks.hub import HUB_FAILURES


@dataclass(frozen=True, kw_only=True)
class Push:
    """What went to the hub, or would go (``url`` is None).

    ``files`` are ``(name, bytes)``. ``notes`` are the export's own.
    """

    repo: str
    private: bool
    url: str | None
    files: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()


def push(
    folder: str | Path,
    repo: str,
    profile: str = "native",
    *,
    public: bool = False,
    dry_run: bool = False,
    about: str = "",
) -> Push:
    """Export a finished run's adapter, reloaded and compared, and put it on the hub with its record.

    The token is the one of ``hf auth login`` or of HF_TOKEN. Files of an earlier push are replaced, others stay.

    Args:
        folder: the run directory; nothing is written there.
        repo: ``owner/name``, or ``name`` for the token's owner. It is made where it is not there yet.
        profile: as :func:`weightlora.export`.
        public: everybody may see the repository; one that is public already takes nothing else.
        dry_run: go nowhere; only say what would go.
        about: as :func:`weightlora.export`.

    Raises:
        ConfigError: a name that the hub does not allow.
        CheckpointError: as :func:`weightlora.runs.serve.export_run`.
        ExportError: the export does not hold, the hub refused it, or cannot be reached.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is no name of a repository ({error}); give owner/name") from None
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "export"
        done = export_run(folder, made, profile, about=about)
        shutil.copyfile(Path(folder) / RECORD, made / RECORD)
        files = tuple((path.name, path.stat().st_size) for path in sorted(made.iterdir()))
        url = None if dry_run else _upload(repo, made, public=public)
    return Push(repo=repo, private=not public, url=url, files=files, notes=done.notes)


def _upload(repo: str, folder: Path, *, public: bool) -> str:
    api = HfApi()
    try:
        if not public and _is_public(api, repo):
            raise ExportError(f"{repo} is there and public; give another name, or --public to put the run there")
        made = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Adapter by WeightLoRA")
    except HUB_FAILURES as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ExportError(
            f"the hub did not take {repo}: {lines[0]}; check `hf auth whoami`, the name and the network, and push again"
        ) from None
    return str(made)


def _is_public(api: HfApi, repo: str) -> bool:
    try:
        return api.repo_info(repo).private is False
    except RepositoryNotFoundError:
        return False
