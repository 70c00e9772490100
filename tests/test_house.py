"""The house rules: imports run down only, heavy packages wait, every error has a hint, the package is complete."""

from __future__ import annotations

import ast
import copy
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_lora
from mlx_lora import errors

ROOT = Path(mlx_lora.__file__).parent
# Lower floors first. A module may import from its own room, from floors below, and from rooms on its own floor as long
# as no circle arises.
FLOORS = [
    {"errors", "device", "threads"},
    {"config", "tiny_base"},
    {"adapter", "kernels"},
    {"layers", "data", "base"},
    {"init", "fast", "formats", "training"},
    {"model"},
    {"planning", "merge", "hub", "bench"},
    {"runs"},
    {"serving"},
    {"cli"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
WALLS = {
    "layers": {"fast", "adapter", "formats", "data"},
    "formats": {"layers", "model", "fast", "init", "training"},
    "training": {"layers", "adapter", "formats", "model", "init", "fast"},
    "data": {"layers", "adapter", "base"},
    "base": {"layers", "data"},
}
FILES = [p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem not in ("__init__", "__main__")]


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module as written from the package's root, at the top of the file?)"""
    tree = ast.parse(path.read_text())
    package = ["mlx_lora", *path.relative_to(ROOT).parts[:-1]]
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*parts, *([node.module] if node.module else [])])
            # `from . import x` imports the module x, or a name of the package's own __init__.
            folder = ROOT.joinpath(*name.split(".")[1:])
            for alias in node.names:
                inside = (folder / f"{alias.name}.py").exists() or (folder / alias.name).is_dir()
                found.append((f"{name}.{alias.name}" if inside else name, id(node) in top))
    return found


def rooms_imported(path: Path) -> set[str]:
    """The other rooms that a file imports from."""
    names = {name.split(".")[1] for name, _ in imports(path) if name.startswith("mlx_lora.")}
    return names - {"__version__", room(path)}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A circle among ``arrows``, as the names along it; empty if there is none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(arrows.get(name, ())):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_down_only(path):
    here = room(path)
    for there in rooms_imported(path):
        assert there in FLOOR, f"{path.name} imports {there}: no floor is known for it"
        assert FLOOR[there] <= FLOOR[here], f"{here} imports {there}, which stands above it"
        assert there not in WALLS.get(here, ()), f"{here} must not import {there}"


def test_no_circle_of_rooms():
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        arrows.setdefault(room(path), set()).update(rooms_imported(path))
    assert circle(arrows) == []


def test_no_circle_of_files():
    """Imports at the top of files; those inside functions are covered by the rooms."""
    arrows = {}
    for path in FILES:
        module = ".".join(["mlx_lora", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        arrows[module] = {name for name, top in imports(path) if top and name.startswith("mlx_lora.")} - {module}
    assert circle(arrows) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_top_of_the_package_holds_few_modules():
    names = {p.stem for p in ROOT.glob("*.py")}
    assert names == {"__init__", "__main__", "adapter", "device", "errors", "hub", "threads"}
    rooms = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"} - {"metal"}
    assert rooms <= set(FLOOR), f"no floor is known for {rooms - set(FLOOR)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_wait(path):
    for name, top in imports(path):
        first = name.split(".")[0]
        if first in ("mlx_lm", "transformers", "datasets", "torch"):
            assert not top, f"{path.name} imports {first} at the top"
            assert room(path) not in ("layers", "training", "data", "formats") or first == "datasets"
        if first == "click":
            assert room(path) == "cli", f"click in {path}"
        if room(path) == "cli":
            assert not (top and first in ("mlx", "numpy", "tqdm", "yaml")), f"{path.name} imports {name} at the top"


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"]])
def test_help_does_not_import_mlx(args):
    code = f"import sys; from mlx_lora.cli.main import cli; cli({args!r}, standalone_mode=False); " + (
        "assert not {'mlx.core', 'mlx_lm', 'numpy', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_users_debug_setting_does_not_reach_the_tests():
    code = "import os; os.environ['MLX_LORA_DEBUG'] = '1'; import conftest; assert 'MLX_LORA_DEBUG' not in os.environ"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, ROOT.parent)))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


KINDS = [k for k in vars(errors).values() if inspect.isclass(k) and issubclass(k, errors.MLXLoRAError)]
# What makes or raises an expected error, and where among its arguments the hint stands.
HINTED = {kind.__name__: 1 for kind in KINDS} | {"raise_faults": 1, "need": 1}


def hintless(path: Path) -> list[str]:
    """The calls in a file that make an expected error without a hint, or with an empty one."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        if name not in HINTED or any(isinstance(argument, ast.Starred) for argument in node.args):
            continue
        hints = [*node.args[HINTED[name] :][:1], *(k.value for k in node.keywords if k.arg == "hint")]
        if not hints or (isinstance(hints[0], ast.Constant) and not str(hints[0].value or "").strip()):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:100]}")
    return found


def test_every_expected_error_has_a_hint():
    assert [call for path in ROOT.rglob("*.py") for call in hintless(path)] == []


@pytest.mark.parametrize("text", ['ConfigError("no")', 'errors.DataError("no", " ")', 'raise_faults(faults, "", Kind)'])
def test_an_error_without_a_hint_is_found(text, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "file.py").write_text(f"raise {text}")
    assert hintless(tmp_path / "file.py") == [f"file.py:1: {ast.unparse(ast.parse(text))}"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_holds_its_message_and_hint(kind):
    assert inspect.signature(kind).parameters["hint"].default is inspect.Parameter.empty
    with pytest.raises(AssertionError, match="without a hint"):
        kind("no", " ")
    error = kind("no", "Say yes.")
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(twin), twin.message, twin.hint, str(twin)) == (kind, "no", "Say yes.", "no\nHint: Say yes.")


def test_every_public_name_is_there():
    for name in mlx_lora.__all__:
        assert getattr(mlx_lora, name) is not None
