"""Rewrites Metal source for ``mx.fast.cuda_kernel`` by removing or replacing the address spaces. There is no parser.

``metal/cuda.h`` defines Metal's names (positions, barriers, simdgroup operations). Address spaces cannot be macros,
because CUDA's own ``__device__`` is a macro that contains the word ``device``. A kernel follows these rules:

- ``threadgroup`` variables and program-scope ``constant`` tables begin a line. Other address spaces stand before the
  type of a pointer. Any that remains does not compile.
- Every input has at least one dimension: Metal would pass a scalar by reference and CUDA by pointer, without a shape.
- A threadgroup is a whole number of simdgroups: CUDA runs every block in full, while Metal cuts the ones at the edge.
"""

from __future__ import annotations

import re

_RULES = [
    (r"^( *)threadgroup (?=\w+ \w+\[)", r"\1__shared__ "),
    (r"^constant (?=\w+ \w+\[)", "__device__ const "),
    (r"\b(?:device|constant|threadgroup|thread) (?=\w+[*&])", ""),
]


def translate(source: str) -> str:
    """A header or body in CUDA, with the same lines."""
    for pattern, replacement in _RULES:
        source = re.sub(pattern, replacement, source, flags=re.M)
    return source
