"""Embeddings with a few trained rows (PEFT's TrainableTokens), and embeddings split from the head tied to them.

The trained rows replace the base's rather than adding to them: the embedding of a token t in ``ids`` is
``trainable_tokens[i]`` with ids[i] = t. A head that is tied to the embedding sees the same rows.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import base_dtype, dense_weight, dims, is_quantized, kind
from ..errors import AdapterError


class TokenRows(nn.Module):
    """An embedding [vocabulary, dim] with n trained rows; ``trainable_tokens``: [n, dim], the base's rows at the start.

    An output head, a linear layer dim -> vocabulary without bias, can have trained rows as well.

    Args:
        base: the embedding or the head, frozen here.
        ids: the tokens, all different.
        dtype: of the rows if the base's storage does not determine it.
    """

    def __init__(self, base: nn.Module, ids: tuple[int, ...], dtype: mx.Dtype = mx.float32):
        super().__init__()
        self._is_head = kind(base) == "linear"
        vocabulary = dims(base)[1 if self._is_head else 0]
        if beyond := [i for i in ids if i >= vocabulary]:
            raise AdapterError(
                f"token ids {', '.join(map(str, beyond))} are beyond the vocabulary of {vocabulary}",
                "Token ids count from 0.",
            )
        base.freeze()
        self.embedding = base
        self.ids = tuple(ids)
        # Position of a token among the rows, -1 if it has none. An underscore keeps it out of the parameters.
        self._position = mx.full((vocabulary,), -1, mx.int32).at[mx.array(ids)].add(mx.arange(1, len(ids) + 1))
        mx.eval(self._position)
        self.trainable_tokens = dense_weight(base)[mx.array(ids)].astype(base_dtype(base) or dtype)

    @property
    def base(self) -> nn.Module:
        return self.embedding

    def __call__(self, x: mx.array) -> mx.array:
        """x: [...] tokens -> [..., dim]; for a head, [..., dim] -> logits [..., vocabulary]."""
        if self._is_head:
            return self._replace_logits(self.embedding(x), x)
        y, position = self.embedding(x), self._position[x]
        return mx.where((position >= 0)[..., None], self.trainable_tokens[mx.maximum(position, 0)], y)

    def as_linear(self, x: mx.array) -> mx.array:
        """x: [..., dim] -> logits [..., vocabulary]."""
        return self._replace_logits(self.embedding.as_linear(x), x)

    def _replace_logits(self, logits: mx.array, x: mx.array) -> mx.array:
        own = x @ self.trainable_tokens.T
        spread = own[..., mx.maximum(self._position, 0)]
        return mx.where(self._position >= 0, spread, logits)

    def merged_weight(self, weight: mx.array) -> mx.array:
        """The base's float32 ``weight`` with the trained rows inserted."""
        weight = mx.array(weight)
        weight[mx.array(self.ids)] = self.trainable_tokens.astype(mx.float32)
        return weight

    def _extra_repr(self) -> str:
        return f"tokens={len(self.ids)}"


class SplitEmbedding(nn.Module):
    """A tied embedding with a separate module for each of its two uses.

    ``embedding`` looks tokens up; ``lm_head`` is a linear layer that computes the logits. Both share the base's arrays
    until one of them is trained or gets an adapter: PEFT adapts and trains them separately, too.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.embedding = base
        self.lm_head = as_head(base)

    def __call__(self, x: mx.array) -> mx.array:
        """x: [...] tokens -> [..., dim]."""
        return self.embedding(x)

    def as_linear(self, x: mx.array) -> mx.array:
        """x: [..., dim] -> logits [..., vocabulary]."""
        return self.lm_head(x)


def as_head(embedding: nn.Module) -> nn.Module:
    """A frozen linear layer dim -> vocabulary that shares the arrays of ``embedding``, dense or quantized."""
    layer = nn.QuantizedLinear if is_quantized(embedding) else nn.Linear
    made = layer.__new__(layer)  # without __init__, which would draw from mx.random
    nn.Module.__init__(made)
    for name in ("weight", "scales", "biases"):
        if name in embedding:
            made[name] = embedding[name]
    for name in ("group_size", "bits", "mode") if is_quantized(embedding) else ():
        setattr(made, name, getattr(embedding, name))
    return made.freeze()
