"""Hints for models that cannot be downloaded from the Hub."""

from __future__ import annotations


def download_hint(error: Exception) -> str:
    """The hint for an error of huggingface-hub: offline mode, a gated or unknown repository, or the network."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE or isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 forbids downloads: unset it, or name a local folder or a downloaded model."
    if isinstance(error, errors.GatedRepoError):
        return "Accept the repository's conditions on its page on the Hub, and log in: hf auth login, or HF_TOKEN."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "Check the name. For a private or gated repository, log in: hf auth login, or HF_TOKEN."
    return "Check the name and the network. A model that was downloaded before loads with HF_HUB_OFFLINE=1."
