"""Every option of every command: it always acts, or it is refused by name where it does not.

``RULES`` names, for each option that can be without effect, a command in which it is. These commands must fail before
a model is loaded, with the option's name in the message.
"""

from __future__ import annotations

import json
import shutil

import click
import pytest

import mlx_lora.model.loading
from mlx_lora.cli.main import cli, main
from mlx_lora.tiny_base import PATH, skill

# Always used, in whatever combination: by command. "*" is for all commands.
# Options of generation that act whatever the others are.
GENERATION = (
    *("max_tokens", "temp", "stop", "extra_eos_token", "prefill_step_size", "max_kv_size", "kv_bits", "logit_bias"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
# Those that need another one.
NEEDY = {
    "top_p": "0.5",
    "min_p": "0.1",
    "top_k": "3",
    "xtc_probability": "0.5",
    "min_tokens_to_keep": "2",
    "xtc_threshold": "0.2",
    "repetition_context_size": "5",
    "presence_context_size": "5",
    "num_draft_tokens": "5",
    "frequency_context_size": "5",
    "kv_group_size": "32",
    "quantized_kv_start": "3",
    "draft_model": "x --kv-bits 4",
}
STARTS = {"generate": "generate --model BASE --prompt x", "chat": "chat --model BASE"}
ALWAYS = {
    "*": {"model", "save_path", "force", "as_json", "config", "seed", "system_prompt", "message", "repo", "folder"},
    "demo": {"output"},
    "train": {
        *("data", "max_seq_length", "text_feature", "prompt_feature", "completion_feature"),
        *(
            "chat_feature",
            "adapter_path",
            "fine_tune_type",
            "keys",
            "optimizer",
            "learning_rate",
            "lr_schedule",
            "warmup",
        ),
        *("iters", "batch_size", "loss", "grad_accumulation_steps", "max_grad_norm", "val_batches", "steps_per_report"),
        *("save_every", "grad_checkpoint", "clear_cache_threshold", "max_skipped_steps", "resume", "train", "test"),
        *("epochs", "keep", "best_by", "metric"),
        "peer_timeout",  # one process has no others to watch; the same YAML file serves one and several
        *("trust_remote_code", "report_to", "report_prompts"),
    },
    "report": {"folders", "output", "open_page"},
    # The settings of train are refused by the same configs; here all of them act on what is planned, or are shown.
    "plan": {param.name for param in cli.get_command(None, "plan").params},
    "test": {
        *("data", "max_seq_length", "text_feature", "prompt_feature", "completion_feature"),
        *("chat_feature", "adapter_path", "batch_size", "loss", "test_batches", "exact_match", "trust_remote_code"),
        "metric",
    },
    "generate": {*GENERATION, "adapter_path", "prompt", "max_tokens_short", "trust_remote_code"},
    "chat": {*GENERATION, "adapter_path", "trust_remote_code"},
    "serve": {
        *("adapters", "host", "port", "api_key", "allow_host", "allow_origin", "batch_size", "queue_size"),
        *("max_tokens_limit", "request_timeout", "body_limit", "adapter_memory", "prompt_cache_size"),
        "runs_dir",
        *("max_tokens", "prefill_step_size", "chat_template_config", "extra_eos_token", "trust_remote_code"),
        *("draft_model", "kv_bits", "temp"),
    },
    "fuse": {"adapter_path", "dequantize", "trust_remote_code"},  # --dequantize of a dense base is a warning
    "quantize": {"mode", "trust_remote_code"},
    "merge": {"adapters", "weights", "to"},
    "convert": {"src", "dst", "to", "source", "allow_lossy"},
    "inspect": {"path", "source"},
    "bench estimate": {"reports", "efficiency", "microseconds"},
    "bench check": {"out", "minutes", "emulate", "tests"},
    "bench kernels": {"size", "rank", "bits", "rows", "iters"},
    "push": {"path", "private", "revision", "source"},  # --private of a public repository: tests/test_hub.py
    "pull": {"revision"},
    "tables": set(),
    "doctor": set(),
}
TRAIN = "train --model BASE --data data --adapter-path new"
FULL, VERA = f"{TRAIN} --fine-tune-type full", f"{TRAIN} --fine-tune-type vera"
FUSE, CONVERT = "fuse --model BASE --adapter-path a --save-path new", "convert a new --model BASE"
SAMPLED = (("top_p", 0.9), ("min_p", 0.1), ("top_k", 5))
# (command, option): commands in which the option would have no effect or contradict another one.
RULES = {
    ("demo", "chat"): ["demo --chat --json"],
    ("demo", "port"): ["demo --port 8081"],
    ("demo", "no_browser"): ["demo --no-browser"],
    ("serve", "upload_limit"): ["serve --model BASE --upload-limit 5000"],
    ("train", "mask_turns"): [f"{TRAIN} --mask-turns last"],
    ("train", "rank"): [f"{FULL} --rank 8", f"{TRAIN} --keys none --modules-to-save norm --rank 4"],
    ("train", "scale"): [f"{TRAIN} --alpha 32 --scale 2", f"{VERA} --scale 2", f"{FULL} --scale 2"],
    ("train", "alpha"): [f"{TRAIN} --scale 20 --alpha 8", f"{VERA} --alpha 2", f"{FULL} --alpha 2"],
    ("train", "rslora"): [f"{TRAIN} --rslora", f"{FULL} --rslora"],
    ("train", "dropout"): [f"{FULL} --dropout 0.1"],
    ("train", "target_parameters"): [f"{FULL} --target-parameters mlp.experts.down_proj"],
    ("train", "num_layers"): [f"{TRAIN} --num-layers 16 --layers-to-transform 1", f"{TRAIN} --num-layers 99"],
    ("train", "layers_to_transform"): [f"{FULL} --layers-to-transform 1"],
    ("train", "rank_pattern"): [
        f"{TRAIN} --rank-pattern foo=3",
        f"{VERA} --rank-pattern q_proj=3",
        f"{TRAIN} --rank-pattern .*proj=2 --rank-pattern q_proj=3",
    ],
    ("train", "scale_pattern"): [
        f"{TRAIN} --scale-pattern v_porj=3",
        f"{TRAIN} --keys q_proj --scale-pattern v_proj=3",
    ],
    ("train", "alpha_pattern"): [
        f"{TRAIN} --alpha-pattern v_porj=3",
        f"{TRAIN} --scale-pattern v_proj=3 --alpha-pattern v_proj=3",
        f"{TRAIN} --scale-pattern .*_proj=3 --alpha-pattern v_proj=3",
    ],
    ("train", "feedforward_modules"): [f"{TRAIN} --feedforward-modules up_proj"],
    ("train", "init"): [f"{TRAIN} --init loftq", f"{VERA} --init gaussian", f"{FULL} --init gaussian"],
    ("train", "init_batches"): [f"{TRAIN} --init-batches 2"],
    ("train", "eva_rho"): [f"{TRAIN} --eva-rho 2"],
    ("train", "eva_tau"): [f"{TRAIN} --init lora_ga --eva-tau 0.5"],
    ("train", "init_reference"): [f"{TRAIN} --init-reference other"],
    ("train", "bias"): [f"{FULL} --bias all"],
    ("train", "lora_bias"): [f"{TRAIN} --fine-tune-type dora --lora-bias"],
    ("train", "modules_to_save"): [f"{FULL} --modules-to-save norm", f"{TRAIN} --modules-to-save nrom_x"],
    ("train", "trainable_token_indices"): [f"{FULL} --trainable-token-indices embed_tokens=1"],
    ("train", "embedding_side"): [f"{FULL} --embedding-side input"],  # and tests/model/test_unused.py
    ("train", "projection_prng_key"): [f"{TRAIN} --projection-prng-key 5"],
    ("train", "save_projection"): [f"{TRAIN} --no-save-projection"],
    ("train", "d_initial"): [f"{TRAIN} --d-initial 0.5"],
    ("train", "optimizer_config"): [
        f"{TRAIN} --optimizer-config '{{\"adamw\": {{\"eps\": 1e-6}}}}'",
        f"{TRAIN} --optimizer-config '{{\"adam\": {{\"epps\": 1e-6}}}}'",
    ],
    ("train", "lr_schedule"): [f"{TRAIN} --lr-schedule cosin"],
    ("train", "learning_rate"): [
        f"{TRAIN} --learning-rate 1e-3 --lr-schedule '{{\"name\": \"cosine_decay\", \"arguments\": [1e-4, 5]}}'"
    ],
    ("train", "loraplus_lr_ratio"): [f"{VERA} --loraplus-lr-ratio 4", f"{FULL} --loraplus-lr-ratio 4"],
    ("train", "loraplus_lr_embedding"): [f"{TRAIN} --loraplus-lr-embedding 1e-6"],
    ("train", "loraplus_weight_decay"): [f"{TRAIN} --loraplus-weight-decay 0.1"],
    ("train", "steps_per_eval"): [f"{TRAIN} --val-batches 0 --steps-per-eval 5"],
    ("train", "pack"): [f"{TRAIN} --pack --no-train --test", f"{TRAIN} --pack --loss dpo"],
    ("train", "cache_prefix"): [f"{TRAIN} --cache-prefix memory --pack", f"{TRAIN} --cache-prefix memory --loss dpo"],
    ("train", "yes"): [f"{TRAIN} --yes"],
    ("train", "resume_adapter_file"): [
        f"{TRAIN} --resume-adapter-file a/adapters.safetensors --init gaussian",
        f"{TRAIN} --resume-adapter-file peft/adapter_model.safetensors",
        f"{TRAIN} --resume-adapter-file a",
    ],
    ("train", "iters"): [f"{TRAIN} --iters 20 --epochs 2", f"{TRAIN} --iters 1000 --epochs 2", f"{TRAIN} --iters 0"],
    ("train", "epochs"): [f"{TRAIN} --iters 20 --epochs 2", f"{TRAIN} --epochs 0", f"{TRAIN} --epochs -1"],
    ("train", "patience"): [
        f"{TRAIN} --patience 2 --val-batches 0",
        f"{TRAIN} --patience 2 --iters 600",
        f"{TRAIN} --patience -1",
    ],
    ("train", "keep"): [f"{TRAIN} --keep 0"],
    ("train", "best_by"): [
        f"{TRAIN} --best-by rouge_l",
        f"{TRAIN} --metric exact_match --best-by exact_match --val-batches 0",
    ],
    ("train", "metric"): [
        f"{TRAIN} --metric rouge",
        f"{TRAIN} --metric exact_match --val-batches 0",
        f"{TRAIN} --metric nowhere.py:f",
        f"{TRAIN} --metric exact_match,exact_match",
    ],
    ("train", "metric_rows"): [f"{TRAIN} --metric-rows 4", f"{TRAIN} --metric exact_match --metric-rows 0"],
    ("train", "metric_max_tokens"): [f"{TRAIN} --metric-max-tokens 4"],
    ("train", "valid_split"): [f"{TRAIN} --no-train --test --valid-split 0.1"],
    ("test", "metric"): ["test --model BASE --data data --metric rouge"],
    ("test", "metric_rows"): ["test --model BASE --data data --metric-rows 4"],
    **{(line.split()[0], "checkpoint"): [line] for line in (
        "test --model BASE --data data --adapter-path a --checkpoint best",
        "generate --model BASE --prompt x --checkpoint best",
        "chat --model BASE --adapter-path a --adapter-path run --checkpoint 2",
        f"{FUSE} --checkpoint 100",
        "convert peft new --to mlx-lm --checkpoint last",
        "inspect a --checkpoint best",
        "push a me/x --checkpoint 5",
        "merge a a --checkpoint best",
        "doctor --model BASE --adapter-path run --checkpoint 7",
    )},
    **{
        (command, option): [f"{start}{named} --{option.replace('_', '-')} 0.3" for named in ("", f" --loss {loss}")]
        for command, start in (("train", TRAIN), ("test", "test --model BASE --data data"))
        for option, loss in {
            "beta": "cross_entropy", "label_smoothing": "ipo", "simpo_gamma": "cpo", "cpo_alpha": "dpo",
            "desirable_weight": "dpo", "undesirable_weight": "orpo",
        }.items()
    },
    ("train", "mask_prompt"): [f"{TRAIN} --loss dpo --mask-prompt"],
    ("test", "mask_prompt"): ["test --model BASE --data data --loss dpo --mask-prompt"],
    ("train", "test_batches"): [f"{TRAIN} --test-batches 5"],
    ("train", "project_name"): [f"{TRAIN} --project-name x"],
    ("plan", "write"): [
        "plan --model BASE --write run.yaml",
    ],
    ("plan", "processes"): ["plan --model BASE --data data --processes 3"],
    ("test", "mask_turns"): ["test --model BASE --data data --mask-turns last"],
    ("test", "max_tokens"): ["test --model BASE --data data --max-tokens 5"],
    **{
        (command, option): [f"{start} --{option.replace('_', '-')} {value}"]
        for command, start in STARTS.items()
        for option, value in NEEDY.items()
    },
    **{
        (command, "chat_template_config"): [f"{start} --chat-template-config '{{\"tools\": 1}}'"]
        for command, start in STARTS.items()
    },
    ("chat", "prefill_response"): ["chat --model BASE --prefill-response ''"],
    ("generate", "prefill_response"): ["generate --model BASE --prompt x --prefill-response ''"],
    ("generate", "prompt_cache_file"): ["generate --model BASE --prompt x --prompt-cache-file nowhere"],
    ("serve", "adapters_dir"): ["serve --model BASE --adapters-dir nowhere"],
    ("serve", "merge"): ["serve --model BASE --merge"],
    ("serve", "pin"): ["serve --model BASE --pin x"],
    ("serve", "num_draft_tokens"): ["serve --model BASE --num-draft-tokens 5"],
    ("serve", "prompt_cache_bytes"): ["serve --model BASE --prompt-cache-bytes 9 --prompt-cache-size 0"],
    **{("serve", name): [f"serve --model BASE --temp 0 --{name.replace('_', '-')} {value}"] for name, value in SAMPLED},
    ("serve", "kv_group_size"): ["serve --model BASE --kv-group-size 32"],
    ("serve", "quantized_kv_start"): ["serve --model BASE --quantized-kv-start 3"],
    ("generate", "system_prompt"): [
        "generate --model BASE --prompt x --system-prompt y --ignore-chat-template",
    ],
    ("generate", "ignore_chat_template"): ["generate --model BASE --prompt x --system-prompt y --ignore-chat-template"],
    ("generate", "adapter_path"): ["generate --model BASE --prompt x --adapter-path nowhere"],
    ("fuse", "bits"): [f"{FUSE} --bits 8", f"{FUSE} --bits 7", f"{FUSE} --bits 8 --dequantize"],
    ("fuse", "dtype"): [f"{FUSE} --bits 8 --dtype float16"],
    ("fuse", "save_path"): ["fuse --model BASE --adapter-path a --save-path . --force"],
    ("quantize", "bits"): ["quantize --model BASE --bits 7", "quantize --model BASE --mode mxfp4 --bits 8"],
    ("quantize", "group_size"): ["quantize --model BASE --mode nvfp4 --group-size 64"],
    ("quantize", "double_quant"): ["quantize --model BASE --double-quant"],
    ("quantize", "loftq_rank"): ["quantize --model BASE --loftq-rank 0"],
    ("quantize", "loftq_iters"): [
        "quantize --model BASE --loftq-iters 2",
        "quantize --model BASE --loftq-rank 2 --loftq-iters 0",
    ],
    ("quantize", "loftq_path"): [
        "quantize --model BASE --loftq-path x",
        "quantize --model BASE --loftq-rank 2 --loftq-path x --save-path x",
    ],
    ("merge", "method"): ["merge a --method cat"],
    ("merge", "density"): ["merge a a --density 0.5", "merge a --density 0.5"],
    ("merge", "sign"): ["merge a a --sign frequency"],
    ("merge", "rank"): ["merge a a --rank 999", "merge a a --method cat --rank 2", "merge a --rank 2"],
    ("merge", "clamp"): ["merge a a --method cat --clamp 0.9"],
    ("merge", "seed"): ["merge a a --seed 3"],
    ("merge", "weights"): ["merge a a --weights 1", "merge a a --weights 0,0"],
    ("convert", "adapter"): [f"{CONVERT} --to peft --adapter x"],
    ("convert", "to"): [f"{CONVERT} --to zip", "convert a peft --to peft", f"{CONVERT} --to lightning"],
    ("convert", "source"): ["convert a new --to peft --from peft", "convert nowhere new --to peft --from peft"],
    ("merge", "to"): ["merge a a --to zip", "merge a a --to peft --save-path peft", "merge a a --to gguf"],
    ("convert", "alpha"): [f"{CONVERT} --to peft --alpha 8"],
    ("convert", "to_alpha"): [f"{CONVERT} --to peft --to-alpha 8", f"{CONVERT} --to merged --to-alpha 8"],
    ("convert", "legacy_scale"): [f"{CONVERT} --to peft --legacy-scale alpha"],
    ("convert", "enable_lora"): [f"{CONVERT} --to peft --enable-lora 1,0,1"],
    ("convert", "moe"): [f"{CONVERT} --to mlx-lm --moe per_expert", f"{CONVERT} --to merged --moe per_expert"],
    ("convert", "profile"): ["convert a new.nemo --model BASE --to nemo --profile serving"],
    ("convert", "dtype"): [f"{CONVERT} --to peft --dtype float16"],
    ("convert", "trust_remote_code"): [f"{CONVERT} --to peft --trust-remote-code"],
    ("convert", "modelfile"): [f"{CONVERT} --to peft --modelfile", f"{CONVERT} --to merged --modelfile"],
    ("convert", "allow_lossy"): [f"{CONVERT} --to merged --allow-lossy"],
    ("push", "metrics"): ["push with_card me/x --metric loss=1"],
    ("push", "model"): ["push a me/x --model ."],
    **{("tables", name): [f"tables --{name.replace('_', '-')} {value}".rstrip()] for name, value in {
        "fine_tune_type": "dora", "rank": 4, "keys": "q_proj", "num_layers": 4, "layers_to_transform": 1,
        "rank_pattern": "q=4", "modules_to_save": "norm", "bias": "all", "lora_bias": "", "trust_remote_code": "",
    }.items()},
    ("doctor", "adapter_path"): ["doctor --adapter-path a"],
    ("doctor", "trust_remote_code"): ["doctor --trust-remote-code"],
}  # fmt: skip


def commands(group: click.Group, prefix: str = ""):
    context = click.Context(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        if isinstance(command, click.Group):
            yield from commands(command, f"{word} ")
        else:
            yield prefix + word, command


def test_every_option_is_in_a_table():
    found = {(name, param.name) for name, command in commands(cli) for param in command.params}
    known = {(name, option) for name, options in ALWAYS.items() for option in options} | set(RULES)
    missing = {(n, o) for n, o in found if (n, o) not in known and o not in ALWAYS["*"]}
    assert not missing, "options of which nobody said when they act"
    gone = {(n, o) for n, o in known if n != "*" and (n, o) not in found}
    assert not gone, "options that are no longer there"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters ``a`` and ``peft`` of the tiny model, ``with_card``, and a data set."""
    import mlx_lora

    root = tmp_path_factory.mktemp("options")
    model, _ = mlx_lora.load(PATH)
    mlx_lora.attach(model, mlx_lora.AdapterConfig(rank=2, keys=["q_proj"]))
    adapter = mlx_lora.extract(model)
    mlx_lora.save_adapter(adapter, root / "a")
    mlx_lora.save_adapter(adapter, root / "peft", "peft")
    mlx_lora.save_adapter(adapter, root / "with_card")
    (root / "with_card" / "README.md").write_text("mine")
    shutil.copytree(root / "a", root / "run")
    shutil.copy(root / "a" / "adapters.safetensors", root / "run" / "0000002_adapters.safetensors")
    (root / "data").mkdir()
    for split in ("train", "valid", "test"):
        text = "".join(json.dumps(row) + "\n" for row in skill.rows(split, 4))
        (root / "data" / f"{split}.jsonl").write_text(text)
    return root


CASES = [(*key, line) for key, lines in RULES.items() for line in lines]


@pytest.mark.parametrize(("command", "option", "line"), CASES, ids=[line for *_, line in CASES])
def test_an_option_without_effect_is_refused_before_a_model_is_loaded(
    command, option, line, folder, monkeypatch, capsys
):
    import shlex

    monkeypatch.chdir(folder)
    loads = []
    monkeypatch.setattr(mlx_lora.model.loading, "load_base", lambda *args, **kwargs: loads.append(args))
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main([str(PATH) if word == "BASE" else word for word in shlex.split(line)])
    out, err = capsys.readouterr()
    assert end.value.code in (1, 2) and not loads and not out, err
    message = err.replace("-", "_")
    names = {"fine_tune_type": ("method", "fine_tune_type"), "model": ("path",), "metrics": ("metrics",)}
    names |= {"adapter_path": ("nowhere", "adapter_path"), "save_path": (".: is the current",)}
    names |= {"loftq_rank": ("loftq_rank",), "enable_lora": ("enable_lora",), "double_quant": ("double quantization",)}
    names |= {"modules_to_save": ("modules_to_save", "no module"), "weights": ("weight",)}
    names |= {"to": ("format", "already", "one file", "cannot be written", "not written")}
    names |= {"source": ("has no", "does not exist")}
    names |= {"resume_adapter_file": ("resume_adapter_file", "no such file")}
    assert any(word in message for word in names.get(option, (option,))), err
    assert "Hint: " in err and "bug" not in err and sorted(folder.rglob("*")) == before
