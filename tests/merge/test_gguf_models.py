"""Merged models as GGUF files, without llama.cpp: what is in the file, and what is refused before weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_lora.merge.export as export_module
from conftest import shake
from mlx_lora.base.names import BaseModel
from mlx_lora.config import AdapterConfig
from mlx_lora.errors import ConfigError, FormatError, ModelError
from mlx_lora.formats import save_adapter
from mlx_lora.formats.gguf_file import read_gguf, write_gguf
from mlx_lora.merge.export import export_merged
from mlx_lora.merge.fuse import fuse
from mlx_lora.merge.gguf import GGUFModel, rounded
from mlx_lora.merge.gguf.modelfile import chat_format
from mlx_lora.merge.gguf.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, GGUFTokenizer
from mlx_lora.model.attach import attach, extract
from mlx_lora.model.loading import load

TINY = Path(__file__).resolve().parents[2] / "mlx_lora/tiny_base"
SIZES = dict(
    vocab_size=1027,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope_theta=500.0,
    eos_token_id=2,
)


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def random_base(folder: Path, *, weights: bool = True, tokenizer=None, **config) -> Path:
    """A tiny random model with the embedded tokenizer, which ``tokenizer`` may change."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    if tokenizer:
        edit(folder / "tokenizer.json", tokenizer)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **config}))
    if weights:
        model = BaseModel(folder).model
        mx.random.seed(3)
        arrays = {name: mx.random.normal(array.shape) for name, array in tree_flatten(model.parameters())}
        if config.get("tie_word_embeddings"):
            arrays.pop("lm_head.weight", None)
        mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


def adapter_for(base: Path, **settings):
    model, _ = load(base, dtype="stored")
    attach(model, AdapterConfig(**{"rank": 2, "scale": 2.0, "num_layers": -1, **settings}))
    shake(model)
    return model, extract(model)


def test_what_is_in_the_file(tmp_path):
    """Read with the gguf package. q is compared with an independent reordering of its rows."""
    import gguf

    base = random_base(tmp_path / "base", attention_bias=True, tie_word_embeddings=False)
    model, adapter = adapter_for(base)
    export_merged(base, adapter, tmp_path / "m.gguf")
    read = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in read.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.type"] == "model"
    assert fields["llama.block_count"] == 2 and fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.vocab_size"] == 1027
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert read.fields["tokenizer.ggml.token_type"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert fields["tokenizer.ggml.token_type"][:4] == [CONTROL] * 4
    assert fields["tokenizer.ggml.tokens"][1024:] == ["[PAD1024]", "[PAD1025]", "[PAD1026]"]
    assert fields["tokenizer.ggml.token_type"][1022:] == [NORMAL, NORMAL, UNUSED, UNUSED, UNUSED]
    assert fields["tokenizer.ggml.merges"][0] == "i m" and len(fields["tokenizer.ggml.merges"]) == 764
    assert fields["tokenizer.ggml.eos_token_id"] == 2 and fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False and fields["tokenizer.ggml.add_eos_token"] is False
    assert "{% generation" not in fields["tokenizer.chat_template"]  # a tag that only transformers knows
    tensors = {t.name: np.array(t.data) for t in read.tensors}
    fuse(model)
    weights = dict(tree_flatten(model.parameters()))
    assert len(tensors) == len(weights)
    for module, tensor, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        for leaf in ("weight", "bias"):
            array = np.array(weights[f"model.layers.1.self_attn.{module}.{leaf}"])
            rows = array.reshape(heads, 2, 4, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            assert (tensors[f"blk.1.{tensor}.{leaf}"] == rows).all()
    assert (tensors["blk.0.ffn_down.weight"] == np.array(weights["model.layers.0.mlp.down_proj.weight"])).all()
    assert (tensors["output.weight"] == np.array(weights["lm_head.weight"])).all()


@pytest.mark.parametrize(("dtype", "kinds"), [
    ("float32", {"F32"}), ("float16", {"F32", "F16"}), ("bfloat16", {"F32", "BF16"}), ("q8_0", {"F32", "F16", "Q8_0"}),
    (None, {"F32", "F16"}),
])  # fmt: skip
def test_types_of_tensors(dtype, kinds, tmp_path):
    import gguf

    base = random_base(tmp_path / "base")
    _, adapter = adapter_for(base)
    if dtype is None:  # that of the model
        arrays = mx.load(str(base / "model.safetensors"))
        mx.save_safetensors(str(base / "model.safetensors"), {k: v.astype(mx.float16) for k, v in arrays.items()})
    notes: list[str] = []
    export_merged(base, adapter, tmp_path / "m.gguf", dtype=dtype, notes=notes)
    read = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert set(read.values()) == kinds
    assert {kind for name, kind in read.items() if "norm" in name} == {"F32"}
    narrow = [note for note in notes if "not multiples of 32" in note]
    assert bool(narrow) == (dtype == "q8_0")  # ffn_down has rows of 48
    assert (read["blk.0.ffn_down.weight"], read["blk.0.ffn_up.weight"]) != ("Q8_0", "F16")


def test_q8_0_is_measured(tmp_path):
    """The reported loss is that of the stored numbers."""
    base = random_base(tmp_path / "base")
    model, adapter = adapter_for(base)
    before = np.array(
        dict(tree_flatten(load(base, dtype="stored")[0].parameters()))["model.layers.0.mlp.up_proj.weight"]
    )
    reports = {r.path: r for r in export_merged(base, adapter, tmp_path / "m.gguf", dtype="q8_0")}
    stored = np.array(read_gguf(tmp_path / "m.gguf")[1]["blk.0.ffn_up.weight"])
    fuse(model)
    exact = np.array(dict(tree_flatten(model.parameters()))["model.layers.0.mlp.up_proj.weight"]) - before
    kept, report = stored - before, reports["model.layers.0.mlp.up_proj"]
    assert report.storage == "q8_0"
    assert report.relative_error == pytest.approx(np.linalg.norm(kept - exact) / np.linalg.norm(exact), rel=0.15)
    cosine = (kept * exact).sum() / np.linalg.norm(kept) / np.linalg.norm(exact)
    assert report.cosine == pytest.approx(cosine, abs=0.02)
    assert reports["model.layers.0.mlp.down_proj"].storage == "float32"  # stored as float16: its rows are too narrow


def test_numbers_beyond_float16_are_refused(tmp_path):
    with pytest.raises(FormatError, match="float16 cannot hold"):
        write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, {"a": mx.array([1e6])}, {"a": "float16"})


def test_tensors_are_freed_when_they_are_written(tmp_path):
    tensors = {str(i): mx.ones((4, 4)) * i for i in range(3)}
    write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, tensors)
    assert not tensors and read_gguf(tmp_path / "x.gguf")[1]["2"].sum().item() == 32


