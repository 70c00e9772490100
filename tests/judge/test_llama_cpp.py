"""llama.cpp as the judge of GGUF files: it loads them, splits text as the tokenizer does and computes MLX's logits.

Tiny random models of every architecture, with the embedded tokenizer and real ones of ../shared. Needs
llama-cpp-python.
"""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from conftest import SHARED, shake
from mlx_lora.config import AdapterConfig
from mlx_lora.formats import save_adapter
from mlx_lora.merge.export import export_merged
from mlx_lora.merge.gguf.pre_tokenizers import BYTES, DIGITS, NAMES, ROUGH, WORDS
from mlx_lora.model.attach import attach, extract
from mlx_lora.model.loading import load, save_model

llama_cpp = pytest.importorskip("llama_cpp")
transformers = pytest.importorskip("transformers")

TINY = Path(__file__).resolve().parents[2] / "mlx_lora/tiny_base"
TOKENIZERS = {
    "tiny": TINY,
    "minimind": SHARED / "data/tokenizers/minimind",
    "qwen2.5": SHARED / "data/tokenizers/qwen2.5",
    "stories": SHARED / "data/stories260K",
}
TEXTS = [
    "Hello world",
    " leading",
    "trailing ",
    "two  spaces, three   spaces,     five",
    "tab\tand\nnewline\n\nand two\r\n  indented\n\n\n    more",
    "It's we'LL I'M they've DON'T 'quoted'",
    "1 12 123 1234 12345 3.14 1,000,000 ٣٤٥ Ⅷ ½",
    "naïve café Übergröße straße ÇA",
    "我想在apple工作1314151天～ 日本語テキスト 한국어",
    "🚀 (normal) 😶‍🌫️ (multiple) 🇩🇪 👩‍👩‍👧",
    "русский текст, ελληνικά, עברית, العربية, हिन्दी, ไทย",
    "if x == y: return {'a': [1, 2], \"b\": None}  # ok != <tag/> && || ~~ ^_^",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<s>a b<unk>c <|endoftext|>d",
    "\u200bzero\u00a0width\u3000wide\ufeff",
    "aaaaaaaaaaaaaaaaaaaa bbbbbbbbbb ............ ======",
    "\x00\x01\x7f control",
    "",
    " ",
    "\n",
]
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=256,
    rope_theta=500.0,
)
HEADS = {**SIZES, "head_dim": 32}
GEMMA_SIZES = {**HEADS, "num_hidden_layers": 7, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1)
LONG = [1.0 + 0.5 * i for i in range(8)]
MODELS = {
    "llama": dict(model_type="llama", **HEADS, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama3": dict(model_type="llama", **SIZES, rope_scaling={"rope_type": "llama3", **LLAMA3}),
    "mistral": dict(model_type="mistral", **SIZES, tie_word_embeddings=False),
    "qwen2": dict(model_type="qwen2", **SIZES, tie_word_embeddings=True),
    "qwen2-yarn": dict(
        model_type="qwen2",
        **SIZES,
        tie_word_embeddings=False,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "qwen2-linear": dict(model_type="qwen2", **SIZES, rope_scaling={"type": "linear", "factor": 4.0}),
    "qwen3": dict(model_type="qwen3", **HEADS, tie_word_embeddings=True),
    "gemma": dict(model_type="gemma", **HEADS),
    "gemma2": dict(model_type="gemma2", **{**GEMMA_SIZES, "num_hidden_layers": 3}, sliding_window=128),
    "gemma3": dict(
        model_type="gemma3_text",
        **GEMMA_SIZES,
        sliding_window=8,
        sliding_window_pattern=6,
        rope_local_base_freq=50.0,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    ),
    "gemma3-pattern": dict(
        model_type="gemma3_text", **GEMMA_SIZES, sliding_window=8, sliding_window_pattern=3, rope_local_base_freq=50.0
    ),
    "gemma3-images": dict(
        model_type="gemma3",
        text_config=dict(model_type="gemma3_text", **GEMMA_SIZES, sliding_window=8, rope_local_base_freq=50.0),
    ),
    "phi3": dict(model_type="phi3", **SIZES, original_max_position_embeddings=256),
    "phi3-long": dict(
        model_type="phi3",
        **SIZES,
        tie_word_embeddings=True,
        original_max_position_embeddings=32,
        rope_scaling={"type": "longrope", "long_factor": LONG, "short_factor": LONG},
    ),
    "mixtral": dict(
        model_type="mixtral", **SIZES, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    ),
    "qwen2_moe": dict(
        model_type="qwen2_moe", **SIZES, **EXPERTS, shared_expert_intermediate_size=64, tie_word_embeddings=False
    ),
    "qwen2_moe-tied": dict(
        model_type="qwen2_moe", **SIZES, **EXPERTS, shared_expert_intermediate_size=64, tie_word_embeddings=True
    ),
    "qwen3_moe": dict(
        model_type="qwen3_moe", **HEADS, **EXPERTS, norm_topk_prob=True, mlp_only_layers=[], tie_word_embeddings=False
    ),
}
# Norm of the difference over norm of the logits. llama.cpp multiplies in the type of the weights.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2, "q8_0": 4e-2}
GEMMA = {"float32": 2e-3, "float16": 8e-3, "bfloat16": 4e-2, "q8_0": 0.12}  # its GELU is a table in float16


def tolerance(name: str, dtype: str) -> float:
    return (GEMMA if name.startswith("gemma") else TOLERANCE)[dtype]


def tokenizer_files(name: str, folder: Path) -> int:
    """Copy a tokenizer and return how many rows its embedding needs."""
    source = TOKENIZERS[name]
    if not source.is_dir():
        pytest.skip(f"no {source}")
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("token*", "vocab.json", "merges.txt", "special_tokens_map.json"):
        for file in source.glob(pattern):
            shutil.copy(file, folder)
    return max(transformers.AutoTokenizer.from_pretrained(folder).get_vocab().values()) + 1


def random_base(folder: Path, config: dict, tokenizer: str = "tiny", padding: int = 3) -> Path:
    """A model folder with random weights, in float32; every norm and bias matters."""
    from mlx_lora.base.names import BaseModel

    rows = tokenizer_files(tokenizer, folder) + padding
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows, "eos_token_id": 2}))
    model = BaseModel(folder).model
    mx.random.seed(7)

    def filled(array: mx.array) -> mx.array:
        scale = 1.0 * array.shape[-1] ** -0.5 if array.ndim > 1 else 0.3
        return (array.ndim == 1) * mx.ones(array.shape) + scale * mx.random.normal(array.shape)

    model.update(tree_map(filled, model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "pt"})
    return folder


