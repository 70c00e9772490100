"""Metal source to C++ that clang compiles: threadgroup variables, two points of dialect, the entry of a kernel.

The text keeps its line numbers, so that errors name a line of the Metal file.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import mlx.core as mx

HERE = Path(__file__).resolve().parent
MLX_HEADERS = Path(mx.__file__).resolve().parent / "include"

# Attribute of a kernel parameter -> C++ expression of type uint or uint3.
ATTRIBUTES = {
    "thread_position_in_grid": "msl_u3(t->gp)",
    "thread_position_in_threadgroup": "msl_u3(t->tp)",
    "threadgroup_position_in_grid": "msl_u3(t->tgp)",
    "threads_per_threadgroup": "msl_u3(t->tsz)",
    "dispatch_threads_per_threadgroup": "msl_u3(t->dtsz)",
    "threads_per_grid": "msl_u3(t->gsz)",
    "grid_size": "msl_u3(t->gsz)",
    "threadgroups_per_grid": "msl_u3(t->ngroups)",
    "grid_origin": "::metal::vec<uint, 3>{0, 0, 0}",
    "thread_index_in_simdgroup": "t->lane",
    "simdgroup_index_in_threadgroup": "t->sg",
    "thread_index_in_threadgroup": "t->tid",
    "simdgroups_per_threadgroup": "t->nsg",
    "dispatch_simdgroups_per_threadgroup": "t->dnsg",
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "(t->tid & 3)",
    "quadgroup_index_in_threadgroup": "(t->tid / 4)",
    "quadgroups_per_threadgroup": "((t->tsz[0] * t->tsz[1] * t->tsz[2] + 3) / 4)",
    "dispatch_quadgroups_per_threadgroup": "((t->dtsz[0] * t->dtsz[1] * t->dtsz[2] + 3) / 4)",
}


class SourceError(RuntimeError):
    """Source that is no Metal kernel."""


def blank(source: str) -> str:
    """The same length, with comments, strings and preprocessor lines turned into spaces."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:\\\n|[^\n])*'
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group(0)), source, flags=re.S | re.M)


def split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "<([{") - (character in ">)]}")
        if character == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += character
    return [*parts, part]


def rewrite_threadgroup(source: str, keyword: str = "threadgroup", macro: str = "MSL_TGDECL") -> str:
    """``threadgroup T x[N], y;`` (a variable, not a pointer) -> ``MSL_TGDECL(slot, x, T[N]);``"""
    blanked, out, position, slot = blank(source), [], 0, 0
    for match in re.finditer(rf"\b{keyword}\b", blanked):
        if blanked[: match.start()].rstrip()[-1:] not in (";", "{", "}", ""):
            continue
        end, depth = match.end(), 0
        while blanked[end] != ";" or depth:
            depth += (blanked[end] in "[<") - (blanked[end] in "]>")
            if depth == 0 and blanked[end] in "*&(){}=":
                break
            end += 1
        if blanked[end] != ";":
            continue
        body = blanked[match.end() : end]
        parts = split(body)
        first = re.match(r"^(.*?)\b(\w+)\s*((?:\[[^\]]*\]\s*)*)$", parts[0].strip(), re.S)
        if not first or not first.group(1).strip():
            continue
        type_, declarations = first.group(1).strip(), []
        for i, part in enumerate(parts):
            found = first if i == 0 else re.match(r"^()(\w+)\s*((?:\[[^\]]*\]\s*)*)$", part.strip(), re.S)
            declarations.append(f"{macro}({slot}, {found.group(2)}, {type_} {found.group(3)})")
            slot += 1
        text = ("; ".join(declarations) + ";").replace("\n", " ") + "\n" * body.count("\n")
        out.append(source[position : match.start()] + text)
        position = end + 1
    return "".join(out) + source[position:]


