"""Adapters of every kind through the server: answers as one at a time, in memory and out of it, while requests run."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from serving_helpers import running  # noqa: E402

from conftest import make_model, shake  # noqa: E402
from mlx_lora import AdapterConfig, attach, extract, load, mount, save_adapter, unmount  # noqa: E402
from mlx_lora.config import GenerateConfig, ServeConfig  # noqa: E402
from mlx_lora.serving.bank import AdapterBank  # noqa: E402
from mlx_lora.serving.engine import Engine  # noqa: E402
from mlx_lora.serving.requests import Request  # noqa: E402
from mlx_lora.tiny_base import PATH  # noqa: E402

QUESTIONS = ("A red umbrella was found on a bench.", "Hi", "There is a grey key in the field.")
KINDS = {
    "plain": {"rank": 4},
    "wide": {"rank": 9, "scale": 5.0},
    "dora": {"method": "dora", "rank": 3},
    "head": {"rank": 2, "modules_to_save": ["lm_head"]},
    "tokens": {"rank": 2, "trainable_token_indices": {"model.embed_tokens": [5, 17, 100]}},
    "on head": {"rank": 2, "keys": ["lm_head"]},
    "vera": {"method": "vera", "rank": 16},
}
LENGTH = 16


class Paused(Engine):
    """An engine that stops before a step, once ``steps`` steps with rows were done, until ``go``."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps: int | None = None
        self.stopped, self.go = threading.Event(), threading.Event()

    def pause_after(self, steps: int) -> None:
        self.stopped.clear()
        self.go.clear()
        self.steps = steps

    def step(self) -> bool:
        if self.steps == 0:
            self.steps = None
            self.stopped.set()
            assert self.go.wait(120)
        if self.steps and self.active:
            self.steps -= 1
        return super().step()


@pytest.fixture(scope="module")
def adapters():
    """Adapters by name, and a second one for each name."""
    model, _ = load(PATH)
    made = {}
    for seed, (name, config) in enumerate(KINDS.items()):
        for version in (name, f"{name} 2"):
            mx.random.seed(seed)
            attach(model, AdapterConfig(**{"num_layers": -1, **config}))
            shake(model, seed + 100 * (version != name), size=0.3)
            made[version] = extract(model)
            unmount(model)
    return made


@pytest.fixture(scope="module")
def alone(adapters):
    """(adapter or None, question) -> mlx-lm's own greedy answer with the adapter mounted, one at a time."""
    from mlx_lm import generate

    model, tokenizer = load(PATH)
    known = {}

    def answer(name: str | None, question: str = QUESTIONS[0], length: int = LENGTH) -> str:
        if (name, question, length) not in known:
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            if name is not None:
                mount(model, adapters[name])
            known[name, question, length] = generate(model, tokenizer, list(prompt), max_tokens=length)
            unmount(model)
        return known[name, question, length]

    return answer


@pytest.fixture(scope="module")
def served(adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in KINDS:
        save_adapter(adapters[name], folder / name, "peft" if name in ("plain", "dora") else "mlx-lm")
    model, tokenizer = load(PATH)
    engine = Paused(model, tokenizer, AdapterBank(model, folder=folder))
    with running(engine=engine) as (url, _):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300), engine, folder


def ask(client, name: str | None, question: str = QUESTIONS[0], length: int = LENGTH):
    return client.chat.completions.create(
        model=name or "tiny", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=length
    )


def text(made) -> str:
    return made.choices[0].message.content


def loaded(engine) -> set[str]:
    return {each.name for each in engine.bank.listed() if each.loaded}


def test_every_kind_at_once_answers_as_alone(served, alone):
    client, engine, _ = served
    wanted = [(name, question) for question in QUESTIONS for name in (None, *KINDS)]
    engine.pause_after(1)  # so that most of them meet in the engine
    with ThreadPoolExecutor(len(wanted)) as pool:
        asked = [pool.submit(ask, client, *each) for each in wanted]
        assert engine.stopped.wait(120)
        engine.go.set()
        got = [text(each.result()) for each in asked]
    assert got == [alone(*each) for each in wanted]
    assert len(set(got[: len(KINDS) + 1])) == len(KINDS) + 1, "each adapter answers differently"
    alone_because = {each.name: bool(each.alone) for each in engine.bank.listed()}
    assert alone_because == {name: name not in ("plain", "wide", "on head") for name in KINDS}
    assert engine.active == engine.queued == 0 and not any(each.rows for each in engine.bank.listed())