def adapter_for(base: Path, keys: list[str] | None = None, **settings):
    model, _ = load(base, dtype="float32")
    settings = {"rank": 4, "scale": 2.0, "num_layers": -1, **({"keys": keys} if keys else {}), **settings}
    attach(model, AdapterConfig(**settings))
    shake(model, size=0.1)
    return model, extract(model)


def opened(path: Path, context: int = 128, **options):
    """The model with keys and values in float32, as MLX has them."""
    exact = dict(type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, logits_all=True, verbose=False)
    return llama_cpp.Llama(str(path), n_ctx=context, n_threads=2, **exact, **options)


def logits_of(llama, ids: list[int]) -> np.ndarray:
    llama.reset()
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)])


def mlx_logits(model, ids: list[int]) -> np.ndarray:
    return np.array(model(mx.array([ids]))[0].astype(mx.float32))


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def greedy(model, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(mlx_logits(model, ids)[-1].argmax()))
    return ids


def greedy_llama(llama, ids: list[int], count: int) -> list[int]:
    made = llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    return [*ids, *itertools.islice(made, count)]


IDS = [5, 17, 200, 33, 7, 60, 64, 2, 3, 90, 411, 8, 8, 19, 300, 77, 12, 5, 99, 100]


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_architecture(name, tmp_path):
    base = random_base(tmp_path / "base", MODELS[name])
    model, adapter = adapter_for(base)
    export_merged(base, adapter, tmp_path / "m.gguf", dtype="float32")
    error = difference(logits_of(opened(tmp_path / "m.gguf"), IDS), mlx_logits(model, IDS))
    print(f"\n{name}: {error:.1e}", end="")
    assert error <= tolerance(name, "float32")


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "qwen3"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_logits_of_every_type(name, dtype, tmp_path):
    base = random_base(tmp_path / "base", MODELS[name])
    model, adapter = adapter_for(base)
    export_merged(base, adapter, tmp_path / "m.gguf", dtype=dtype)
    error = difference(logits_of(opened(tmp_path / "m.gguf"), IDS), mlx_logits(model, IDS))
    print(f"\n{name}, {dtype}: {error:.1e}", end="")
    assert error <= tolerance(name, dtype)


