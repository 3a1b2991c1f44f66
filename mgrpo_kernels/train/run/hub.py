"""The upload of final/ to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token

from mgrpo_kernels.train.errors import OutputError, UsageError


def check_login(repository: str | None) -> None:
    """Raise UsageError if the run is to upload to a repository, and the hub accepts no token of the user's."""
    if repository is None:
        return
    if get_token() is None:
        raise UsageError("push_to_hub: expected a token of the Hugging Face Hub (hf auth login, or HF_TOKEN), got none")
    try:
        HfApi().whoami()
    except Exception as error:  # the hub, the network and its client have no common base
        raise UsageError(
            f"push_to_hub: expected a token that the Hugging Face Hub accepts, got {first_line(error)}"
        ) from error


def push(directory: Path, repository: str) -> str:
    """Upload a directory to a repository, which is created as a private one if it does not exist; return its address.

    Raises:
        OutputError: it could not be uploaded.
    """
    try:
        api = HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Trained with mgrpo_kernels")
    except Exception as error:  # as above
        raise OutputError(
            f"push_to_hub: expected to upload {directory} to {repository}, got {first_line(error)}; the directory is complete: "
            f"hf upload {repository} {directory}"
        ) from error
    return str(url)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
