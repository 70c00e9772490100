"""Adapters on the Hugging Face Hub: ``push`` with a model card made from the adapter, and ``pull``.

All requests go through huggingface-hub, so its environment variables apply: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. Only
the adapter's own files and a model card are uploaded, without paths of this machine (``formats/sharing.py``). Nothing
prints.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .base.loading import folder_of_downloads
from .base.locking import locked
from .base.saving import check_target
from .base.writing import WRITE_ERRORS, failed_write
from .errors import ConfigError, FormatError, HubError
from .formats import FORMATS, describe, detect_format, mlx_lm
from .formats.checkpoints import choose
from .formats.files import write_folder
from .formats.options import ReadOptions
from .formats.sharing import data_name, hub_name, shareable

CARD = "README.md"
# Files that ``pull`` downloads, and those among them that it leaves out.
_WANTED = [
    *("adapter_config.json", "adapter_model.*", "adapters.safetensors", "adapters.npz", "*/adapter_config.json"),
    *("*/adapter_model.*", "*.gguf", "*.nemo", "*.pt", "*.pth", "*.ckpt", "*.bin", "*.lora", "*.yaml", CARD),
]
_NOT_ADAPTER = [
    *("optimizer*", "training_state*", "rng_state*", "scheduler*", "training_args.bin", "frozen_prefix*"),
    *("model*", "pytorch_model*"),
]


def push(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload adapter",
    base: str | None = None,
    metrics: dict[str, float] | None = None,
    format: str | None = None,
    notes: list[str] | None = None,
    checkpoint: str | int | None = None,
) -> str:
    """Upload the adapter at ``path``, a folder or a file, to the repository ``repo``, with a model card.

    A README.md in the folder is uploaded in place of the card. Paths of this machine are removed from the uploaded
    files: the base model's path is replaced by its name on the Hub.

    Args:
        private: make a new repository private.
        base: the base model's name on the Hub, if the adapter's files do not record it.
        metrics: numbers for the card, such as {"val_loss": 1.23}.
        notes: a list that receives what was replaced or left out.
        checkpoint: which checkpoint of a run's folder: ``last``, ``best`` or an iteration. The default is the best one,
            if any.

    Returns: the URL of the commit.

    Raises: HubError: the Hub refuses, or cannot be reached. FormatError: there is no adapter, it is damaged, or a file
        that cannot be rewritten holds a path. ConfigError: ``base`` is a path, or an argument has no effect.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    path, notes = Path(path), [] if notes is None else notes
    _check_repo(repo)
    card_file, path = path / CARD, choose(path, checkpoint)
    if base is not None and hub_name(base) != base:
        raise ConfigError(f"{base!r} is a path, which means nothing to others", "Give the model's name on the Hub.")
    if (path / "config.json").is_file() and any(path.glob("model*.safetensors")):
        hint = "Upload it with hf upload OWNER/NAME FOLDER."
        raise FormatError(f"{path}: is a model, and push uploads adapters", hint)
    format = format or detect_format(path)
    facts = describe(path, format)
    if damage := FORMATS[format].read(path, ReadOptions(lenient=True)).problems():
        raise FormatError("\n".join(damage), "Train or save the adapter again: it is damaged.")
    files = _files(path, format)
    own_card = card_file.is_file()
    if own_card and metrics:
        raise ConfigError(f"{card_file} is uploaded as the card, without metrics", "Write them there, or remove it.")
    if own_card:
        files.append(card_file)
    base = base or hub_name(facts["base"])
    if base is None:
        notes.append("the upload does not name the base model: give its name on the Hub with --model")
    text = model_card({**facts, "base": base or "unknown"}, repo, metrics=metrics, training=_training_settings(path))
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        if not own_card:
            (card := Path(folder) / CARD).write_text(text, encoding="utf-8")
        if format == "mlx-lm" and path.is_file():  # of a checkpoint, under the usual name
            files[0] = Path(shutil.copyfile(path, Path(folder) / mlx_lm.WEIGHTS))
        clean = shareable(files, Path(folder), base, notes)
        operations = [CommitOperationAdd(file.name, file) for file in [*clean, *([] if own_card else [card])]]
        with _hub_errors(repo):
            api.create_repo(repo, private=private, exist_ok=True)
            if private and api.repo_info(repo).private is False:
                raise HubError(
                    f"{repo}: exists and is public, so --private has no effect",
                    "Choose a new name, or make the repository private in its settings first.",
                )
            done = api.create_commit(repo, operations, commit_message=message, revision=revision)
    return str(done.commit_url)


