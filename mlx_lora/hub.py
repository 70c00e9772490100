"""Adapters on the Hugging Face Hub: ``push`` with a model card made from the adapter, and ``pull``.

Everything goes through huggingface-hub, so that its settings hold: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. Nothing is
uploaded that is no adapter, and nothing prints.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from .errors import ConfigError, FormatError, HubError
from .formats import FORMATS, describe, detect_format

CARD = "README.md"
# What a repository of an adapter may hold that ``pull`` wants.
_WANTED = [
    *("adapter_config.json", "adapter_model.*", "adapters.safetensors", "adapters.npz", "*/adapter_config.json"),
    *("*/adapter_model.*", "*.gguf", "*.nemo", "*.pt", "*.pth", "*.ckpt", "*.bin", "*.lora", "*.yaml", CARD),
]
_NOT_ADAPTER = [
    "optimizer*",
    "training_state*",
    "rng_state*",
    "scheduler*",
    "training_args.bin",
    "model*",
    "pytorch_model*",
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
) -> str:
    """Upload the adapter at ``path``, a folder or a file, to the repository ``repo`` with a model card.

    A README.md that lies in the folder is taken as it is in place of the card.

    Args:
        base: the model that the adapter is for, where its files do not tell it.
        metrics: numbers for the card, such as {"val_loss": 1.23}.

    Returns: the address of the commit.

    Raises: HubError: the Hub refuses or cannot be reached. FormatError: no adapter is there, or a damaged one.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    path = Path(path)
    _check_repo(repo)
    format = format or detect_format(path)
    facts = describe(path, format)
    if facts["problems"] and any("NaN" in p or "missing" in p for p in facts["problems"]):
        raise FormatError(
            "\n".join(facts["problems"]), "Train or save the adapter again; only sound ones are uploaded."
        )
    files = [path] if path.is_file() else _files(path, format)
    text = model_card(facts, repo, base=base, metrics=metrics, training=_training(path))
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder, _told(repo):
        operations = [CommitOperationAdd(file.name, file) for file in files]
        if not any(file.name == CARD for file in files):
            card = Path(folder) / CARD
            card.write_text(text, encoding="utf-8")
            operations.append(CommitOperationAdd(CARD, card))
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.create_commit(repo, operations, commit_message=message, revision=revision)
    return str(done.commit_url)


def pull(repo: str, folder: str | Path, *, revision: str | None = None, overwrite: bool = False) -> str:
    """Download the adapter in ``repo`` into ``folder``.

    Returns: the name of its format. Offline (HF_HUB_OFFLINE=1) what was downloaded before is copied.

    Raises: HubError: no such repository, or the Hub cannot be reached. FormatError: it holds no adapter; nothing is
    then written.
    """
    import shutil

    from huggingface_hub import snapshot_download

    from .formats.files import write_folder

    folder = Path(folder)
    _check_repo(repo)
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise FormatError(f"{folder}: is there already", "Choose another folder, or add --force.")
    with _told(repo):
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=_NOT_ADAPTER)
    snapshot = Path(snapshot)
    single = [f for f in snapshot.iterdir() if f.suffix in (".gguf", ".nemo")]
    where = single[0] if len(single) == 1 and not (snapshot / "adapter_config.json").exists() else snapshot
    format = detect_format(where)

    def copy(temporary: Path) -> None:
        for file in snapshot.rglob("*"):
            if file.is_file():
                target = temporary / file.relative_to(snapshot)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)

    write_folder(folder, copy)
    return format


def _files(folder: Path, format: str) -> list[Path]:
    """The adapter's own files, and a card that the user wrote; checkpoints and states of training stay here."""
    form = FORMATS[format]
    names = {file.name for file in form.files(folder)} | {CARD, "adapter_model.bin", "adapters.npz"}
    found = [folder / name for name in sorted(names) if (folder / name).is_file()]
    if not found:
        raise FormatError(f"{folder}: holds no file of {format} at its top", "Name the folder of one adapter.")
    return found