@pytest.mark.parametrize("name", ["plain", "dora"])
def test_a_folder_written_again_is_used_by_new_requests_only(served, alone, adapters, name):
    client, engine, folder = served
    assert text(ask(client, name, length=40)) == alone(name, length=40)
    assert ask(client, name, length=40).usage.prompt_tokens_details.cached_tokens > 0
    base_kept = ask(client, None).usage.prompt_tokens_details.cached_tokens
    ask(client, None)
    engine.pause_after(5)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client, name, QUESTIONS[0], 40)
        assert engine.stopped.wait(120) and engine.active == 1
        save_adapter(adapters[f"{name} 2"], folder / name, "peft", overwrite=True)
        second = pool.submit(ask, client, name, QUESTIONS[0], 40)
        while engine.queued == 0:
            assert not second.done()
        engine.go.set()
        assert text(first.result()) == alone(name, length=40)
        assert text(second.result()) == alone(f"{name} 2", length=40) != text(first.result())
    assert second.result().usage.prompt_tokens_details.cached_tokens == 0, "not those of the old weights"
    assert len(kept_for(engine, name)) == 1, "and the old ones are dropped"
    assert ask(client, None).usage.prompt_tokens_details.cached_tokens >= base_kept, "the base's stay"
    save_adapter(adapters[name], folder / name, "peft", overwrite=True)


def kept_for(engine, name: str) -> set:
    return {key for key in list(engine.prompt_cache._kept) if key is not None and key[0] == name}


@pytest.mark.parametrize("name", ["plain", "head"])
def test_an_adapter_is_unloaded_while_a_request_uses_it(served, alone, name):
    client, engine, _ = served
    post = lambda path, **body: client.post(path, body=body, cast_to=object)  # noqa: E731
    post("/load_lora_adapter", lora_name="other", lora_path=name)
    with pytest.raises(openai.BadRequestError, match="already loaded"):
        post("/load_lora_adapter", lora_name="other", lora_path=name)
    post("/load_lora_adapter", lora_name="other", lora_path=name, load_inplace=True)
    engine.pause_after(3)
    with ThreadPoolExecutor(1) as pool:
        running_request = pool.submit(ask, client, "other")
        assert engine.stopped.wait(120) and engine.active == 1
        post("/unload_lora_adapter", lora_name="other")
        with pytest.raises(openai.NotFoundError, match="other"):
            ask(client, "other")
        engine.go.set()
        assert text(running_request.result()) == alone(name)
    assert not kept_for(engine, "other"), "nothing is kept for an adapter that is gone"
    post("/load_lora_adapter", lora_name="other", lora_path=name)
    assert text(ask(client, "other")) == alone(name)
    post("/unload_lora_adapter", lora_name="other")