def fix_dialect(source: str, constants: dict[str, int]) -> str:
    """What Metal accepts and clang's C++ mode does not, in MLX's headers; the meaning is unchanged."""
    # An array parameter in a named address space is a pointer.
    array = r"((?:constant|device|threadgroup)\s+(?:const\s+)?\w+)\s+(\w+)\[\w*\](?=\s*[,)])"
    source = re.sub(array, r"\1* \2", source)
    # Assignment of a struct between address spaces: clang's implicit operator= has none.
    between = r"\*\(\(threadgroup (\w+)\*\)\((&[^;=]*?)\)\)\s*=(\s*)\*\(\(const device \1\*\)\((&[^;=]*?)\)\);"
    source = re.sub(between, r"::metal::msl_copy((threadgroup \1*)(\2),\3(const device \1*)(\4));", source)
    source = re.sub(r"\[\[\s*threadgroup\(\d+\)\s*\]\]", "", source)
    # Function constants become constants of this build.
    return re.sub(
        r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\((\w+)\)\s*\]\]\s*;",
        lambda m: f"static constexpr {m.group(1)} {m.group(2)} = {int(constants.get(m.group(2), 0))};",
        source,
    )


def translate(source: str, constants: dict[str, int] | None = None) -> str:
    """Metal source as C++ for the headers in ``shim/``."""
    return rewrite_threadgroup(fix_dialect(source, constants or {}))


def flatten(header: str, seen: set[str]) -> str:
    """A header of MLX with its ``#include "mlx/..."`` lines replaced by the files, each once."""
    if header in seen:
        return ""
    path = next((root / header for root in (HERE / "shim", MLX_HEADERS) if (root / header).exists()), None)
    if path is None:
        raise SourceError(f"MLX {mx.__version__} ships no header {header}")
    seen.add(header)
    out = [f'#line 1 "{header}"']
    for number, line in enumerate(path.read_text().split("\n"), 1):
        include = re.match(r'\s*#include\s+"([^"]+)"', line)
        if include:
            inner = flatten(include.group(1), seen)
            out += [inner, f'#line {number + 1} "{header}"'] if inner else [""]
        else:
            out.append("" if "#pragma once" in line else line)
    return "\n".join(out)


@functools.cache
def preamble() -> str:
    """What MLX puts before every custom kernel."""
    return translate("#include <metal_stdlib>\n" + flatten("mlx/backend/metal/kernels/utils.h", set()))


def parameters(source: str, function: str) -> list[tuple[str, str, str, str | None]]:
    """(type, name, attribute, its argument) of each parameter of a kernel function; ``buffer`` is the default."""
    match = None
    pattern = r"(?:\[\[\s*kernel\b[^\]]*\]\]|\bkernel\b)\s+void\s+" + re.escape(function) + r"\s*\("
    for match in re.finditer(pattern, source):  # noqa: B007  the last one counts
        pass
    if match is None:
        raise SourceError(f"no kernel function {function} in the source")
    depth, end = 1, match.end()
    while depth:
        depth += {"(": 1, ")": -1}.get(source[end], 0)
        end += 1
    found = []
    for text in split(re.sub(r"//[^\n]*", "", source[match.end() : end - 1])):
        attribute = re.search(r"\[\[\s*(\w+)(?:\((\w+)\))?", text)
        declaration = re.sub(r"\[\[.*?\]\]", "", text).strip()
        type_, name = re.match(r"^(.*?)(\w+)$", declaration, re.S).groups()
        kind, argument = attribute.groups() if attribute else ("buffer", None)
        found.append((type_.strip(), name, kind, argument))
    return found


def entry(function: str, template: str, parameters: list[tuple[str, str, str, str | None]]) -> str:
    """``msl_entry``, which calls the kernel with its buffers and the position of a thread."""
    arguments, index = [], 0
    for type_, _, attribute, argument in parameters:
        if attribute == "buffer":
            index = int(argument) if argument and argument.isdigit() else index
            holder = "msl_ref_arg" if type_.endswith("&") else "msl_ptr_arg"
            arguments.append(f"::metal::{holder}{{b[{index}]}}")
            index += 1
            continue
        expression, width = ATTRIBUTES[attribute], type_[-1]
        if width in "23":
            arguments.append(expression + {"2": ".xy", "3": ""}[width])
        else:
            is_vector = "u3" in expression or "vec" in expression
            arguments.append(f"{expression}.x" if is_vector else f"({type_}){expression}")
    return (
        '\n#line 1 "<entry>"\nextern "C" __attribute__((visibility("default"))) MSL_RT '
        "void msl_entry(void** b, msl_thread* t) {\n  using namespace metal;\n"
        f"  {function}{template}({', '.join(arguments)});\n}}\n"
    )
