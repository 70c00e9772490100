"""Settings that contradict each other, have no effect on the model, or are hardly meant."""

from __future__ import annotations

from dataclasses import asdict, replace

import mlx.core as mx
import pytest

from conftest import make_model
from mlx_lora import AdapterConfig, attach, disable_adapter, extract, fuse
from mlx_lora.config import DataConfig, OptimizerConfig, TrainConfig
from mlx_lora.errors import AdapterError, ConfigError


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (dict(alpha=32, scale=2), "alpha 32 and scale 2 contradict"),
        (dict(alpha=16, scale=20.0), "contradict"),  # also where the scale is the default
        (dict(scale_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4}), "both name 'q_proj'"),
        (dict(method="full", rank=8), "rank cannot be used with full"),
        (dict(method="full", scale=20.0, dropout=0.1), "scale cannot be used with full"),
        (dict(method="full", keys=["q_proj"]), "keys cannot be used with full"),
        (dict(method="vera", scale=20.0), "scale cannot be used with vera"),
        (dict(d_initial=0.2), "d_initial is for vera, not for lora"),
        (
            dict(method="dora", projection_prng_key=3, save_projection=False),
            "save_projection is for vera, not for dora",
        ),
        (dict(layers_to_transform=[1], num_layers=16), "num_layers has no effect with layers_to_transform"),
        (dict(init="pissa", eva_rho=2), "eva_rho is for init eva, not for 'pissa'"),
    ],
)
def test_python_configs_refuse_what_contradicts(config, said):
    with pytest.raises(ConfigError, match=said):
        AdapterConfig(**config)


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        (
            OptimizerConfig,
            dict(optimizer_config={"sgd": {"momentum": 0.9}}),
            "sgd has no effect, the optimizer is adam",
        ),
        (OptimizerConfig, dict(learning_rate=1e-3, lr_schedule={"name": "constant", "arguments": [1e-4]}), "no effect"),
        (DataConfig, dict(mask_turns="last"), "no effect without mask_prompt"),
        (DataConfig, dict(data="mine", hf_dataset={"path": "a/b"}), "no effect with hf_dataset"),
        (TrainConfig, dict(val_batches=0, steps_per_eval=10), "no effect where val_batches is 0"),
    ],
)
def test_the_other_configs_do_too(kind, config, said):
    with pytest.raises(ConfigError, match=said):
        kind(**config)


@pytest.mark.parametrize("config", [dict(), dict(alpha=16), dict(method="vera"), dict(method="full", num_layers=2)])
def test_a_valid_config_can_be_copied_and_stored(config):
    config = AdapterConfig(**config)
    assert replace(config) == config == AdapterConfig(**asdict(config))
    assert replace(AdapterConfig(alpha=16, rank=8), rank=16).scale_of("q_proj") == 1.0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (dict(rank_pattern={"q_porj": 2}), "rank_pattern 'q_porj' matches no adapted module; did you mean 'q_proj'?"),
        (dict(scale_pattern={"v_proj": 2}, keys=["q_proj"]), "scale_pattern 'v_proj' matches no adapted module"),
        (dict(rank_pattern={".*_proj": 2, "q_proj": 3}), "an earlier pattern matches model.layers.0.self_attn.q_proj"),
        (dict(alpha_pattern={"q_proj": 2}, scale_pattern={".*q_proj": 3}), "both set its scale"),
        (dict(embedding_side="input"), "embedding_side 'input' has no effect"),
        (dict(keys=(), modules_to_save=["norm"], dropout=0.1), "dropout has no effect where keys is empty"),
        (dict(num_layers=4), "num_layers is 4, but the model has 3 layers"),
    ],
)
def test_attach_refuses_what_has_no_effect_on_the_model(config, said):
    model = make_model()
    with pytest.raises((AdapterError, ConfigError)) as error:
        attach(model, AdapterConfig(**config))
    assert said in error.value.message
    attach(model, AdapterConfig(num_layers=1))  # the model is as before


@pytest.mark.parametrize(
    ("config", "meant"),
    [
        (dict(rank=128, scale=128), "alpha is 16384 at rank 128. You probably meant --alpha 128 (scale 1)."),
        (dict(rank=16, scale=32.0), "You probably meant --alpha 32 (scale 2)."),
        (dict(scale_pattern={"q_proj": -64}), "scale_pattern['q_proj'] -64 is a multiplier"),
        (dict(scale=-1.0), "scale -1 is negative"),
        (dict(rank=8, alpha=-8), "alpha -8 is negative"),
        (dict(rank=8, alpha=1000), "alpha 1000 at rank 8 multiplies the update by 125"),
    ],
)
def test_a_scale_that_can_hardly_be_meant_is_questioned(config, meant):
    (text,) = AdapterConfig(**config).doubts()
    assert meant in text


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(rank=64),  # mlx-lm's default scale, whatever the rank
        dict(rank=16, alpha=32),
        dict(rank=256, alpha=512, rslora=True),
        dict(rank=8, scale=20.0),
        dict(method="vera"),
        dict(method="full"),
    ],
)
def test_what_people_train_with_is_not(config):
    assert AdapterConfig(**config).doubts() == []


def test_a_run_questions_the_scale_before_it_loads_the_model(tmp_path):
    import mlx_lora
    from mlx_lora.runs import Warned

    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    config = AdapterConfig(rank=128, scale=128)
    reports = mlx_lora.run(tmp_path / "a", model="absent/absent", data=DataConfig(data=str(tmp_path)), adapter=config)
    assert isinstance(report := next(reports), Warned) and "--alpha 128" in report.text


def test_nothing_is_fused_inside_disable_adapter():
    model = make_model()
    with pytest.raises(AdapterError, match="no adapter to merge"):
        fuse(model)
    attach(model, AdapterConfig(num_layers=1))
    with disable_adapter(model), pytest.raises(AdapterError, match="no adapter to merge") as error:
        fuse(model)
    assert "after that block" in error.value.hint or "after it" in error.value.hint
    assert fuse(model)


def test_a_dtype_set_inside_disable_adapter_reaches_the_adapter():
    model = make_model()
    attach(model, AdapterConfig(num_layers=1, modules_to_save=["norm"]))
    with disable_adapter(model):
        model.set_dtype(mx.bfloat16)
    dtypes = {array.dtype for array in extract(model).weights.values()}
    assert dtypes == {mx.bfloat16} and model(mx.array([[1, 2]])).dtype == mx.bfloat16


def test_the_hint_for_biases_names_modules_that_have_one():
    model = make_model(attention_bias=True)
    with pytest.raises(AdapterError) as error:
        attach(model, AdapterConfig(bias="lora_only", keys=["up_proj"]))
    assert "Name modules that have one with keys: self_attn.q_proj" in error.value.hint
    with pytest.raises(AdapterError) as error:
        attach(make_model(), AdapterConfig(bias="all"))
    assert error.value.hint == "Leave bias out."