def test_what_the_folder_holds_besides_adapters(served, alone, tmp_path):
    client, engine, folder = served
    other = make_model()
    attach(other, AdapterConfig(rank=2, num_layers=-1))
    save_adapter(extract(other), foreign := tmp_path / "foreign", "peft")
    names = set(engine.bank.names)
    (folder / "notes").mkdir()
    (folder / "notes" / "adapter_config.json").write_text("{")
    (folder / "new_method").mkdir()
    config = json.loads((folder / "plain" / "adapter_config.json").read_text())
    (folder / "new_method" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NOT_YET"}))
    (folder / "new_method" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    (folder / "link").symlink_to(folder / "plain")
    (folder / "readme.txt").write_text("x")
    try:
        listed = {model.id for model in client.models.list()}
        assert names <= listed and not listed & {"link", "readme.txt"}
        (folder / "other model").mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / "other model" / file).write_bytes((foreign / file).read_bytes())
        for name in ("other model", "notes", "new_method", "link", "readme.txt", "../plain", "nothing"):
            with pytest.raises((openai.NotFoundError, openai.BadRequestError)) as error:
                ask(client, name)
            assert (
                "Traceback" not in str(error.value)
                and str(folder) not in str(error.value)
                and str(PATH) not in str(error.value)
            )
        assert text(ask(client, "plain")) == alone("plain")
    finally:
        (folder / "link").unlink()


def test_pinned_adapters_stay_and_the_others_give_way(adapters, alone, tmp_path):
    for number in range(4):
        save_adapter(adapters["plain"], tmp_path / f"a{number}", "peft")
    model, tokenizer = load(PATH)
    bank = AdapterBank(model, memory_limit=2 * adapters["plain"].nbytes, folder=tmp_path)
    bank.pin("a0")
    engine = Paused(model, tokenizer, bank)
    with running(engine=engine) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        for name, there in (("a0", {"a0"}), ("a1", {"a0", "a1"}), ("a2", {"a0", "a2"}), ("a3", {"a0", "a3"})):
            assert text(ask(client, name)) == alone("plain")
            assert loaded(engine) == there
        engine.pause_after(2)
        with ThreadPoolExecutor(4) as pool:  # in use, they stay over the limit; then they give way
            asked = [pool.submit(ask, client, f"a{number}") for number in range(4)]
            assert engine.stopped.wait(120)
            engine.go.set()
            assert [text(each.result()) for each in asked] == [alone("plain")] * 4
        until_idle(engine)
        assert "a0" in loaded(engine) and len(loaded(engine)) == 2


def test_a_client_that_leaves_while_its_request_is_queued_frees_its_place(adapters, tmp_path):
    """The engine takes a request in a thread, which goes on when the client's task is cancelled."""
    save_adapter(adapters["plain"], tmp_path / "plain", "peft")
    with running(tmp_path) as (_, server):
        engine, submit = server.engine, server.engine.submit
        entered, go = threading.Event(), threading.Event()

        def slow(*args):
            entered.set()
            assert go.wait(120)
            return submit(*args)

        engine.submit = slow
        endless = GenerateConfig(max_tokens=4000, logit_bias=dict.fromkeys(engine.tokenizer.eos_token_ids, -1e9))

        async def leave():
            pieces = server.pieces([Request([5, 6, 7], endless, "plain")])
            task = asyncio.ensure_future(anext(pieces))
            assert await asyncio.to_thread(entered.wait, 120)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go.set()
            for _ in range(6000):
                if engine.counts["cancelled"] or engine.counts["completed"]:
                    break
                await asyncio.sleep(0.01)

        asyncio.run(leave())
        assert engine.counts["cancelled"] == 1 and engine.active == engine.queued == 0


def until_idle(engine) -> None:
    done = threading.Event()
    for _ in range(6000):
        if engine.active == engine.queued == 0:
            return
        done.wait(0.01)
    raise AssertionError("the engine is still busy")


def from_options(adapters_by_name: dict, **options):
    """The engine that ``mlx-lora serve`` makes of these options, and the base's name."""
    from mlx_lora.cli.serve import _engine

    params = dict(model=str(PATH), adapters=list(adapters_by_name.items()), adapters_dir=None, merge=False, pin=())
    draft = {name: options.pop(name) for name in ("draft_model", "num_draft_tokens") if name in options}
    return _engine({**params, "trust_remote_code": False, **options}, ServeConfig(), GenerateConfig(**draft)), draft


@pytest.mark.parametrize("name", ["plain", "dora", "head"])
def test_a_merged_adapter_is_the_model(adapters, alone, tmp_path, name):
    save_adapter(adapters[name], tmp_path / name)
    (engine, base), _ = from_options({"mine": str(tmp_path / name)}, merge=True)
    assert base == "mine"
    with running(engine=engine) as (url, server):
        server.name = base
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        assert [model.id for model in client.models.list()] == ["mine"]
        assert [text(ask(client, "mine", question)) for question in QUESTIONS] == [alone(name, q) for q in QUESTIONS]


def test_a_draft_model_changes_no_answer(adapters, alone, tmp_path):
    names = ("plain", "dora")
    for name in names:
        save_adapter(adapters[name], tmp_path / name)
    (engine, _), draft = from_options(
        {name: str(tmp_path / name) for name in names}, draft_model=str(PATH), num_draft_tokens=2
    )
    assert engine.draft_model is not None
    with running(engine=engine) as (url, server):
        server.defaults = GenerateConfig(**draft)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        wanted = [(name, question) for question in QUESTIONS for name in (None, *names)]
        with ThreadPoolExecutor(len(wanted)) as pool:
            got = [text(made) for made in pool.map(lambda each: ask(client, *each), wanted)]
        assert got == [alone(*each) for each in wanted]


def test_kept_prompts_are_those_of_the_same_adapter_and_are_told(served, alone):
    client, engine, _ = served
    question = "Where is the long green ladder that Ada lost in the garden on Monday?"
    for name in (None, "plain", "wide", "dora"):
        first, again = ask(client, name, question), ask(client, name, question)
        details = [made.usage.prompt_tokens_details.cached_tokens for made in (first, again)]
        assert details[0] < 12 and details[1] >= again.usage.prompt_tokens - 2, "the template's first words at most"
        assert text(first) == text(again) == alone(name, question)
    assert engine.prompt_cache.nbytes > 0


def test_requests_that_begin_alike_share_what_an_earlier_one_computed(served, alone):
    client, _, _ = served
    start = "One two three four five six seven eight nine ten. "
    ask(client, "plain", start)
    ends = ["A ladder?", "Who?", "Is it red?", "Where is the key?"]
    with ThreadPoolExecutor(len(ends)) as pool:
        made = list(pool.map(lambda end: ask(client, "plain", start + end), ends))
    assert all(each.usage.prompt_tokens_details.cached_tokens > 10 for each in made)
    assert [text(each) for each in made] == [alone("plain", start + end) for end in ends]