# -- refusals --------------------------------------------------------------------------------------------------------

GEMMA = dict(model_type="gemma2", head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (dict(model_type="olmo2"), "olmo2 models are not written"),
        (dict(rope_traditional=True), "rope_traditional"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic"),
        (
            dict(
                model_type="qwen2",
                rope_scaling={"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8},
            ),
            "scaled as llama3",
        ),
        (dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8), "sliding attention"),
        ({**GEMMA, "query_pre_attn_scalar": 16}, "query_pre_attn_scalar is 16, not 8"),
        (dict(vocab_size=1000), "ids up to 1023, the model's embedding has 1000 rows"),
    ],
)
def test_models_are_refused_by_name_before_weights_are_loaded(config, said, tmp_path):
    base = random_base(tmp_path / "base", weights=False, **config)
    _, adapter = adapter_for(TINY)
    with pytest.raises(FormatError) as error:
        export_merged(base, adapter, tmp_path / "m.gguf")
    assert said in error.value.message and "convert_hf_to_gguf.py" in error.value.hint
    assert not (tmp_path / "m.gguf").exists()


def regex(pattern: str):
    def change(content):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": False}]}

    return change


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (regex(r"\p{L}+|\d{7}"), r"no name for its pre-tokenizer (Split '\\p{L}+|\\d{7}' + ByteLevel; without ignore"),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "no name for its pre-tokenizer (ByteLevel"),
        (lambda c: c["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "changes the text first (Lowercase)"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda c: c["model"].update(merges=[]), "no merges"),
        (lambda c: c.update(pre_tokenizer=METASPACE), "neither byte-level tokens nor the 256 tokens"),
        (
            lambda c: c.update(
                pre_tokenizer={"type": "Sequence", "pretokenizers": [METASPACE, {"type": "Whitespace"}]}
            ),
            "(Whitespace)",
        ),
        (
            lambda c: c.update(model={"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}),
            "its model is WordLevel, not BPE",
        ),
    ],
)
def test_tokenizers_are_refused_by_name(tokenizer, said, tmp_path):
    base = random_base(tmp_path / "base", weights=False, tokenizer=tokenizer)
    with pytest.raises(FormatError) as error:
        GGUFTokenizer(base, 1027)
    assert said in error.value.message and "convert_hf_to_gguf.py" in error.value.hint


def test_a_token_that_llama_cpp_cannot_add_is_refused(tmp_path):
    def change(content):
        special = {"<|pad|>": {"id": "<|pad|>", "ids": [3], "tokens": ["<|pad|>"]}}
        single = [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        content["post_processor"] = {
            "type": "TemplateProcessing", "single": single, "pair": single + single[1:], "special_tokens": special,
        }  # fmt: skip
        content["post_processor"]["pair"] = [*single, {"Sequence": {"id": "B", "type_id": 1}}]

    base = random_base(tmp_path / "base", weights=False, tokenizer=change)
    with pytest.raises(FormatError, match=r"adds <\|pad\|> to a text"):
        GGUFTokenizer(base, 1027)


def test_wrong_dtypes_and_existing_files(tmp_path, monkeypatch):
    _, adapter = adapter_for(TINY)
    with pytest.raises(ConfigError, match="q8_0 is a type of GGUF"):
        export_merged(TINY, adapter, tmp_path / "folder", dtype="q8_0")
    with pytest.raises(ConfigError, match="modelfile is for a GGUF file"):
        export_merged(TINY, adapter, tmp_path / "folder", modelfile=True)
    with pytest.raises(ConfigError, match="one of float32, float16, bfloat16, q8_0, not 'q4_0'"):
        export_merged(TINY, adapter, tmp_path / "m.gguf", dtype="q4_0")
    (tmp_path / "Modelfile").write_text("mine")
    monkeypatch.setattr(export_module, "load", None)  # nothing is loaded before these are refused
    with pytest.raises(FormatError, match="Modelfile: already exists"):
        export_merged(TINY, adapter, tmp_path / "m.gguf", modelfile=True)
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(FormatError, match=r"m\.gguf: already exists"):
        export_merged(TINY, adapter, tmp_path / "m.gguf")


def test_biases_that_llama_cpp_has_no_place_for(tmp_path):
    base = random_base(tmp_path / "base", model_type="qwen2", tie_word_embeddings=True)
    _, adapter = adapter_for(base, lora_bias=True, keys=["mlp.up_proj"])
    with pytest.raises(FormatError, match=r"no tensor for model\.layers\.0\.mlp\.up_proj\.bias"):
        export_merged(base, adapter, tmp_path / "m.gguf")


DEEPSEEK = dict(
    model_type="deepseek_v2",
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    v_head_dim=8,
    qk_nope_head_dim=8,
    n_routed_experts=2,
    n_shared_experts=1,
    num_experts_per_tok=1,
    first_k_dense_replace=2,
    rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "mscale_all_dim": 0},
    moe_intermediate_size=16,
)


@pytest.mark.parametrize(
    ("model", "keys", "settings", "said"),
    [
        (dict(tie_word_embeddings=True), "model.embed_tokens", {"embedding_side": "input"}, "the output head too"),
        (dict(tie_word_embeddings=True), "model.embed_tokens", {}, "the output head too"),
        (DEEPSEEK, "self_attn.q_a_proj", {}, "does not apply a LoRA to this layer of deepseek2"),
        (DEEPSEEK, "lm_head", {}, "does not apply a LoRA to this layer of deepseek2"),
    ],
)
def test_adapters_that_llama_cpp_cannot_apply_are_refused(model, keys, settings, said, tmp_path):
    base = random_base(tmp_path / "base", **model)
    _, adapter = adapter_for(base, keys=[keys], **settings)
    with pytest.raises(FormatError, match=said):
        save_adapter(adapter, tmp_path / "a.gguf", "gguf", base=base)


# -- tokenizers ------------------------------------------------------------------------------------------------------


def as_sentencepiece(content: dict) -> None:
    """A small tokenizer like Llama 2's."""
    words = ["▁a", "▁ab", "ab", "▁▁", "bc", "abc"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c", *words]
    merges = [["▁", "a"], ["▁a", "b"], ["▁", "ab"], ["a", "b"], ["▁", "▁"], ["b", "c"], ["a", "bc"], ["ab", "c"]]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    added = {**content["added_tokens"][0], "normalized": False}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    content["pre_tokenizer"] = content["post_processor"] = content["decoder"] = None
    content["model"] = {
        "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "merges": merges,
        "vocab": {text: i for i, text in enumerate(texts)},
    }  # fmt: skip
    content["added_tokens"] = [{**added, "id": i, "content": text} for i, text in enumerate(texts[:3])]
    content["added_tokens"].append({**added, "id": len(texts), "content": "x▁y", "special": False})
    content["added_tokens"].append({**added, "id": texts.index("▁▁"), "content": "▁▁", "special": False})


def test_sentencepiece_tokens_types_and_scores(tmp_path):
    made = GGUFTokenizer(random_base(tmp_path / "base", weights=False, tokenizer=as_sentencepiece), 280)
    pairs = {name.removeprefix("tokenizer.ggml."): value for name, value in made.pairs.items()}
    kinds = dict(zip(pairs["tokens"], pairs["token_type"], strict=True))
    assert pairs["model"] == "llama" and pairs["add_space_prefix"] is True and pairs["unknown_token_id"] == 0
    assert (
        kinds["<unk>"] == UNKNOWN
        and kinds["</s>"] == CONTROL
        and kinds["<0x0A>"] == BYTE
        and kinds["[PAD275]"] == UNUSED
    )
    assert kinds["x y"] == USER_DEFINED and kinds["▁▁"] == NORMAL
    scores = dict(zip(pairs["tokens"], pairs["scores"], strict=True))
    assert scores["▁a"] > scores["▁ab"] > scores["ab"] > scores["bc"] > scores["abc"]
    assert not any("may merge" in note for note in made.notes)


@pytest.mark.parametrize(
    ("change", "token"),
    [
        (lambda merges: merges.pop(), "abc"),  # ab + c: a rule by scores makes abc of them, the merges do not
        (lambda merges: merges.insert(2, merges.pop(3)), "▁ab"),  # a + b comes between the two ways to ▁ab
    ],
)
def test_merges_that_no_scores_express_are_noted(change, token, tmp_path):
    def uneven(content):
        as_sentencepiece(content)
        change(content["model"]["merges"])

    made = GGUFTokenizer(random_base(tmp_path / "base", weights=False, tokenizer=uneven), 280)
    assert any("may merge 1 of 6 tokens" in note and repr(token) in note for note in made.notes)


def test_added_tokens_without_an_embedding_are_left_out(tmp_path):
    def change(content):
        content["added_tokens"].append({**content["added_tokens"][0], "id": 1024, "content": "<image>"})

    made = GGUFTokenizer(random_base(tmp_path / "base", weights=False, tokenizer=change), 1024)
    assert "<image>" not in made.tokens and len(made.tokens) == 1024
    assert any("left out <image>" in note for note in made.notes)


def test_ids_at_which_generation_stops(tmp_path):
    base = random_base(tmp_path / "base", weights=False)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, 3, 700, 701]}))
    made = GGUFTokenizer(base, 1027)
    ids = [made.pairs[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")]
    assert ids == [2, 3, 700]  # <|endoftext|>, 0, stops llama.cpp by its text
    assert any("does not stop at" in note and repr(made.tokens[701]) in note for note in made.notes)


def test_names_that_change_how_llama_cpp_reads_text(tmp_path):
    """llama.cpp drops spaces after special tokens where it finds "phi3" in the name, and fails without its tokens."""
    made = GGUFTokenizer(random_base(tmp_path / "base", weights=False), 1027)
    assert made.name("my-Phi3-tune") == "my-phi 3-tune" and made.name("mine") == "mine" and not made.notes

    def stripping(content):
        as_sentencepiece(content)
        added = content["added_tokens"]
        for i, (text, strips) in enumerate([("<|endoftext|>", False), ("<|end|>", True), ("<|user|>", True)]):
            added.append({**added[0], "id": 271 + i, "content": text, "rstrip": strips})
        added[2]["rstrip"] = added[3]["rstrip"] = True  # </s> and x▁y

    base = random_base(tmp_path / "phi", weights=False, tokenizer=stripping)
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    made = GGUFTokenizer(base, 280)
    assert made.name("mine") == "mine (phi-3)" and not any("keeps the spaces" in note for note in made.notes)


def test_notes_tell_what_llama_cpp_does_differently(tmp_path):
    def change(content):
        content["normalizer"] = {"type": "NFC"}

    made = GGUFTokenizer(random_base(tmp_path / "base", weights=False, tokenizer=change), 1027)
    assert any("NFC" in note for note in made.notes)
    long = {"type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
    config = dict(model_type="phi3", rope_scaling=long, original_max_position_embeddings=16)
    made = GGUFModel(BaseModel(random_base(tmp_path / "phi3", weights=False, **config)), None, "x", None)
    assert any("up to 16 tokens" in note for note in made.notes)


# -- Modelfile -------------------------------------------------------------------------------------------------------


class Template:
    """A tokenizer that writes chats with a Jinja template."""

    bos_token = "<bos>"

    def __init__(self, template: str | None):
        self.chat_template = template

    def apply_chat_template(self, rows, tokenize, add_generation_prompt):
        import jinja2

        def refuse(message):
            raise jinja2.TemplateError(message)

        made = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).from_string(
            self.chat_template
        )
        return made.render(messages=rows, add_generation_prompt=True, bos_token=self.bos_token, raise_exception=refuse)


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
GEMMA_TURNS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "<start_of_turn>model\n"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            TURNS,
            "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
        ),
        (
            DEFAULT + TURNS,
            "{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}{{ range .Messages }}<|im_s",
        ),
        (GEMMA_TURNS, '{{ $system := .System }}{{ range .Messages }}{{ if ne .Role "system" }}<start_of_turn>{{ if eq'),
        (TURNS.replace("<|im_end|>", "</turn>"), None),
        (TURNS + "<think>\n", None),  # an answer that begins in another way
        ("{% if messages[0].role == 'system' %}?{% endif %}" + TURNS, None),
        (None, None),
    ],
)
def test_templates_for_ollama(template, expected):
    found = chat_format(Template(template))
    assert (found is None) == (expected is None)
    if found:
        assert found[0].go(found[1]).startswith(expected)


