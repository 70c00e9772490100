"""Names of options in older versions of mlx-lm and in its forks, for YAML files and flags.

``translated`` reads each under its new name with a warning, or refuses it and names the new option. Where these names
come from: mlx-lm before 2024-04 (``adapter_file``), before 2024-10 (``lora_layers``, ``use_dora``) and before 2025-08
(``wandb``); mlx-lm-lora (``train_type``, ``train_mode``, earlier ``training_mode``, and its settings for DPO, GRPO and
others); mlx-tune, PEFT and transformers, whose names people write into mlx-lm's files, where mlx-lm ignores them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config import PREFERENCES, TOKENS, preference_of

# Fields of mlx-lm's nested lora_parameters section.
NESTED = ("rank", "scale", "alpha", "rslora", "dropout", "keys", "rank_pattern", "scale_pattern", "alpha_pattern")
RENAMED = {
    "lora_layers": "num_layers",
    "train_type": "fine_tune_type",
    "method": "fine_tune_type",
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "rank"),
    "lora_alpha": "alpha",
    "lora_scale": "scale",
    "lora_dropout": "dropout",
    **dict.fromkeys(("use_rslora", "rs_lora"), "rslora"),
    **dict.fromkeys(("lora_keys", "target_modules", "lora_target_modules", "lora_modules"), "keys"),
    **dict.fromkeys(("steps", "max_steps", "num_steps", "num_iters", "iterations"), "iters"),
    **dict.fromkeys(("num_epochs", "num_train_epochs"), "epochs"),
    "early_stopping_patience": "patience",
    "save_total_limit": "keep",
    "lr": "learning_rate",
    "lr_scheduler": "lr_schedule",
    "warmup_steps": "warmup",
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum_steps"), "grad_accumulation_steps"),
    **dict.fromkeys(("gradient_checkpointing", "use_gradient_checkpointing", "gradient_checkpoint"), "grad_checkpoint"),
    **dict.fromkeys(("max_seq_len", "max_length", "max_sequence_length"), "max_seq_length"),
    **dict.fromkeys(("eval_steps", "eval_every"), "steps_per_eval"),
    **dict.fromkeys(("save_steps", "steps_per_save"), "save_every"),
    "logging_steps": "steps_per_report",
    **dict.fromkeys(("output_dir", "adapter_dir"), "adapter_path"),
    **dict.fromkeys(("model_name", "model_path", "base_model"), "model"),
    **dict.fromkeys(("data_path", "dataset"), "data"),
    "resume_from": "resume_adapter_file",
}
_QUANTIZE = "name a quantized model, or make one: mlx-lora quantize --model MODEL --save-path FOLDER"
_OTHER_TRAINING = "mlx-lora trains on given answers (sft) and on preferences (dpo, ipo, orpo, kto, simpo, cpo)"
# Keys without a counterpart: the values with which they change nothing, and what to do about any other value.
_WITHOUT = {
    **dict.fromkeys(("train_mode", "training_mode"), (("sft", "normal"), _OTHER_TRAINING)),
    "sft_loss_type": (("nll", "chunked_nll"), "choose a loss with the option loss"),
    **dict.fromkeys(("load_in_4bits", "load_in_6bits", "load_in_8bits", "load_in_mxfp4"), ((False,), _QUANTIZE)),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), ((False,), _QUANTIZE)),
    "efficient_long_context": ((False,), "set grad_checkpoint to save memory"),
    "qat_enable": ((False,), "quantize after training: mlx-lora quantize"),
    "weight_decay": ((0,), "write optimizer_config: {adamw: {weight_decay: 0.01}} and optimizer: adamw"),
    "training": ((), "this is the adapter_config.json of a run of mlx-lora; train --resume continues that run"),
    "mlx_lora": ((), "this is the adapter_config.json of a run of mlx-lora; train --resume continues that run"),
}
# The same for settings of mlx-lm-lora that only act with a preference loss.
_WITHOUT_PREFERENCE = {
    "dpo_cpo_loss_type": (("sigmoid",), "choose one of the losses dpo, ipo, orpo, kto, simpo and cpo"),
    "is_reference_free": ((False,), "orpo, simpo and cpo are the losses without a reference"),
    "reference_model_path": ((), "the reference is the model with its adapter off"),
}
# Settings of mlx-lm-lora for training on preferences or rewards, and for quantization-aware training. They do nothing
# in a file that trains on given answers.
_UNUSED = {
    *("reward_scaling", "dpo_cpo_loss_type", "is_reference_free", "delta", "reference_model_path", "judge"),
    *("judge_config", "group_size", "epsilon", "epsilon_high", "max_completion_length", "temperature"),
    *("reward_weights", "reward_functions", "reward_functions_file", "grpo_loss_type", "importance_sampling_level"),
    *("lambda_mse_target", "tau_mse_target", "lambda_mse", "clip_epsilon_logits", "recurrence_chunk_size"),
    *("qat_bits", "qat_group_size", "qat_mode", "qat_start_step", "qat_interval", "lm_studio_name"),
}
# Current and old flags of mlx-lm and its forks that have other names here: what to write instead.
_FLAGS = {
    "adapter-file": "--adapter-path FOLDER",
    "use-dora": "--fine-tune-type dora",
    "wandb": "--report-to wandb --project-name NAME",
    "de-quantize": "--dequantize",
    "export-gguf": "mlx-lora convert ADAPTER model.gguf --to merged --model MODEL",
    "gguf-path": "mlx-lora convert ADAPTER model.gguf --to merged --model MODEL",
    "upload-repo": "mlx-lora push ADAPTER OWNER/NAME for an adapter, or hf upload OWNER/NAME FOLDER for a model",
    "hf-path": "--model",
    "q-bits": "--bits",
    "q-group-size": "--group-size",
    "q-mode": "--mode",
    "mlx-path": "--save-path",
}


def translated(options: dict[str, Any], section: str = "") -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """(options under their current names, faults, {warning: the names it is about}).

    ``section`` stands before the keys in messages.
    """
    options, faults, warnings = dict(options), [], {}
    options.pop("config", None)  # mlx-lm writes it into its adapter_config.json
    foreign = bool(options.keys() & {"train_mode", "train_type", "training_mode"})
    # beta is then mlx-lm-lora's, which writes it for every kind of training
    others = foreign or bool(options.keys() & _UNUSED)

    def put(old: str, new: str, value: Any) -> None:
        if value is None:
            return
        if new in options and options[new] != value:
            faults.append(f"{section}{old} {value!r} contradicts {new} {options[new]!r}: both mean {new}")
            return
        options[new] = value
        warnings[f"{section}{old} is read as {new}: {value!r}."] = new

    for old in [key for key in options if key in RENAMED]:
        put(old, RENAMED[old], options.pop(old))
    without = dict(_WITHOUT)
    for old in ("train_mode", "training_mode"):
        if options.get(old) in PREFERENCES:
            if options[old] == "dpo" and options.get("dpo_cpo_loss_type") == "ipo":
                options[old] = options.pop("dpo_cpo_loss_type")
            put(old, "loss", options.pop(old))
            without |= _WITHOUT_PREFERENCE
    if options.get("reference_model_path") == options.get("model"):
        options.pop("reference_model_path", None)
    for old, (harmless, instead) in without.items():
        if options.get(old) is not None and options[old] not in harmless:
            faults.append(f"{section}{old}: {options[old]!r} is not an option of mlx-lora: {instead}")
        options.pop(old, None)
    if dora := options.pop("use_dora", None):
        put("use_dora", "fine_tune_type", "dora")
    elif dora is False and options.get("fine_tune_type") == "dora":
        faults.append(f"{section}use_dora false contradicts fine_tune_type 'dora'")
    if (file := options.pop("adapter_file", None)) is not None:
        put("adapter_file", "adapter_path", str(Path(file).parent if Path(file).suffix in _WEIGHTS else file))
    if (project := options.pop("wandb", None)) not in (None, False):
        put("wandb", "report_to", "wandb")
        put("wandb", "project_name", project) if isinstance(project, str) else None
    if options.pop("fuse", None):
        warnings[f"{section}fuse: train does not merge; merge the adapter afterwards with mlx-lora fuse."] = "train"
    sft = others and preference_of(options.get("loss", "")).rows == TOKENS
    unused = [
        key
        for key in options
        if key in _UNUSED or (foreign and key == "alpha") or (sft and key == "beta")  # alpha is XPO's there
    ]
    if found := [key for key in unused if options.pop(key) is not None]:
        warnings[f"not used, as they are for other kinds of training: {', '.join(found)}."] = "train"
    return options, faults, warnings


_WEIGHTS = (".npz", ".safetensors")


def did_you_mean(key: str, names: Iterable[str]) -> str:
    """``; did you mean ...?`` if a name is spelled nearly like ``key``; else empty."""
    near = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.8)
    return f"; did you mean {near[0]}?" if near else ""


def instead_of(flag: str, flags: Iterable[str]) -> str | None:
    """What to write instead of a flag of mlx-lm or a fork, such as ``--lora-layers``; None for any other flag.

    Args:
        flags: the command's flags; flags of other commands are not suggested.
    """
    name = flag.lstrip("-")
    renamed = RENAMED.get(name.replace("-", "_"))
    new = f"--{renamed.replace('_', '-')}" if renamed else _FLAGS.get(name)
    own = new and (not new.startswith("--") or new.split()[0].rstrip(",") in flags)
    return new if own else None
