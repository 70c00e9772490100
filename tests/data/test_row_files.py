"""Rows from CSV, TSV, Parquet, Arrow, JSON and compressed files, from folders with them, and faults of files."""

import gzip
import json
import sys

import pytest
from row_tokenizers import CHATML, chat, make_tokenizer

from mlx_lora.config import DataConfig
from mlx_lora.data import load_dataset
from mlx_lora.data.faults import Fault, Place
from mlx_lora.data.files import read_file
from mlx_lora.errors import ConfigError, DataError

ROWS = [{"prompt": 'a "b", c', "completion": "d\ne"}, {"prompt": "f;\tg", "completion": "ü"}]
CALL = {"type": "function", "function": {"name": "area", "arguments": {"side": 2}}}
CHATS = [
    chat("q", "a", "r", "b"),
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}], "tools": [CALL]},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content or '' }}"))


def rows_of(path):
    faults, notes = [], []
    return [row.value for row in read_file(path, faults, notes)], faults, notes


def quoted(rows, mark=","):
    def cell(text):
        return '"' + text.replace('"', '""') + '"'

    lines = [mark.join(rows[0]), *(mark.join(map(cell, row.values())) for row in rows)]
    return "\r\n".join(lines) + "\r\n"


def write_arrow(path, rows, kind):
    arrow = pytest.importorskip("pyarrow")
    keys = dict.fromkeys(key for row in rows for key in row)
    table = arrow.Table.from_pylist([{**keys, **row} for row in rows])
    if kind == "parquet":
        from pyarrow import parquet

        parquet.write_table(table, path)
        return
    make = arrow.ipc.new_file if kind == "file" else arrow.ipc.new_stream
    with arrow.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)


TEXTS = {
    "jsonl": "\n".join(map(json.dumps, ROWS)),
    "json": json.dumps(ROWS),
    "json lines.json": "\n".join(map(json.dumps, ROWS)),
    "indented.json": json.dumps(ROWS, indent=2),
    "list.jsonl": json.dumps(ROWS),
    "object.json": json.dumps({"version": "1", "data": ROWS}),
    "csv": quoted(ROWS),
    "bom.csv": "\ufeff" + quoted(ROWS),
    "semicolons.csv": quoted(ROWS, ";"),
    "tsv": quoted(ROWS, "\t"),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("zipped", [False, True])
def test_text_files(name, zipped, tmp_path):
    path = tmp_path / (name if "." in name else f"rows.{name}")
    data = TEXTS[name].encode()
    path = path.with_name(f"{path.name}.gz") if zipped else path
    path.write_bytes(gzip.compress(data) if zipped else data)
    rows, faults, notes = rows_of(path)
    assert rows == ROWS and not faults
    assert ("';'" in "".join(notes)) == (name == "semicolons.csv") and ("'data'" in "".join(notes)) == (
        "object" in name
    )


@pytest.mark.parametrize(
    "kind, suffix", [("parquet", "parquet"), ("file", "arrow"), ("stream", "arrow"), ("file", "feather")]
)
def test_arrow_files(kind, suffix, tmp_path, tokenizer):
    """Arrow gives every message a null where another one has a key; the tokens are those of the rows as written."""
    write_arrow(tmp_path / f"train.{suffix}", CHATS, kind)
    rows, faults, _ = rows_of(tmp_path / f"train.{suffix}")
    assert not faults and rows[0]["messages"] == CHATS[0]["messages"]
    assert rows[1]["messages"] == CHATS[1]["messages"] and rows[1]["tools"] == CHATS[1]["tools"]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    loaded = [load_dataset(DataConfig(data=str(path)), tokenizer).train for path in (tmp_path, tmp_path / "lines")]
    assert [e.tokens.tolist() for e in loaded[0]] == [e.tokens.tolist() for e in loaded[1]]


def test_chats_in_csv_cells(tmp_path, tokenizer):
    cells = [{"messages": json.dumps(row["messages"]), "tools": json.dumps(row.get("tools", ""))} for row in CHATS]
    cells[0]["tools"] = ""
    (tmp_path / "train.csv").write_text(quoted(cells))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    loaded = [load_dataset(DataConfig(data=str(path)), tokenizer).train for path in (tmp_path, tmp_path / "lines")]
    assert [e.tokens.tolist() for e in loaded[0]] == [e.tokens.tolist() for e in loaded[1]]


FOLDERS = [
    {"train": "train.csv", "valid": "valid.tsv.gz", "test": "test.json"},
    {"train": "train.jsonl.gz", "valid": "validation.csv", "test": "testing.ndjson"},
    {"train": "training.csv.gz", "valid": "dev.jsonl", "test": "test.jsonl"},
    {"train": "data/train-00000-of-00001.csv", "valid": "data/validation-00000-of-00001.csv", "test": "data/test.csv"},
    {"train": "train/part1.csv", "valid": "valid/rows.jsonl", "test": "test/rows.json"},
]


@pytest.mark.parametrize("files", FOLDERS)
def test_folders(files, tmp_path, tokenizer):
    for count, name in enumerate(files.values(), 1):
        rows = [{"text": f"{name} {i}"} for i in range(count)]
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        kind = name.removesuffix(".gz").rsplit(".", 1)[1]
        texts = {"json": json.dumps(rows), "csv": quoted(rows), "tsv": quoted(rows, "\t")}
        text = texts.get(kind, "\n".join(map(json.dumps, rows)))
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    splits = load_dataset(DataConfig(data=str(tmp_path)), tokenizer, ("train", "valid", "test"))
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (1, 2, 3) and splits.warnings == []


def test_numbered_files_and_a_saved_dataset(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    for part in range(3):
        rows = [{"text": f"{part}{i}"} for i in range(10)]
        write_arrow(tmp_path / f"train-0000{part}-of-00003.parquet", rows, "parquet")
    splits = load_dataset(DataConfig(data=str(tmp_path)), tokenizer)
    assert (len(splits.train), len(splits.valid)) == (28, 2)
    saved = datasets.Dataset.from_list([{"text": f"{i}"} for i in range(40)])
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=saved, validation=saved.select(range(3))).save_to_disk(str(tmp_path / "dict"))
    one, both = (load_dataset(DataConfig(data=str(tmp_path / name)), tokenizer) for name in ("one", "dict"))
    assert (len(one.train), len(one.valid), len(both.train), len(both.valid)) == (38, 2, 40, 3)


def test_chats_of_the_hub_are_those_of_the_file(tmp_path, tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    found = datasets.DatasetDict(train=datasets.Dataset.from_list([{"tools": None, **row} for row in CHATS * 10]))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split=None, **options: found)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, CHATS * 10)))
    loaded = [load_dataset(DataConfig(data=data), tokenizer) for data in ("owner/name", str(tmp_path))]
    for split in ("train", "valid"):
        ours, theirs = ([e.tokens.tolist() for e in getattr(one, split)] for one in loaded)
        assert ours == theirs and len(ours) == {"train": 19, "valid": 1}[split]


