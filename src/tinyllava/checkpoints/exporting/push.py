"""Push a folder to a repository of the Hugging Face hub, or of a server with its API (``HF_ENDPOINT``)."""

from pathlib import Path

from httpx2 import HTTPError  # what the hub's client is built on
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from tinyllava.errors import CheckpointError, first_line

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def check_repository(repository: str) -> None:
    """Say before long work when a repository's name cannot be one, or nobody is logged in.

    Raises:
        CheckpointError: not of the form owner/name, characters that the hub does not allow, or no token.
    """
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise CheckpointError(f"--push {repository}: {error}") from error
    if repository.count("/") != 1:
        raise CheckpointError(f"--push {repository}: expected owner/name, for example alice/my-model.")
    if get_token() is None:
        raise CheckpointError(f"--push {repository}: not logged in; {_LOG_IN}.")


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
        fix = _LOG_IN if status in (401, 403) else "try again later"
        said = first_line(error.server_message or error).rstrip(".")
        raise CheckpointError(f"{repository}: the hub answered {status}: {said}; {fix}.") from error
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        cause = error.__cause__ or error  # of an upload that broke off: what broke it
        said = first_line(cause).rstrip(".")
        raise CheckpointError(
            f"{repository}: could not be pushed ({type(cause).__name__}: {said}); see that the "
            "network is there and try again."
        ) from error
    return str(commit.commit_url)
