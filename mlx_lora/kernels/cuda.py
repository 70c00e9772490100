"""Metal source to CUDA for ``mx.fast.cuda_kernel``: the address spaces, which are words there. No parser.

The names of Metal (positions, barriers, simdgroup operations) are defined by ``metal/cuda.h``. Address spaces cannot be
macros: CUDA's own ``__device__`` is one that holds the word ``device``. What a kernel keeps to, for both:

- ``threadgroup`` variables and program-scope ``constant`` tables begin a line; other address spaces stand before the
  type of a pointer. A word left over does not compile.
- No input without dimensions: Metal passes a reference, CUDA a pointer, and MLX's arguments would shift at its shape.
- Threadgroups of whole simdgroups: CUDA runs every block whole, Metal cuts those at the edge.
"""

from __future__ import annotations

import re

_RULES = [
    (r"^( *)threadgroup (?=\w+ \w+\[)", r"\1__shared__ "),
    (r"^constant (?=\w+ \w+\[)", "__device__ const "),
    (r"\b(?:device|constant|threadgroup|thread) (?=\w+[*&])", ""),
]


def translate(source: str) -> str:
    """The text of a header or a body in CUDA, line by line as it was."""
    for pattern, replacement in _RULES:
        source = re.sub(pattern, replacement, source, flags=re.M)
    return source