def test_two_files_for_a_split(tmp_path, tokenizer):
    for name in ("train.csv", "train.jsonl", "eval.csv"):
        (tmp_path / name).write_text("text\nx\n" if "csv" in name else '{"text": "x"}')
    with pytest.raises(DataError, match=r"train.csv: there is also train.jsonl: remove one of them"):
        load_dataset(DataConfig(data=str(tmp_path)), tokenizer)
    (tmp_path / "test.csv").write_text("text\nx\n")
    assert len(load_dataset(DataConfig(data=str(tmp_path)), tokenizer, ("test",)).test) == 1  # reads no training rows
    (tmp_path / "train.jsonl").unlink()
    warnings = load_dataset(DataConfig(data=str(tmp_path)), tokenizer).warnings
    assert any("eval.csv is not read: rename it to valid or test" in line for line in warnings)


BAD = {
    "a.csv": ('text,id\n"never closed,1\nnext,2\n', 1, "not CSV (unexpected end of data)"),
    "b.csv": ("text,id\nx,1\ny\n", 2, "does not have the 2 cells of the header"),
    "c.csv": ("text,text\nx,1\n", None, "has two columns named text"),
    "d.csv": (b"text\n\xff\n", None, "not UTF-8"),
    "e.json": ('{"train": [{"a": 1}], "test": [{"a": 1}]}', None, "holds several lists (train, test)"),
    "f.json": ("[{]", None, "not JSON"),
    "g.json": ("3", None, "is one value, not a list"),
    "h.jsonl": ('{"text": "x"}\n{"text"}\n', 2, "not JSON (Expecting ':' delimiter)"),
    "i.jsonl.gz": ('{"text": "x"}', None, "not a gzip file"),
    "j.jsonl.gz": (gzip.compress(b'{"text": "x"}' * 99)[:30], None, "not a gzip file"),
    "k.parquet": ("PAR1", None, "cannot be read as .parquet"),
    "l.arrow": ("ARROW1", None, "cannot be read as .arrow"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_faults_with_a_place(name, tmp_path):
    text, number, said = BAD[name]
    if name[2:] in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    _, faults, _ = rows_of(tmp_path / name)
    assert isinstance(faults[0], Fault) and faults[0].where == Place(str(tmp_path / name), number)
    assert said in faults[0].text and len(faults) == 1


def test_one_row_as_an_object(tmp_path):
    (tmp_path / "row.json").write_text(json.dumps(chat("q", "a")))
    assert rows_of(tmp_path / "row.json")[0] == [chat("q", "a")]
    (tmp_path / "lines.json").write_text("")
    assert rows_of(tmp_path / "lines.json")[0] == []


def test_a_large_cell_and_an_index_column(tmp_path, tokenizer):
    """csv refuses cells of more than 131,072 letters by default; pandas writes its index without a name."""
    (tmp_path / "train.csv").write_text(f',text\n0,"{"x" * 200_000}"\n')
    splits = load_dataset(DataConfig(data=str(tmp_path), max_seq_length=10), tokenizer)
    assert splits.train.summary.longest == 200_001
    assert splits.all_notes() == ["Reading text rows; not read: a column without a name"]


def test_pyarrow_is_an_extra(tmp_path, tokenizer, monkeypatch):
    for name in ("train.parquet", "train.arrow"):
        path = tmp_path / name
        path.write_bytes(b"PAR1")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ConfigError, match="needs the pyarrow package") as error:
            load_dataset(DataConfig(data=str(path)), tokenizer)
        assert "pip install datasets pyarrow" in error.value.hint
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"text\nx\n"))  # the standard library is enough
    assert len(load_dataset(DataConfig(data=str(tmp_path / "rows.csv.gz")), tokenizer).train) == 1