def test_modelfile_beside_a_merged_model(tmp_path):
    base = random_base(tmp_path / "base")
    _, adapter = adapter_for(base)
    export_merged(base, adapter, tmp_path / "m.gguf", modelfile=True)
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./m.gguf" and lines[1].startswith('TEMPLATE """{{ range .Messages }}<|im_start|>')
    assert lines[-2:] == ['PARAMETER stop "<|im_start|>"', 'PARAMETER stop "<|im_end|>"']
    edit(base / "tokenizer_config.json", lambda c: c.update(chat_template="{{ messages[0].content }}"))
    notes: list[str] = []
    export_merged(base, adapter, tmp_path / "m.gguf", modelfile=True, overwrite=True, notes=notes)
    assert (tmp_path / "Modelfile").read_text() == "FROM ./m.gguf\n"
    assert any("has no TEMPLATE" in note for note in notes)


def test_rounding_of_zeros_is_no_loss():
    from mlx_lora.merge.fuse import FusedLayer

    report = FusedLayer("a", "float32", 1.0, 0.0, 0.1)
    assert rounded(report, mx.zeros((2, 32))).relative_error == 0


@pytest.mark.parametrize(
    "settings",
    [
        dict(keys=["self_attn.q_proj", "lm_head"]),
        dict(keys=["lm_head"], method="dora"),
        dict(keys=["self_attn.q_proj", "embed_tokens"], embedding_side="input"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_tied_head_that_parts_from_the_embedding_is_written(tmp_path, settings, family):
    import gguf

    extra = dict(query_pre_attn_scalar=8, sliding_window_pattern=2) if family == "gemma3_text" else {}
    base = random_base(tmp_path / "base", model_type=family, head_dim=8, tie_word_embeddings=True, **extra)
    model, adapter = adapter_for(base, **settings)
    export_merged(base, adapter, tmp_path / "m.gguf", dtype="float32")
    fuse(model)
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert np.allclose(tensors["output.weight"], np.array(model.lm_head.weight), atol=1e-5)
    assert np.allclose(tensors["token_embd.weight"], np.array(model.model.embed_tokens.weight), atol=1e-5)
    assert not np.allclose(tensors["output.weight"], tensors["token_embd.weight"], atol=1e-3)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (dict(model_type="llama", hidden_act="relu"), "relu"),
        (
            dict(model_type="mixtral", num_local_experts=2, rope_scaling={"rope_type": "linear", "factor": 2.0}),
            "linear",
        ),
        (
            dict(model_type="gemma3_text", final_logit_softcapping=3.0, sliding_window_pattern=2),
            "final_logit_softcapping",
        ),
        (dict(model_type="gemma3_text", num_hidden_layers=2), "sliding_window_pattern"),
        (dict(model_type="gemma2", attn_logit_softcapping=None), "attn_logit_softcapping"),
    ],
)
def test_a_model_that_mlx_lm_computes_otherwise_is_not_written(tmp_path, config, field):
    base = random_base(tmp_path / "base", weights=False, head_dim=8, query_pre_attn_scalar=8, **config)
    with pytest.raises((FormatError, ModelError), match=field):
        GGUFModel(BaseModel(base), None, "x", None)
