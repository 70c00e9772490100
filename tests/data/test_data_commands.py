"""Data from the command line: what train and test say about it, and the prompts of generate."""

import csv
import gzip
import json

import pytest

from mlx_lora.cli.main import main
from mlx_lora.errors import ConfigError
from mlx_lora.serving.prompts import Prompts
from mlx_lora.tiny_base import PATH, skill


def run(args, capsys, code=0):
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert end.value.code == code, err
    return out, err


@pytest.fixture
def alpaca(tmp_path):
    """A compressed CSV of 40 Alpaca rows, five of them long."""
    file = tmp_path / "data" / "train.csv.gz"
    file.parent.mkdir()
    with gzip.open(file, "wt", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(["instruction", "input", "output"])
        for i in range(40):
            writer.writerow([f"Repeat, {i}", "" if i % 2 else "word " * (200 if i < 10 else 1), f"{i}"])
    return file.parent


def train_args(data, folder):
    args = ["train", "--model", PATH, "--data", data, "--adapter-path", folder, "--iters", "2"]
    return [*args, "--num-layers", "1", "--mask-prompt", "--max-seq-length", "60"]


def test_train_says_what_it_reads(alpaca, tmp_path, capsys):
    _, err = run(train_args(alpaca, tmp_path / "out"), capsys)
    lines = err.splitlines()
    assert lines.count("Reading Alpaca rows: instruction + input -> user, output -> assistant") == 1
    assert any("2 of its 40 rows, drawn with a fixed seed, are held out for validation" in line for line in lines)
    assert any(line.startswith("Warning: ") and "were cut to 60 tokens" in line for line in lines)
    assert any(line.startswith("Data: ") and "2 validation rows" in line for line in lines)
    _, err = run([*train_args(alpaca, tmp_path / "half"), "--valid-split", "0.5"], capsys)
    assert "20 of its 40 rows" in err
    _, err = run([*train_args(alpaca, tmp_path / "bad"), "--no-mask-prompt", "--mask-turns", "last"], capsys, 2)
    assert "mask_turns has no effect without mask_prompt" in err


def test_generate_gives_one_bos(capsys, monkeypatch):
    from row_tokenizers import CHATML, with_bos

    from mlx_lora.cli import generate

    tokenizer, seen = with_bos("{{ bos_token }}" + CHATML), []

    class Engine(Prompts):
        def stream(self, request):
            seen.append(request.tokens)
            return iter(())

    monkeypatch.setattr(generate, "load_engine", lambda *_: (Engine(tokenizer), []))
    for more in ([], ["--ignore-chat-template"]):
        for prompt in ("Hi", "<|endoftext|>Hi"):
            with pytest.raises(SystemExit):
                main(["generate", "--model", str(PATH), "--prompt", prompt, *more, "--json"])
    capsys.readouterr()
    assert [tokens.count(tokenizer.bos_token_id) for tokens in seen] == [1, 1, 1, 1]


def test_the_chat_templates_words_reach_the_user():
    from row_tokenizers import make_tokenizer

    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system here') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    with pytest.raises(ConfigError, match="refuses these messages: No system here") as error:
        Prompts(tokenizer).prompt(messages)
    assert "system prompt" not in error.value.hint


def test_test_takes_any_file(tmp_path, capsys):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": list(skill.rows("test", 4))}))
    out, err = run(["test", "--model", PATH, "--data", file], capsys)
    assert "Test loss" in out and "Reading the rows in 'rows'" in err