def _training(path: Path) -> dict[str, Any]:
    """What the folder's config tells of the training."""
    try:
        raw = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(raw, dict):
        return {}
    told = raw.get("training") if isinstance(raw.get("training"), dict) else raw
    names = ("data", "iters", "batch_size", "learning_rate", "optimizer", "max_seq_length", "mask_prompt", "seed")
    return {name: told[name] for name in names if told.get(name) is not None}


def model_card(
    facts: dict[str, Any],
    repo: str,
    *,
    base: str | None = None,
    metrics: dict[str, float] | None = None,
    training: dict[str, Any] | None = None,
) -> str:
    """A README.md for the adapter that ``describe`` gave ``facts`` of.

    Names of local folders, of the base or of the data, are left out: they mean nothing to others.
    """
    import yaml

    told = base or facts["base"]
    told = told if told != "not told" and _is_repo(told) else None
    library = {"peft": "peft", "gguf": "gguf"}.get(facts["format"], "mlx")
    head = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["lora", "mlx-lora", facts["method"]],
        **({"base_model": told, "base_model_relation": "adapter"} if told else {}),
    }
    rows = [("Base", told or "see below"), ("Format", facts["format"]), ("Method", facts["method"])]
    for name in ("rank", "scale", "alpha", "dropout"):
        if name in facts:
            value = facts[name]
            rows.append((name.capitalize(), ", ".join(f"{v:g}" for v in value) if isinstance(value, list) else value))
    rows += [("Modules", f"{facts['modules']}: {', '.join(facts['targets'][:12])}"), ("Layers", facts["layers"])]
    rows += [("Parameters", f"{facts['parameters']:,}"), ("Type of numbers", ", ".join(facts["dtype"]))]
    data = dict(training or {})
    if "data" in data and not _is_repo(str(data["data"])):
        data.pop("data")
    name = told or "BASE_MODEL"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {repo.rpartition('/')[2]}\n\nA {facts['method']} adapter for {told or 'a language model'}.\n",
        _table(rows),
    ]
    if data:
        parts.append("## Training\n\n" + _table([(k.replace("_", " "), v) for k, v in data.items()]))
    if metrics:
        parts.append("## Metrics\n\n" + _table([(k, f"{v:g}") for k, v in metrics.items()]))
    parts.append("## Use\n\n" + "\n\n".join(_uses(facts["format"], repo, name)) + "\n")
    return "\n".join(parts)


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + "\n"


def _uses(format: str, repo: str, base: str) -> list[str]:
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


def _is_repo(name: str) -> bool:
    """Whether a name can be a repository's: it must not leak a folder of this machine."""
    return (
        name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).exists() and "\\" not in name
    )


def _check_repo(repo: str) -> None:
    if repo.count("/") != 1 or repo.startswith(("/", ".")) or repo.endswith("/"):
        raise ConfigError(
            f"{repo!r} is no repository's name", "Write it as owner/name, such as mlx-community/my-adapter."
        )


class _told:
    """Turns what huggingface-hub raises into one ``HubError``."""

    def __init__(self, repo: str):
        self._repo = repo

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, _trace) -> bool:
        if error is None or not isinstance(error, Exception) or isinstance(error, (HubError, FormatError)):
            return False
        name, lines = type(error).__name__, str(error).strip().splitlines() or [type(error).__name__]
        if "Offline" in name or "offline" in str(error):
            hint = "HF_HUB_OFFLINE=1 is set; unset it to use the network."
        elif "401" in str(error) or "403" in str(error) or "NotFound" in name:
            hint = "Check the name, and log in with a token that may do this: hf auth login, or HF_TOKEN."
        else:
            hint = "Check the network, and try again."
        raise HubError(f"{self._repo}: {lines[0][:300]}", hint) from error
