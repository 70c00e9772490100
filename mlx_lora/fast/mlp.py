"""MLPs: gate, up and SwiGLU in one launch when decoding; activations recomputed in the backward pass when training.

For SwiGLU, autograd keeps three arrays of the widest size in the model: the sigmoid, its product with the gate, and the
result, which the last projection's adapter needs. Here it keeps only the outputs of the first projections. Both need to
know what an MLP computes between its projections, so they apply only to mlx-lm's classes in ``KNOWN``. For the experts
of a mixture only the activation is recomputed, and its result is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import project
from ..kernels.lora_swiglu import swiglu_launch
from ..kernels.recomputed import recomputed
from ..kernels.registry import enabled, maker
from ..layers.dora import DoRALinear
from ..layers.lora import LoRALinear
from .decode import DecodesLoRA, trained
from .shared_input import SharesInput
from .swap import Changes, keep, kept, plain_class


class Form(NamedTuple):
    """An MLP that computes ``last(f(first(x), ...))``."""

    first: tuple[str, ...]  # names of the projections of its input
    last: str
    f: Callable[..., mx.array]


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


def _halves(joined: mx.array) -> mx.array:
    return swiglu(*mx.split(joined, 2, axis=-1))


def _gelu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.gelu(gate) * up


def _gelu_approx(gate: mx.array, up: mx.array) -> mx.array:
    return nn.gelu_approx(gate) * up


_GATED = ("gate_proj", "up_proj"), "down_proj"
_JOINED = ("gate_up_proj",), "down_proj"
# Classes of mlx_lm.models, as module.Class, by what they compute. A test holds each class against its formula.
_CLASSES = {
    Form(*_GATED, swiglu): """
        Klear.KlearMLP afm7.MLP afmoe.MLP baichuan_m1.MLP bailing_hybrid.MLP bailing_moe.BailingMoeMLP
        bailing_moe_linear.MLP bailing_moe_v3.BailingMLP cohere.MLP cohere2.MLP deepseek.DeepseekMLP
        deepseek_v2.DeepseekV2MLP deepseek_v3.DeepseekV3MLP deepseek_v32.DeepseekV32MLP dots1.Dots1MLP ernie4_5.MLP
        ernie4_5_moe.Ernie4_5_MLP exaone4.MLP exaone_moe.MLP falcon_h1.FalconH1MLP glm4_moe.MLP
        glm4_moe_lite.Glm4MoeLiteMLP granite.MLP granitemoehybrid.GraniteMoeHybridMLP helium.HeliumMLP hunyuan.MLP
        hunyuan_v1_dense.MLP internlm3.MLP jamba.JambaMLP kimi_linear.KimiMLP laguna.MLP lfm2_moe.MLP llama.MLP
        llama4.MLP llama4_text.MLP longcat_flash.LongcatFlashMLP mimo.MLP mimo_v2_flash.MLP minicpm.MLP minicpm3.MLP
        ministral3.MLP muse_glimmer.MLP nanbeige.MLP olmo2.MLP olmo3.Olmo3MLP olmo_hybrid.MLP plamo.MLP qwen2.MLP
        qwen2_moe.MLP qwen3.MLP qwen3_moe.MLP qwen3_next.Qwen3NextMLP seed_oss.MLP stablelm.MLP telechat3.Telechat3MLP
        youtu_llm.YoutuLLMMLP
    """,
    Form(("w1", "w3"), "w2", swiglu): "internlm2.MLP lfm2.MLP",
    Form(("c_fc_0", "c_fc_1"), "c_proj", swiglu): "exaone.MLP",
    Form(("w2", "w1"), "c_proj", swiglu): "qwen.MLP",
    Form(*_JOINED, _halves): "glm.GLMMLP glm4.Glm4MLP phi3.MLP plamo2.MLP plamo3.MLP",
    Form(("input_linear",), "output_linear", _halves): "granitemoehybrid.GraniteMoeHybridSharedMLP",
    Form(*_GATED, _gelu): "gemma.MLP spark2_5.MLP",
    Form(*_GATED, _gelu_approx): "gemma2.MLP gemma3_text.MLP recurrent_gemma.MLPBlock",
    Form(("c_fc",), "c_proj", nn.gelu): "gpt_bigcode.MLP starcoder2.MLP",
    Form(("c_fc",), "c_proj", nn.gelu_approx): "gpt2.MLP",
    Form(("c_fc",), "c_proj", nn.relu2): "nanochat.MLP",
    Form(("dense_h_to_4h",), "dense_4h_to_h", nn.gelu_approx): "gpt_neox.MLP",
    Form(("fc_in",), "fc_out", nn.gelu_approx): "gptj.GPTJMLP",
    Form(("fc1",), "fc2", nn.gelu_approx): "phi.PhiMLP",
    Form(("up_proj",), "down_proj", nn.relu2): "nemotron_h.NemotronHMLP",
}
KNOWN = {f"mlx_lm.models.{name}": form for form, names in _CLASSES.items() for name in names.split()}
# Names in the code of these classes besides their projections. If a version of mlx-lm uses other names, the class is
# unknown.
_WORDS = {"swiglu", "silu", "gelu", "gelu_approx", "relu2", "nn", "mx", "split"}


def form_of(mlp: nn.Module) -> Form | None:
    """What an MLP computes; None for an unknown class, or if this version of mlx-lm has another code."""
    return _form(plain_class(mlp))


@functools.cache
def _form(kind: type) -> Form | None:
    form = KNOWN.get(f"{kind.__module__}.{kind.__name__}")
    if form is None or not set(kind.__call__.__code__.co_names) <= {*_WORDS, *form.first, form.last}:
        return None
    return form


def swiglu_obstacle(mlp: nn.Module, form: Form) -> str | None:
    """Why gate, up and SwiGLU are not one launch when decoding; None if they are."""
    if form.f is not swiglu:
        return "the activation is not SwiGLU of two projections"
    if not enabled("lora_swiglu"):
        return "the kernel lora_swiglu is not used on this GPU"
    gate, up = (mlp[name] for name in form.first)
    if not (isinstance(gate, DecodesLoRA) and isinstance(up, DecodesLoRA)):
        return f"{' and '.join(form.first)} are not both LoRA layers that the kernels decode"
    one, other = gate.decoder(), up.decoder()
    if one.rank != other.rank:
        return f"ranks {one.rank} and {other.rank} differ"
    if one.bias or other.bias:
        return "the projections have biases"
    if (one.form, one.dtype, one.outputs) != (other.form, other.dtype, other.outputs):
        return "the two projections are stored differently"
    return "doubly quantized NF4 has no such kernel" if "nested_absmax" in gate.base else None


class _SwiGLU:
    """The launch settings for gate, up and SwiGLU of an MLP, determined once."""

    def __init__(self, gate: DecodesLoRA, up: DecodesLoRA, last: str):
        self.gate, self.up, self.one, self.other, self.last = gate, up, gate.decoder(), up.decoder(), last
        self._scale = mx.array([gate.scale, up.scale], mx.float32)
        self._offset = mx.array([0, self.one.rank], mx.int32)
        names = [name for name in ("w", "scales", "biases") if name in self.one.names]
        self._names = ("x", *names, *(f"{name}2" for name in names), "u", "b", "b2", "scale", "offset")
        self._launches: dict = {}

    def __call__(self, x: mx.array) -> mx.array:
        """x: [..., in] -> [..., intermediate]."""
        one, gate, up = self.one, self.gate, self.up
        rows, u = x.size // one.inputs, one.shrink(x, [gate["lora_a"], up["lora_a"]])
        launch = self._launches.get(rows)
        if launch is None:
            sizes = rows, one.inputs, one.rank, one.outputs
            launch = swiglu_launch(maker(), self._names, one.form, one.dtype, sizes, u.shape[0])
            self._launches[rows] = launch
        inputs = [x, *one.base(), *self.other.base(), u, gate["lora_b"], up["lora_b"], self._scale, self._offset]
        return launch(inputs, (*x.shape[:-1], one.outputs))


class FastMLP(SharesInput):
    """Mixin for the classes in ``KNOWN``."""

    def __call__(self, x: mx.array) -> mx.array:
        if self._training:
            return _trained(self, x)
        fused = kept(self, "swiglu")
        if fused is None or not _current(fused):
            fused = keep(self, "swiglu", _fused(self))
        if fused is False or not 0 < x.size <= fused.one.most or x.dtype != fused.one.dtype:
            return super().__call__(x)
        return self[fused.last](fused(x))


def _current(fused: Any) -> bool:
    """Whether neither projection has changed since."""
    return fused is False or (kept(fused.gate, "decoder") is fused.one and kept(fused.up, "decoder") is fused.other)


def _fused(mlp: nn.Module) -> _SwiGLU | bool:
    form = form_of(mlp)
    return False if swiglu_obstacle(mlp, form) else _SwiGLU(*(mlp[name] for name in form.first), form.last)


def _trained(mlp: nn.Module, x: mx.array) -> mx.array:
    """The MLP's output. Autograd keeps x and the outputs of the first projections."""
    form = form_of(mlp)
    inputs, last = [mlp[name](x) for name in form.first], mlp[form.last]
    kind = plain_class(last)
    if kind not in (LoRALinear, DoRALinear) or last.dropout._p_1 < 1:
        return last(recomputed(form.f, inputs)[0])
    y, low = recomputed(form.f, inputs, last.lora_a)
    if kind is LoRALinear:
        return trained(last, y, low)
    # DoRA's formula, given x A.
    gain = last.gain().astype(y.dtype)
    out = gain * mx.addmm(project(last.linear, y), low, last.lora_b, alpha=last.scale)
    return out + last.linear.bias if "bias" in last.linear else out


class FastExperts(Changes):
    """Mixin for a mixture's experts, whose activation is a module that all layers of all models share."""

    @property
    def activation(self) -> Callable[..., mx.array]:
        own = self["activation"]
        return functools.partial(_again, own) if self._training else own


def _again(activation: nn.Module, *inputs: mx.array) -> mx.array:
    return recomputed(activation, list(inputs))[0]


def known_activation(experts: nn.Module) -> bool:
    """Whether a module has an ``activation`` of MLX's or mlx-lm's without parameters or random numbers."""
    activation = experts.get("activation")
    known = type(activation).__module__.startswith(("mlx.nn.layers.activations", "mlx_lm.models."))
    return isinstance(activation, nn.Module) and known and not activation.parameters() and not activation.children()
