"""Multi-head latent attention of mlx-lm's models (arXiv:2405.04434) without an array of scores.

Models such as DeepSeek-V3 and Kimi Linear compute the scores of the rotary part of queries and keys separately, and
pass them to attention as a mask of numbers [B, H, L, S]::

    pe_scores = (q_pe * self.scale) @ k_pe.swapaxes(-1, -2)
    pe_scores = mx.where(mask, pe_scores, lowest)
    output = scaled_dot_product_attention(q_nope, k, v, cache=cache, scale=self.scale, mask=pe_scores)

Here this method is recompiled with ``Scores(q_pe, self.scale, k_pe)`` in place of the product. It holds the two
factors, which attention in blocks appends to its queries and keys.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable

import mlx.core as mx


class Scores:
    """The product ``(q * scale) @ k.T``, where ``mask`` is true, that has not been computed."""

    def __init__(self, q: mx.array, scale: float, k: mx.array, mask: mx.array | None = None):
        self.q, self.scale, self.k, self.mask, self.dtype = q, scale, k, mask, q.dtype

    def joined(self, queries: mx.array, keys: mx.array, scale: float) -> tuple[mx.array, mx.array]:
        """Queries and keys whose scaled product is that of the arguments plus this one."""
        k = mx.broadcast_to(self.k, (*keys.shape[:3], self.k.shape[3]))
        return mx.concatenate([queries, self.q * (self.scale / scale)], -1), mx.concatenate([keys, k], -1)


def where(condition, x, y, **options):
    """``mx.where`` that also masks ``Scores``."""
    if isinstance(x, Scores) and x.mask is None:
        return Scores(x.q, x.scale, x.k, condition)
    return mx.where(condition, x, y, **options)


@functools.cache
def rewritten(method: Callable, name: str) -> Callable | None:
    """The method with ``Scores`` for the scores that it passes to the function ``name``; None if it passes none.

    Its globals are a new dictionary, in which ``_scores`` is to be set to a function with the arguments of ``Scores``.
    """
    if method.__closure__ is not None:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError, TypeError):  # no source
        return None
    change = _Change(_masks_of(tree, name))
    tree = ast.fix_missing_locations(change.visit(tree))
    if not change.done:
        return None
    ast.increment_lineno(tree, method.__code__.co_firstlineno - 1)  # tracebacks show mlx-lm's lines
    known = dict(method.__globals__)
    exec(compile(tree, inspect.getfile(method), "exec", dont_inherit=True), known)
    return known[method.__name__]


def _masks_of(tree: ast.AST, name: str) -> set[str]:
    """The variables that are passed to the function as ``mask``."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
    masks = [word.value for call in calls for word in call.keywords if word.arg == "mask"]
    return {value.id for value in masks if isinstance(value, ast.Name)}


class _Change(ast.NodeTransformer):
    def __init__(self, names: set[str]):
        self._names, self.done = names, 0

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if ast.unparse(node.targets[0]) in self._names:
            match node.value:
                case ast.BinOp(
                    left=ast.BinOp(left=q, op=ast.Mult(), right=scale),
                    op=ast.MatMult(),
                    right=ast.Call(func=ast.Attribute(value=k, attr="swapaxes")),
                ):
                    node.value = ast.Call(ast.Name("_scores", ast.Load()), [q, scale, k], [])
                    self.done += 1
        return node
