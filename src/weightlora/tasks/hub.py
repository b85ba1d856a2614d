"""Whether the Hugging Face hub can be reached, asked once before a library that would try for half a minute."""

from __future__ import annotations

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

# What the hub's client raises: its own, and whatever its HTTP library does, which is the base of its own HTTP error.
HUB_FAILURES: tuple[type[Exception], ...] = (
    OSError,
    RuntimeError,
    *(kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception)),
)


def unreachable(repo: str, file: str, kind: str = "model") -> str | None:
    """Say why a repository's file cannot be had: there is no cached copy of it, and the hub does not answer.

    Args:
        repo: ``owner/name``, or a name alone.
        file: a file that every such repository has.
        kind: ``model`` or ``dataset``.

    Returns:
        The reason; None where loading can say more: the hub answers, whatever it says, or the user has set offline
        mode, in which libraries do not try.
    """
    try:
        if try_to_load_from_cache(repo, file, repo_type=kind) is None:
            get_hf_file_metadata(hf_hub_url(repo, file, repo_type=kind))
    except (HfHubHTTPError, OfflineModeIsEnabled, ValueError):
        return None
    except HUB_FAILURES as error:
        return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
    return None
