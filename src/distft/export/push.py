"""Upload an export to the Hugging Face Hub, into a private repository unless told otherwise."""

from __future__ import annotations

from pathlib import Path

from distft.errors import ModelError
from distft.text import first_line


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the files of `folder`; the repository is created if there is none. Returns its address.

    An existing repository stays as private as it is.

    Raises:
        ModelError: the hub cannot be reached, or refuses.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="distft export")
    except LocalTokenNotFoundError as error:
        raise ModelError(f"cannot push to {repository}: run `hf auth login`, or set HF_TOKEN") from error
    except HFValidationError as error:
        raise ModelError(f"--push {repository} is no name of a repository: {first_line(error)}") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise ModelError(f"cannot push to {repository}: {first_line(error)}; {folder} stays here") from error
    return str(address)
