"""Uploads to the Hugging Face Hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token

from ldm.errors import UserError
from ldm.files.untrusted import first_line


def check_upload(repository: str) -> None:
    """Check the name of a repository, and that there is a token, before anything else is done.

    Raises:
        UserError: The name is not OWNER/NAME, or there is no token.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"push={repository} must be OWNER/NAME, with your user name or organisation as the owner.")
    if get_token() is None:
        raise UserError(
            "push= needs a token of the Hugging Face Hub. Create one with write access at "
            "huggingface.co/settings/tokens, and store it with `hf auth login` or in the variable HF_TOKEN."
        )


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Upload an exported pipeline, creating the repository if it does not exist. Return its address.

    Raises:
        UserError: The Hub refused the upload or cannot be reached. The exported folder is kept.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError("this repository is public already, and private=false is not set")
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload pipeline and model card")
    except Exception as error:  # which exceptions depends on the HTTP library of huggingface_hub
        raise UserError(
            f"The upload to push={repository} failed: {first_line(error)}. {folder} is complete. Check that your token "
            f"can write to this repository, then upload it with `hf upload {repository} {folder}`."
        ) from error
    return str(address)
