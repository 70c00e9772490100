"""Losses of preferences against TRL's trainers: the same rows, adapter and batch give the same loss and gradients."""

from __future__ import annotations

import contextlib
import json
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_lora
from conftest import shake
from judges import maker, peft, torch, transformers
from mlx_lora import AdapterConfig, DataConfig, TrainConfig
from mlx_lora.config import preference_of
from mlx_lora.data import tokenize
from mlx_lora.training import evaluate, referenced
from mlx_lora.training.losses import loss_named

trl = pytest.importorskip("trl", minversion="1.16")
datasets = pytest.importorskip("datasets")

TOLERANCE = 1e-5
KEYS, RANK, SCALE = ["q_proj", "v_proj", "down_proj"], 4, 2.0
TEMPLATE = (
    "{{ bos_token }}{% for t in tools or [] %} w{{ 60 + loop.index }}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' %} w40 {{ m.content }} w41{% else %} w42 {{ m.content }} {{ eos_token }} w43{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} w42{% endif %}"
)
# TRL's trainers of CPO and ORPO write one more EOS where the template adds something after it; ours and DPO's do not.
CLOSED = TEMPLATE.replace("{{ eos_token }} w43", "{{ eos_token }}")
LOSSES = ("dpo", "ipo", "orpo", "kto", "simpo", "cpo")
OPTIONS = {  # besides TRL's defaults
    "kto": {"desirable_weight": 1.3, "undesirable_weight": 0.7, "beta": 0.3},
    "simpo": {"simpo_gamma": 1.0, "beta": 2.0, "label_smoothing": 0.1, "cpo_alpha": 0.5},
    "cpo": {"label_smoothing": 0.2, "cpo_alpha": 0.3},
    "orpo": {"beta": 0.4},
    "dpo": {"beta": 0.5},
    "ipo": {"beta": 0.3},
}
LINES: list[str] = []


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "base"
    maker.save_base(maker.make_model("llama", 3), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    tokenizer["post_processor"] = {  # BOS before each text, as Llama's tokenizer adds it
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    yield folder
    print("\n" + "\n".join(LINES))


def words(random, low, high) -> str:
    return " ".join(f"w{k}" for k in random.integers(3, 40, random.integers(low, high)))


def message(role, content) -> dict:
    return {"role": role, "content": content}


def rows_of(shape: str, count: int = 6) -> list[dict]:
    random, found = np.random.default_rng(5), []
    for number in range(count):
        prompt, chosen, rejected = words(random, 2, 7), words(random, 2, 9), words(random, 2, 9)
        if shape == "text":
            found.append({"prompt": prompt + " ", "chosen": "w50 " + chosen, "rejected": "w51 " + rejected})
        elif shape == "implicit text":
            found.append({"chosen": f"{prompt} w50 {chosen}", "rejected": f"{prompt} w51 {rejected}"})
        else:
            asked = [message("user", prompt)]
            if number % 2:
                asked = [message("user", "w7 w8"), message("assistant", "w9"), *asked]
            answers = {"chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}
            if shape == "messages":
                found.append({"prompt": asked, **answers})
            elif shape == "tools":
                tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
                found.append({"prompt": asked, **answers, "tools": json.dumps([tool])})
            else:
                found.append({key: [*asked, *answer] for key, answer in answers.items()})
    return found


def labelled(rows: list[dict]) -> list[dict]:
    """The pairs as rows with labels, in an order in which batches have both kinds."""
    return [
        {**{k: v for k, v in row.items() if k not in ("chosen", "rejected")}, "completion": row[side], "label": label}
        for row in rows
        for side, label in (("chosen", True), ("rejected", False))
    ]


def trainer_of(loss: str, model, tokenizer, rows, folder, options, limit, peft_config=None):
    """TRL's trainer for the loss."""
    options = dict(options)
    if loss == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    elif loss in ("cpo", "simpo"):
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer

        options["loss_type"] = "simpo" if loss == "simpo" else "sigmoid"
        options.setdefault("cpo_alpha", 0.0 if loss == "simpo" else 1.0)
    elif loss == "kto":
        Config, Trainer = trl.KTOConfig, trl.KTOTrainer
    else:
        Config, Trainer = trl.DPOConfig, trl.DPOTrainer
        options["loss_type"] = "ipo" if loss == "ipo" else "sigmoid"
    args = Config(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=len(rows),
        gradient_checkpointing=False, remove_unused_columns=False, max_length=limit, **options,
    )  # fmt: skip
    return Trainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=peft_config,
    )  # fmt: skip


def set_weights(model, ours: dict) -> None:
    """Give PEFT's default adapter the weights of ours."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                path, leaf = name.removeprefix("base_model.model.").split(".lora_")
                parameter.copy_(torch.tensor(np.array(ours[f"{path}.lora_{leaf[0].lower()}"].T)))


def theirs(loss, trainer, batch):
    """(loss, gradients by our names, metrics) of TRL."""
    model = trainer.model.train()
    model.zero_grad()
    if loss in ("orpo", "cpo", "simpo"):
        value, metrics = trainer.get_batch_loss_metrics(model, batch, train_eval="train")
    else:
        value = trainer._compute_loss(model, batch, return_outputs=False)
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    value.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if ".default." in name:
            path, leaf = name.removeprefix("base_model.model.").split(".lora_")
            found[f"{path}.lora_{leaf[0].lower()}"] = parameter.grad.numpy().T
    return value.item(), found, metrics


def compare(loss, base, rows, folder, *, options=None, limit=64, from_adapter=False, template=True):
    options = options or {}
    chat = CLOSED if loss in ("orpo", "cpo", "simpo") else TEMPLATE
    model, tokenizer = mlx_lora.load(base)
    tokenizer.chat_template = chat if template else None
    kind = preference_of(loss).rows
    data = tokenize(rows, tokenizer, DataConfig(max_seq_length=limit), kind=kind)
    mx.random.seed(1)
    mlx_lora.attach(model, AdapterConfig(rank=RANK, scale=SCALE, keys=KEYS, num_layers=-1))
    if from_adapter:
        shake(model, 7)
    start = dict(tree_flatten(model.trainable_parameters()))
    size = len(data)
    data = referenced(model, data, loss, size)
    shake(model, 1)
    ours = dict(tree_flatten(model.trainable_parameters()))

    judge_tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    judge_tokenizer.chat_template = chat if template else None
    judged = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    settings = peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=KEYS, task_type="CAUSAL_LM")
    if from_adapter:
        judged, settings = peft.get_peft_model(judged, settings), None
        set_weights(judged, start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of(loss, judged, judge_tokenizer, rows, folder, options, limit, settings)
    set_weights(trainer.model, ours)
    order = np.arange(size) if kind == "pairs" else np.argsort(data.lengths, kind="stable")
    their_row = np.arange(size).reshape(2, -1).T.ravel() if len(rows) < size else np.arange(size)  # chosen ones first
    examples = [trainer.train_dataset[int(their_row[k])] for k in order]
    if kind == "labels":  # TRL's rotation, in the order of our batch
        answers = [example["completion_ids"] for example in examples]
        examples = [{**e, "KL_completion_ids": a} for e, a in zip(examples, [answers[-1], *answers[:-1]], strict=True)]
    batch = trainer.data_collator(examples)

    mine = data.collate(order, size)
    their_tokens = batch.get("input_ids")
    if their_tokens is None:  # CPO's and ORPO's trainers join both halves later
        sides = [batch[f"{side}_input_ids"].numpy() for side in ("chosen", "rejected")]
        masks = [batch[f"{side}_labels"].numpy() != -100 for side in ("chosen", "rejected")]
        width = max(side.shape[1] for side in sides)
        their_tokens, their_mask = (
            np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in parts]) for parts in (sides, masks)
        )
    else:
        their_tokens, their_mask = their_tokens.numpy(), batch["completion_mask"].numpy() != 0
    width = their_tokens.shape[1]
    assert np.array_equal(mine.tokens[:, :width], their_tokens) and not mine.tokens[:, width:].any()
    assert np.array_equal(mine.mask[:, : width - 1], their_mask[:, 1:]) and not mine.mask[:, width - 1 :].any()

    config = TrainConfig(loss=loss, batch_size=max(2, size), **options)
    function = loss_named(loss, config.preference_options())

    def mean(model):
        total, count, _ = function(model, *(mx.array(array) for array in mine))
        return total / count

    model.train()
    got, gradients = nn.value_and_grad(model, mean)(model)
    gradients = dict(tree_flatten(gradients))
    expected, their_gradients, metrics = theirs(loss, trainer, batch)
    off = abs(got.item() - expected) / abs(expected)
    largest = max(np.abs(g).max() for g in their_gradients.values())
    assert gradients.keys() == their_gradients.keys() and largest > 1e-4
    offs = {}
    for name, gradient in their_gradients.items():
        size_of = np.abs(gradient).max()
        assert size_of > 1e-6 * largest, name
        offs[name] = float(np.abs(np.array(gradients[name]) - gradient).max() / largest)
    measured = evaluate(model, data, size, loss=loss, options=config.preference_options()).metrics
    # A reward is beta times a difference of log-probabilities, and as exact as these are.
    unit = config.beta * max(abs(metrics.get(f"logps/{side}", 0)) for side in ("chosen", "rejected"))
    off_metrics = {name: abs(value - metrics[name]) / max(abs(metrics[name]), unit) for name, value in measured.items()}
    line = (
        f"{loss:6} loss {got.item():.7f} TRL {expected:.7f} off {off:.1e}, gradients (largest {largest:.3f}) off "
        f"{max(offs.values()):.1e}, metrics ({len(off_metrics)}) off {max(off_metrics.values()):.1e}"
    )
    LINES.append(f"{line}  [{folder.name}]")
    assert off <= TOLERANCE, line
    assert max(offs.values()) <= TOLERANCE, line
    assert max(off_metrics.values()) <= TOLERANCE, off_metrics
    return measured


@pytest.mark.parametrize("shape", ["text", "messages"])
@pytest.mark.parametrize("loss", LOSSES)
def test_defaults(loss, shape, base, tmp_path):
    rows = rows_of(shape)
    compare(loss, base, labelled(rows) if loss == "kto" else rows, tmp_path, template=shape != "text")


@pytest.mark.parametrize("loss", LOSSES)
def test_options(loss, base, tmp_path):
    rows = rows_of("messages")
    measured = compare(loss, base, labelled(rows) if loss == "kto" else rows, tmp_path, options=OPTIONS[loss])
    assert measured.get("kl", 1) > 0  # else the term would not be compared


@pytest.mark.parametrize("shape", ["implicit messages", "implicit text", "tools"])
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_formats(loss, shape, base, tmp_path):
    rows = rows_of(shape)
    compare(
        loss,
        base,
        labelled(rows) if loss == "kto" and shape == "tools" else rows,
        tmp_path,
        template="text" not in shape,
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_truncated_rows(loss, base, tmp_path):
    rows = rows_of("messages")
    compare(
        loss,
        base,
        labelled(rows) if loss == "kto" else rows,
        tmp_path,
        limit=16 if loss in ("orpo", "cpo", "simpo") else 12,
    )


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_an_adapter_as_the_reference(loss, base, tmp_path):
    """A run that goes on from a fine-tuned adapter compares with that adapter, here as in TRL."""
    rows = rows_of("messages")
    compare(loss, base, labelled(rows) if loss == "kto" else rows, tmp_path, from_adapter=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_names_and_defaults_are_theirs(loss):
    ours = TrainConfig(loss=loss).preference_options()
    if loss == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
    elif loss in ("cpo", "simpo"):
        from trl.experimental.cpo import CPOConfig as Config
    else:
        Config = trl.KTOConfig if loss == "kto" else trl.DPOConfig
    fields = {name: field.default for name, field in Config.__dataclass_fields__.items()}
    differing = {name for name, value in ours.items() if fields[name] != value}
    assert differing == ({"cpo_alpha"} if loss == "simpo" else set())  # SimPO alone, as TRL's documentation sets it


with contextlib.suppress(ImportError):
    transformers.utils.logging.set_verbosity_error()