def pull(repo: str, folder: str | Path, *, revision: str | None = None, overwrite: bool = False) -> str:
    """Download the adapter in ``repo`` into ``folder``.

    Offline (HF_HUB_OFFLINE=1), an earlier download is copied.

    Returns: the name of its format.

    Raises: HubError: there is no such repository, or the Hub cannot be reached. FormatError: the repository has no
        adapter; nothing is written then.
    """
    from huggingface_hub import snapshot_download

    folder = Path(folder)
    _check_repo(repo)
    check_target(folder, overwrite, FormatError)
    with _hub_errors(repo):
        snapshot = Path(
            snapshot_download(repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=_NOT_ADAPTER)
        )
    single = [f for f in snapshot.iterdir() if f.suffix.lower() in (".gguf", ".nemo")]
    alone = len(single) == 1 and not (snapshot / "adapter_config.json").exists()
    format = detect_format(single[0] if alone else snapshot)

    def copy(temporary: Path) -> None:
        for file in snapshot.rglob("*"):
            if file.is_file():
                target = temporary / file.relative_to(snapshot)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)

    size = sum(file.stat().st_size for file in snapshot.rglob("*") if file.is_file())
    with locked(folder):
        write_folder(folder, copy, needed=size)
    return format


def _files(folder: Path, format: str) -> list[Path]:
    """The adapter's files in a folder, or an adapter's file; not the checkpoints of its training."""
    if folder.is_file():
        config = folder.with_name(mlx_lm.CONFIG)
        return [folder, config] if format == "mlx-lm" and config.is_file() else [folder]
    found = sorted({file for pattern in FORMATS[format].FILES for file in folder.glob(pattern) if file.is_file()})
    if not found:
        raise FormatError(f"{folder}: has no files of {format}, only subfolders", "Name the folder of one adapter.")
    return found


def _training_settings(path: Path) -> dict[str, Any]:
    """The settings of the training that the folder's config stores."""
    try:
        folder = path.parent if path.is_file() else path
        raw = json.loads((folder / mlx_lm.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(raw, dict):
        return {}
    stored = raw.get("training") if isinstance(raw.get("training"), dict) else raw
    names = ("data", "iters", "batch_size", "learning_rate", "optimizer", "max_seq_length", "mask_prompt", "seed")
    return {name: stored[name] for name in names if stored.get(name) is not None}


def model_card(
    facts: dict[str, Any],
    repo: str,
    *,
    base: str | None = None,
    metrics: dict[str, float] | None = None,
    training: dict[str, Any] | None = None,
) -> str:
    """A README.md for the adapter with these ``facts``, which ``describe`` returns.

    Paths of local folders, of the base or of the data, are left out: they mean nothing to others.
    """
    import yaml

    base = hub_name(base or facts["base"])
    library = {"peft": "peft", "gguf": "gguf"}.get(facts["format"], "mlx")
    head = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["lora", "mlx-lora", facts["method"]],
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
    }
    rows = [("Base", base or "see below"), ("Format", facts["format"]), ("Method", facts["method"])]
    for name in ("rank", "scale", "alpha", "dropout"):
        if name in facts:
            value = facts[name]
            rows.append((name.capitalize(), ", ".join(f"{v:g}" for v in value) if isinstance(value, list) else value))
    rows += [("Modules", f"{facts['modules']}: {', '.join(facts['targets'][:12])}"), ("Layers", facts["layers"])]
    rows += [("Parameters", f"{facts['parameters']:,}"), ("Data type", ", ".join(facts["dtype"]))]
    data = dict(training or {})
    if "data" in data and data_name(str(data["data"])) is None:
        data.pop("data")
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {repo.rpartition('/')[2]}\n\nA {facts['method']} adapter for {base or 'a language model'}.\n",
        _table(rows),
    ]
    if data:
        parts.append("## Training\n\n" + _table([(k.replace("_", " "), v) for k, v in data.items()]))
    if metrics:
        parts.append("## Metrics\n\n" + _table([(k, f"{v:g}") for k, v in metrics.items()]))
    parts.append("## Use\n\n" + "\n\n".join(_usage(facts["format"], repo, base or "BASE_MODEL")) + "\n")
    return "\n".join(parts)


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + "\n"