def compare_texts(llama, tokenizer, texts: list[str]) -> list[tuple]:
    wrong = []
    for text in texts:
        got = llama.tokenize(text.encode(), add_bos=True, special=True)
        expected = tokenizer.encode(text)
        if got != expected:
            wrong.append((text, got, expected))
    return wrong


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_text_becomes_the_same_tokens(tokenizer, tmp_path):
    base = random_base(tmp_path / "base", MODELS["llama"], tokenizer)
    _, adapter = adapter_for(base)
    export_merged(base, adapter, tmp_path / "m.gguf", dtype="float16")
    llama, known = opened(tmp_path / "m.gguf"), transformers.AutoTokenizer.from_pretrained(base)
    assert compare_texts(llama, known, TEXTS) == []
    assert llama.token_eos() == known.eos_token_id


def changed_tokenizer(folder: Path, change, source: str = "stories") -> None:
    """A tokenizer of ../shared with another ``tokenizer.json``: ``change`` edits the parsed file."""
    tokenizer_files(source, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def tokenizer_with(steps: tuple[str, ...], ignore_merges: bool, folder: Path) -> None:
    """A byte-level BPE tokenizer, trained on the texts above, with a pre-tokenizer of the table."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    known = {
        WORDS: pre_tokenizers.ByteLevel(add_prefix_space=False),
        BYTES: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        DIGITS: pre_tokenizers.Digits(individual_digits=True),
    }
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [known.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=special, min_frequency=1)
    made.train_from_iterator(TEXTS * 3, trainer)
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("row", NAMES.items(), ids=lambda row: row[1])
def test_every_named_pre_tokenizer_splits_like_the_tokenizer(row, tmp_path, monkeypatch):
    (steps, ignore_merges), name = row
    tokenizer_with(steps, ignore_merges, tmp_path / "tokenizer")
    monkeypatch.setitem(TOKENIZERS, "made", tmp_path / "tokenizer")
    base = random_base(tmp_path / "base", MODELS["llama"], "made")  # transformers gives qwen2 its own splitting
    export_merged(base, adapter_for(base)[1], tmp_path / "m.gguf")
    llama = opened(tmp_path / "m.gguf")
    assert llama.metadata["tokenizer.ggml.pre"] == name
    wrong = compare_texts(llama, transformers.AutoTokenizer.from_pretrained(base), TEXTS)
    if name in ROUGH:  # said in a note
        wrong = [case for case in wrong if case[0].isascii()]
    assert wrong == []


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def gemma_like(content: dict) -> None:
    content["normalizer"], content["pre_tokenizer"] = REPLACE, SPLIT
    for text in ("\n\n", "<start_of_turn>", "<end_of_turn>"):
        content["added_tokens"].append({**content["added_tokens"][0], "id": 512 + len(text), "content": text})
        content["added_tokens"][-1]["special"] = text != "\n\n"


def metaspace(scheme: str):
    def change(content: dict) -> None:
        content["normalizer"] = None
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}

    return change


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (gemma_like, [*TEXTS, "<start_of_turn>user\nhi <end_of_turn>\n\n ok\n\n\nso"]),
        (metaspace("never"), TEXTS),
        (metaspace("always"), [text for text in TEXTS if not text.startswith((" ", "<s>"))]),
        (metaspace("first"), [text for text in TEXTS if not text.startswith((" ", "<s>"))]),
    ],
    ids=["gemma", "never", "always", "first"],
)
def test_sentencepiece_variants(change, texts, tmp_path, monkeypatch):
    changed_tokenizer(tmp_path / "tokenizer", change)
    monkeypatch.setitem(TOKENIZERS, "made", tmp_path / "tokenizer")
    base = random_base(tmp_path / "base", MODELS["llama"], "made")
    export_merged(base, adapter_for(base)[1], tmp_path / "m.gguf")
    known = transformers.AutoTokenizer.from_pretrained(base)
    assert compare_texts(opened(tmp_path / "m.gguf"), known, texts) == []


LAYERS = {
    "llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.down_proj",
    "llama-head": "lm_head",
    "llama-embedding": "model.embed_tokens",
    "qwen2": "self_attn.q_proj mlp.gate_proj mlp.up_proj",
    "mixtral": "block_sparse_moe.gate block_sparse_moe.switch_mlp.gate_proj block_sparse_moe.switch_mlp.down_proj",
    "qwen2_moe": "mlp.gate mlp.shared_expert.up_proj mlp.switch_mlp.up_proj",
    "qwen3_moe": "mlp.gate mlp.switch_mlp.gate_proj",
    "phi3": "self_attn.qkv_proj mlp.gate_up_proj",
    "gemma2": "mlp.up_proj self_attn.o_proj",
    "gemma3": "self_attn.q_proj mlp.down_proj",
}


def without_update(adapter):
    return replace(adapter, weights={name: mx.zeros_like(array) for name, array in adapter.weights.items()})


@pytest.mark.parametrize("name", LAYERS)
def test_adapter_file_on_every_kind_of_layer(name, tmp_path):
    family = name.partition("-")[0]
    base = random_base(tmp_path / "base", MODELS[family])
    model, adapter = adapter_for(base, LAYERS[name].split(), rank=2)
    export_merged(base, without_update(adapter_for(base)[1]), tmp_path / "m.gguf", dtype="float32")
    save_adapter(adapter, tmp_path / "a.gguf", "gguf", base=base)
    llama, expected = opened(tmp_path / "m.gguf", lora_path=str(tmp_path / "a.gguf")), mlx_logits(model, IDS)
    assert difference(logits_of(llama, IDS), expected) <= tolerance(family, "float32")
    plain = opened(tmp_path / "m.gguf")
    assert difference(logits_of(plain, IDS), expected) > 3 * tolerance(family, "float32")  # the adapter matters


PROMPTS = {"stories": "Once upon a time, there was a little", "tiny": "<|im_start|>user\nSay hello<|im_end|>\n"}


def fits(module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("bits", [None, 4])
def test_greedy_answers_of_base_merged_model_and_adapter(name, bits, tmp_path):
    """Trained models: the same tokens as MLX's, from text, for 40 steps."""
    base = TOKENIZERS[name]
    if not base.is_dir():
        pytest.skip(f"no {base}")
    if bits:
        quantized, _ = load(base, dtype="float32")
        nn.quantize(quantized, group_size=32, bits=bits, class_predicate=lambda _, m: fits(m))
        base = save_model(quantized, tmp_path / "base")
    model, adapter = adapter_for(base, scale=2.0)
    plain, _ = load(base, dtype="float32")
    ids = transformers.AutoTokenizer.from_pretrained(base).encode(PROMPTS[name])
    export_merged(base, without_update(adapter), tmp_path / "base.gguf", dtype="float32")
    export_merged(base, adapter, tmp_path / "merged.gguf", dtype="float32")
    save_adapter(adapter, tmp_path / "adapter.gguf", "gguf", base=base)
    expected = {"base": greedy(plain, ids, 40), "merged": greedy(model, ids, 40)}
    assert expected["base"] != expected["merged"]  # the adapter matters
    got = {kind: opened(tmp_path / f"{kind}.gguf") for kind in expected}
    assert got["base"].tokenize(PROMPTS[name].encode(), special=True) == ids
    for kind, llama in got.items():
        assert greedy_llama(llama, ids, 40) == expected[kind], kind
    with_adapter = opened(tmp_path / "base.gguf", lora_path=str(tmp_path / "adapter.gguf"))
    assert greedy_llama(with_adapter, ids, 40) == expected["merged"]
