"""Damaged and hostile files: clear errors; no code is run, no file written, no declared size trusted."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mlx_lora import load_adapter, save_adapter
from mlx_lora.errors import FormatError, MLXLoRAError
from mlx_lora.formats import describe
from mlx_lora.formats.files import parse_yaml
from mlx_lora.formats.gguf_file import read_gguf, write_gguf
from mlx_lora.formats.torch.read import read_torch
from mlx_lora.formats.torch.tars import members
from mlx_lora.formats.torch.write import write_torch

import mlx.core as mx  # isort: skip
import numpy as np

ROOT = Path(__file__).resolve().parents[1] / "fixtures"
BASE = ROOT / "peft/llama/base"
FILES = {
    "loralib": ROOT / "formats/loralib/lora.pt",
    "torchtune": ROOT / "formats/torchtune/adapter_model.pt",
    "lightning": ROOT / "formats/lightning/last.ckpt",
    "deepspeed": ROOT / "formats/deepspeed-chat/pytorch_model.bin",
    "nemo": ROOT / "formats/nemo/adapter.nemo",
    "gguf": ROOT / "formats/gguf/adapter.gguf",
    "peft": ROOT / "peft/llama/dora/adapter_model.safetensors",
}
OPTIONS = {"loralib": {"alpha": 6}, "deepspeed": {"alpha": 6}}


def copy_of(format: str, folder: Path, data: bytes | None = None) -> Path:
    """The adapter with its weights replaced; returns what to load."""
    source = FILES[format]
    for file in source.parent.iterdir():
        if file.is_file():
            shutil.copy(file, folder / file.name)
    if data is not None:
        (folder / source.name).write_bytes(data)
    return folder if format in ("peft", "torchtune") else folder / source.name


def fails(path: Path, format: str) -> str:
    """Loading must raise one of our own errors, whatever the bytes; returns what it says."""
    before = sorted(p.name for p in path.parent.iterdir())
    with pytest.raises(MLXLoRAError) as caught:
        load_adapter(path, format, base=BASE, **OPTIONS.get(format, {}))
    assert sorted(p.name for p in path.parent.iterdir()) == before
    return caught.value.message


@pytest.mark.parametrize("cut", [0.0, 0.02, 0.3, 0.7])
@pytest.mark.parametrize("format", FILES)
def test_cut_files(format, cut, tmp_path):
    data = FILES[format].read_bytes()
    fails(copy_of(format, tmp_path, data[: int(cut * len(data))]), format)


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize(
    "junk", [b"\0" * 4096, b"PK\x03\x04" + b"\xff" * 200, b"\x80\x02" + b"." * 50, b"GGUF" + b"\xff" * 64]
)
def test_junk(format, junk, tmp_path):
    fails(copy_of(format, tmp_path, junk), format)


# -- pickles ---------------------------------------------------------------------------------------------------------


class Calls:
    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def archive(program: bytes, path: Path, entries: dict[str, bytes] | None = None, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as made:
        made.writestr("a/data.pkl", program)
        for name, data in (entries or {}).items():
            made.writestr(name, data)
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("layout", ["zip", "stream"])
def test_pickles_that_call_code_are_refused_by_name_and_not_run(protocol, layout, tmp_path):
    import os

    mark = tmp_path / "ran"
    program = pickle.dumps({"w": Calls(os.system, f"touch {mark}")}, protocol)
    path = tmp_path / "x.pt"
    if layout == "zip":
        archive(program, path)
    else:
        path.write_bytes(
            pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + program
        )
    with pytest.raises(FormatError, match=r"(posix|nt)\.system"):
        read_torch(path)
    with pytest.raises(FormatError):
        load_adapter(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "what",
    [
        Calls(eval, "1"),
        Calls(getattr, {}, "x"),
        Calls(__import__, "os"),
        Calls(bytearray, 10),
        Calls(Path, "/tmp"),
        np.zeros(3),
        np.float64(1),
        complex(1, 2),
        print,
        ValueError("x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_but_tensors_and_containers_is_refused_by_name(what, tmp_path):
    path = archive(pickle.dumps({"w": what}, 2), tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"holds \S+\.\S+; only tensors and plain containers"):
        read_torch(path)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02tR.", "not a complete PyTorch file"),
        (b"\x80\x02ccollections\nOrderedDict\n)Rc__builtin__\neval\n.", "__builtin__.eval"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "refused"),  # calling a name that may only be mentioned
        (b"\x80\x02K\x01)R.", "refused"),
        (b"\x80\x02]K\x01b.", "BUILD"),
        (b"\x80\x02(i__main__\nX\n.", "opcode INST"),
        (b"\x80\x02c__main__\nX\n)\x81.", "__main__.X"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02K\x01Q.", "not a complete PyTorch file"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "not a complete PyTorch file"),
        (b"\x80\x02X\xff\xff\xff\xffabc.", "not a complete PyTorch file"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "not a complete PyTorch file"),
        (b"\x80\x02" + b"(" * 100_000 + b".", "not a complete PyTorch file"),
        (b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.", "'a' twice"),
        (b"", "not a complete PyTorch file"),
    ],
)
def test_pickles_that_are_not_a_state_dict(program, said, tmp_path):
    with pytest.raises(FormatError, match=said):
        read_torch(archive(program, tmp_path / "x.pt"))


def tensor(shape: tuple, strides: tuple, numel: int, offset: int = 0) -> bytes:
    def numbers(values):
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", v) for v in values) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    storage += b"\x8a\x08" + struct.pack("<q", numel) + b"tQ"
    place = b"\x8a\x08" + struct.pack("<q", offset)
    body = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + numbers(shape) + numbers(strides)
    return b"\x80\x02}X\x01\x00\x00\x00w" + body + b"\x89}tRs."


@pytest.mark.parametrize(
    ("shape", "strides", "numel", "offset"),
    [
        ((1 << 40,), (0,), 4, 0),  # four numbers repeated into terabytes
        ((1 << 40, 1 << 30), (1, 1), 4, 0),
        ((4,), (1,), 1 << 40, 0),  # a storage larger than the file
        ((4,), (1,), 4, 2),
        ((4,), (1,), 4, -4),
        ((-4,), (1,), 4, 0),
        ((4,), (-1,), 4, 3),
        ((2, 2), (1 << 60, 1), 4, 0),
        ((2,), (1, 1), 4, 0),
        ((4,), (1,), -4, 0),
    ],
)
def test_tensors_beyond_their_storage(shape, strides, numel, offset, tmp_path):
    path = archive(tensor(shape, strides, numel, offset), tmp_path / "x.pt", {"a/data/0": bytes(16)})
    with pytest.raises(FormatError, match="not a complete PyTorch file"):
        read_torch(path)


def test_a_tensor_within_its_storage(tmp_path):
    """The control of the test above."""
    numbers = np.arange(4, dtype=np.float32)
    path = archive(tensor((2, 2), (1, 2), 4), tmp_path / "x.pt", {"a/data/0": numbers.tobytes()})
    assert read_torch(path)["w"].tolist() == [[0, 2], [1, 3]]


def test_containers_that_would_grow_without_bound(tmp_path):
    """A list of lists of lists, each twice: 2^40 visits, from a hundred bytes."""
    program = b"\x80\x02]q\x000" + b"".join(b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(40)) + b"h%c." % 40
    with pytest.raises(FormatError, match="nested more than"):
        read_torch(archive(program, tmp_path / "x.pt"))
    itself = b"\x80\x02}q\x00X\x01\x00\x00\x00wh\x00s."
    with pytest.raises(FormatError, match="nested more than"):
        read_torch(archive(itself, tmp_path / "y.pt"))


def test_manipulated_zip_archives(tmp_path):
    good, state = tmp_path / "good.pt", {"m.lora_A": mx.ones((2, 4)), "m.lora_B": mx.ones((4, 2))}
    write_torch(good, state)
    with zipfile.ZipFile(good) as archive_of, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as out:
        for name in archive_of.namelist():
            out.writestr(name, archive_of.read(name))
    with pytest.raises(FormatError, match="compressed"):
        read_torch(tmp_path / "packed.pt")
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "twice.pt", "w") as out:
        out.writestr("a/data.pkl", b"\x80\x02}.")
        out.writestr("a/data.pkl", b"\x80\x02}.")
    with pytest.raises(FormatError, match="two entries"):
        read_torch(tmp_path / "twice.pt")
    data = bytearray(good.read_bytes())
    place = data.index(np.ones(8, np.float32).tobytes())
    data[place] ^= 1
    (tmp_path / "flipped.pt").write_bytes(data)
    with pytest.raises(FormatError, match="storage 0 is damaged"):
        read_torch(tmp_path / "flipped.pt")
    archive(b"\x80\x02}.", tmp_path / "big.pt", {"a/byteorder": b"big"})
    with pytest.raises(FormatError, match="big-endian"):
        read_torch(tmp_path / "big.pt")
    archive(b"\x80\x02}.", tmp_path / "paths.pt", {"../../evil": b"x", "/etc/evil": b"x"})
    assert read_torch(tmp_path / "paths.pt") == {}  # nothing is unpacked
    assert not (tmp_path.parent.parent / "evil").exists()


def test_no_name_in_a_file_is_imported(tmp_path):
    """A refused name is never looked up."""
    (tmp_path / "trap_of_test.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(FormatError, match=r"trap_of_test\.Thing"):
            read_torch(archive(b"\x80\x02ctrap_of_test\nThing\n.", tmp_path / "x.pt"))
    finally:
        sys.path.remove(str(tmp_path))
    assert "trap_of_test" not in sys.modules


# -- tar, YAML, NumPy ------------------------------------------------------------------------------------------------


def tar(path: Path, *infos: tarfile.TarInfo, data: bytes = b"") -> Path:
    with tarfile.open(path, "w") as made:
        for info in infos:
            info.size = len(data) if info.isreg() else 0
            made.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil"])
def test_tars_with_members_outside_the_archive(name, tmp_path):
    with pytest.raises(FormatError, match="has a path outside the archive"):
        load_adapter(tar(tmp_path / "x.nemo", tarfile.TarInfo(name)))
    assert [p.name for p in tmp_path.iterdir()] == ["x.nemo"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_tars_with_links_and_devices(kind, tmp_path):
    info = tarfile.TarInfo("model_weights.ckpt")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(FormatError, match="link or a device"):
        load_adapter(tar(tmp_path / "x.nemo", info))


def test_tars_with_a_member_twice_or_a_wrong_size(tmp_path):
    name = "model_config.yaml"
    with pytest.raises(FormatError, match="twice"):
        members(tar(tmp_path / "x.nemo", tarfile.TarInfo(name), tarfile.TarInfo(f"./{name}"), data=b"a: 1"))
    path = tar(tmp_path / "y.nemo", tarfile.TarInfo(name), data=b"a: 1")
    data = bytearray(path.read_bytes())
    data[124:135] = b"77777777777"
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"ends within|not a complete tar"):
        members(path)
    with pytest.raises(FormatError, match=r"no model_weights\.ckpt"):
        load_adapter(tar(tmp_path / "z.nemo", tarfile.TarInfo(name), data=b"a: 1"))
    with pytest.raises(FormatError, match="sharded checkpoint"):
        load_adapter(tar(tmp_path / "s.nemo", tarfile.TarInfo("mp_rank_00/model_weights.ckpt")))


@pytest.mark.parametrize(
    "text", ["a: &x [1]\nb: *x", "!!python/object/apply:os.system [ls]", "[" * 10_000, "- 1", "\xff"]
)
def test_yaml_that_is_not_a_plain_mapping(text):
    with pytest.raises(FormatError):
        parse_yaml(text.encode("latin-1"), "x.yaml")


def test_numpy_archives_with_objects_or_wrong_sizes(tmp_path):
    np.savez(tmp_path / "adapters.npz", w=np.array([Calls(eval, "1")], dtype=object))
    with pytest.raises(FormatError, match="objects"):
        load_adapter(tmp_path, alpha=1)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(tmp_path / "adapters.npz", "w") as made:
        made.writestr("w.npy", buffer.getvalue() + bytes(16))
    with pytest.raises(FormatError, match="size it declares"):
        load_adapter(tmp_path, alpha=1)


# -- GGUF, safetensors -----------------------------------------------------------------------------------------------


def gguf(*parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<I", 3) + b"".join(parts)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gguf(struct.pack("<QQ", 1 << 60, 0)), "declares"),
        (gguf(struct.pack("<QQ", 0, 1 << 60)), "declares"),
        (gguf(struct.pack("<QQ", 0, 1), struct.pack("<Q", 1 << 62)), "ends within"),
        (gguf(struct.pack("<QQ", 0, 1), struct.pack("<Q", 1), b"k", struct.pack("<IIQ", 9, 4, 1 << 50)), "an array of"),
        (gguf(struct.pack("<QQ", 0, 1), struct.pack("<Q", 1), b"k", struct.pack("<I", 99)), "of kind 99"),
        (
            gguf(
                struct.pack("<QQ", 1, 0), struct.pack("<Q", 1), b"t", struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)
            ),
            "outside",
        ),
        (gguf(struct.pack("<QQ", 1, 0), struct.pack("<Q", 1), b"t", struct.pack("<IQIQ", 1, 32, 2, 0)), "of kind 2"),
        (gguf(struct.pack("<QQ", 1, 0), struct.pack("<Q", 1), b"t", struct.pack("<I", 9)), "9 dimensions"),
        (b"GGUF" + struct.pack("<I", 99), "version 99|ends within"),
        (b"ggla" + bytes(100), "does not begin"),
    ],
)
def test_gguf_with_wrong_sizes(data, said, tmp_path):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=said):
        read_gguf(tmp_path / "x.gguf")


def test_gguf_of_a_model_or_with_unknown_tensors(tmp_path):
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, {"token_embd.weight": mx.ones((2, 2))})
    with pytest.raises(FormatError, match="holds a model"):
        load_adapter(tmp_path / "m.gguf")
    told = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    write_gguf(tmp_path / "a.gguf", told, {"blk.0.attn_q.weight.lora_magnitude": mx.ones((2, 2))})
    with pytest.raises(FormatError, match="lora_magnitude: not a tensor"):
        load_adapter(tmp_path / "a.gguf", base=BASE)


def test_gguf_of_all_types(tmp_path):
    arrays = {str(d): mx.random.normal((3, 64)).astype(d) for d in (mx.float32, mx.float16, mx.bfloat16)}
    write_gguf(tmp_path / "x.gguf", {"general.architecture": "b", "c": 7, "d": 0.5}, arrays)
    told, again = read_gguf(tmp_path / "x.gguf")
    assert told == {"general.architecture": "b", "c": 7, "d": 0.5}
    assert all(mx.array_equal(arrays[k], again[k]).item() and arrays[k].dtype == again[k].dtype for k in arrays)


def safetensors(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "data",
    [
        safetensors({Q: {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 16]}}, bytes(16)),
        safetensors({Q: {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}, bytes(16)),
        safetensors({Q: {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, bytes(16)),
        safetensors({Q: {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
        safetensors({Q: {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, bytes(16)),
        safetensors(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": {"dtype": "F32", '
                    b'"shape": [4], "data_offsets": [0, 16]}}', bytes(16)),
        safetensors(b"[" * 100_000),
        safetensors({Q: 5}),
    ],
)  # fmt: skip
def test_safetensors_with_wrong_sizes(data, tmp_path):
    fails(copy_of("peft", tmp_path, data), "peft")


def test_dtypes_and_values_that_cannot_be_weights(tmp_path):
    for value, said in ((mx.zeros((4, 32), mx.int8), "not floats"), (mx.full((4, 32), float("nan")), "NaN")):
        arrays = mx.load(str(FILES["peft"]))
        arrays[Q] = value
        mx.eval(arrays)
        path = copy_of("peft", tmp_path)
        mx.save_safetensors(str(tmp_path / FILES["peft"].name), arrays)
        assert said in fails(path, "peft")
        assert any(said in p for p in describe(path)["problems"])


def test_module_names_never_become_paths(tmp_path):
    """A tensor's name is only ever written into a file, whatever it is."""
    stem = "base_model.model.../../../evil"
    mx.save_safetensors(
        str(tmp_path / "adapter_model.safetensors"),
        {f"{stem}.lora_A.weight": mx.ones((1, 2)), f"{stem}.lora_B.weight": mx.ones((2, 1))},
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    save_adapter(load_adapter(tmp_path), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "adapter_config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapters.safetensors",
    ]