def _usage(format: str, repo: str, base: str) -> list[str]:
    """How to use the adapter with mlx-lora, mlx-lm, PEFT and llama.cpp."""
    adapter = repo.rpartition("/")[2]
    pull = f"mlx-lora pull {repo} {adapter}"
    peft = "" if format == "peft" else f"mlx-lora convert {adapter} {adapter}-peft --to peft --model {base}\n"
    where = repo if format == "peft" else f"{adapter}-peft"
    mlx = "" if format == "mlx-lm" else f"mlx-lora convert {adapter} {adapter}-mlx --to mlx-lm --model {base}\n"
    folder = adapter if format == "mlx-lm" else f"{adapter}-mlx"
    gguf = "" if format == "gguf" else f"mlx-lora convert {adapter} {adapter}.gguf --to gguf --model {base}\n"
    python = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(model, "{where}")'
    )
    first = "" if format == "peft" else f"```shell\n{pull}\n{peft}```\n\n"
    return [
        f"With mlx-lora:\n\n```shell\n{pull}\nmlx-lora chat --model {base} --adapter-path {adapter}\n```",
        f"With mlx-lm:\n\n```shell\n{pull}\n{mlx}"
        f"mlx_lm.generate --model {base} --adapter-path {folder} --prompt Hello\n```",
        f"With PEFT:\n\n{first}```python\n{python}\n```",
        f"With llama.cpp:\n\n```shell\n{pull}\n{gguf}llama-cli -m base.gguf --lora {adapter}.gguf\n```",
    ]


def _check_repo(repo: str) -> None:
    if repo.count("/") != 1 or repo.startswith(("/", ".")) or repo.endswith("/"):
        raise ConfigError(
            f"{repo!r} is not the name of a repository", "Write it as owner/name, such as mlx-community/my-adapter."
        )


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn every error of huggingface-hub into one ``HubError``."""
    try:
        yield
    except (HubError, FormatError):
        raise
    except Exception as error:
        if getattr(error, "errno", None) in WRITE_ERRORS:
            raise failed_write(Path(error.filename or folder_of_downloads()), error, HubError) from error
        message, hint = _explained(error)
        raise HubError(f"{repo}: {message}", hint) from error


def _explained(error: Exception) -> tuple[str, str]:
    """What huggingface-hub's error means here, and what to do about it."""
    from huggingface_hub import constants, errors

    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    status = getattr(getattr(error, "response", None), "status_code", None)
    offline = isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE
    if offline and isinstance(error, errors.LocalEntryNotFoundError):
        return "was not downloaded before, and HF_HUB_OFFLINE=1 forbids downloading it now", "Unset HF_HUB_OFFLINE."
    if offline:
        return "HF_HUB_OFFLINE=1 forbids using the network", "Unset HF_HUB_OFFLINE."
    if isinstance(error, errors.GatedRepoError):
        return first, "Accept the repository's conditions on its page, and log in: hf auth login, or HF_TOKEN."
    if isinstance(error, errors.RevisionNotFoundError):
        return first, "Leave --revision out for the main branch, or create the branch first."
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return first, "Check the name, and log in with a valid token: hf auth login, or HF_TOKEN."
    if status == 403:
        return first, "Use a token that may do this, one with write access for push: hf auth login, or HF_TOKEN."
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return first, "Check the name. For a private repository, log in: hf auth login, or HF_TOKEN."
    if isinstance(error, errors.HFValidationError):
        return first, "Write it as owner/name, such as mlx-community/my-adapter."
    if status is not None and status < 500:
        return first, "The Hub refuses this request: correct what it names."
    return first, "Check the network, and try again."
