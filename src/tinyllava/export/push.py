"""Push a folder to a repository of the Hugging Face hub, or of a server with its API (``HF_ENDPOINT``)."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from tinyllava.errors import CheckpointError


def check_repository(repository: str) -> None:
    """Say at once when a repository's name cannot be one.

    Raises:
        CheckpointError: not of the form owner/name, or with characters that the hub does not allow.
    """
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise CheckpointError(f"--push {repository}: {error}") from error
    if repository.count("/") != 1:
        raise CheckpointError(f"--push {repository}: expected owner/name, for example alice/my-model.")


def push(folder: Path, repository: str, *, private: bool = False, message: str = "Upload model") -> str:
    """Make the repository if it is not there, upload a folder in one commit, and return its address.

    Raises:
        CheckpointError: not logged in, not allowed, or no connection.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        fix = (
            "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
            if status in (401, 403)
            else ("try again later")
        )
        raise CheckpointError(
            f"{repository}: the hub answered {status}: {error.server_message or error}; {fix}."
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{repository}: could not be pushed ({type(error).__name__}: {reason}). "
            "Log in with `hf auth login`, or set HF_TOKEN, and see that the network is there."
        ) from error
    return str(commit.commit_url)
