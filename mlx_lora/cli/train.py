"""``train`` and ``test``: options in, reports out. The work is in ``training``; this file speaks and saves."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..config import REPORTERS, AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from ..errors import AdapterError, ConfigError
from . import console
from .options import adapter_option, build, config_options, json_option, model_option, trust_option, yaml_option

STATE = "training_state.safetensors"


@click.command()
@yaml_option(lambda: {"hf_dataset"})
@model_option(default="Qwen/Qwen3-0.6b", show_default=True)
@adapter_option("adapters", help="Folder to save the adapter in.")
@config_options(DataConfig, "data", "mask_prompt", "mask_turns", "max_seq_length", "text_feature", "prompt_feature",
                "completion_feature", "chat_feature")  # fmt: skip
@config_options(AdapterConfig)
@config_options(OptimizerConfig)
@config_options(TrainConfig)
@click.option("--init-reference", metavar="PATH_OR_REPO", help="loftq: the model before it was quantized.")
@click.option("--resume", is_flag=True, help="Go on with the run saved in --adapter-path, exactly where it stopped.")
@click.option("--resume-adapter-file", metavar="FILE", help="Start from the weights in this adapters.safetensors.")
@click.option("--train/--no-train", default=True, help="Train (the default).")
@click.option("--test/--no-test", default=False, help="Measure on the test set afterwards.")
@click.option("--test-batches", default=500, show_default=True, help="Test batches; -1 for the whole set.")
@click.option("--report-to", metavar="NAME,..", help=f"Also log to {' or '.join(REPORTERS)}.")
@click.option("--project-name", metavar="NAME", help="Project to log under.")
@trust_option
@json_option
@click.pass_context
def train(ctx: click.Context, **params: Any):
    """Fine-tune a model with LoRA, DoRA or VeRA, or fully.

    The adapter is saved in --adapter-path every --save-every iterations and at the end, in mlx-lm's format. Ctrl-C
    saves and stops; --resume goes on. mlx-lm's flags and YAML files work unchanged.

    \b
    mlx-lora train --model Qwen/Qwen3-0.6B --data my_data --iters 600
    mlx-lora train --model mlx-community/Llama-3.2-3B-Instruct-4bit --data chats.jsonl \\
        --mask-prompt --rank 16 --alpha 32 --num-layers -1 --learning-rate 1e-4
    mlx-lora train --fine-tune-type dora --keys q_proj,v_proj -c my_run.yaml
    mlx-lora train -c my_run.yaml --resume
    """
    adapter = build(AdapterConfig, params)
    hf_dataset = (ctx.default_map or {}).get("hf_dataset")
    data = build(DataConfig, params, hf_dataset=hf_dataset)
    optimizer = build(OptimizerConfig, params)
    config = build(TrainConfig, params)
    folder = Path(params["adapter_path"])
    if not (params["train"] or params["test"]):
        raise ConfigError("neither --train nor --test: nothing to do", "Leave --no-train out, or add --test.")
    if params["resume"] and params["resume_adapter_file"]:
        raise ConfigError("--resume and --resume-adapter-file contradict each other", "Choose one.")
    if params["resume"] and not (folder / STATE).exists():
        raise ConfigError(f"{folder}: holds no {STATE} to resume", "Leave --resume out, or name the run's folder.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file", "Choose another --adapter-path.")
    reporters = _reporters(params)
    asked = ctx.get_parameter_source("num_layers") in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    run = Run(params["model"], folder, data, params["trust_remote_code"], params["as_json"])
    if params["train"]:
        run.load(("train", "valid", "test") if params["test"] else ("train", "valid"))
        run.attach(
            adapter,
            config.seed,
            params["resume_adapter_file"],
            asked,
            config.batch_size,
            params["init_reference"],
            params["resume"],
        )
        settings = {k: v for part in (data, optimizer, config) for k, v in asdict(part).items() if v is not None}
        stopped = run.train(optimizer, config, params["resume"], reporters, settings)
        if stopped:
            console.note(f"Stopped and saved. Go on with the same command and --resume; the adapter is in {folder}.")
            ctx.exit(130)
    else:
        run.load(("test",))
        run.mount()
    if params["test"]:
        run.test(config.batch_size, params["test_batches"], 0)
    elif not params["as_json"]:
        _next_steps(params["model"], folder)


@click.command()
@yaml_option(lambda: set())
@model_option(required=True)
@adapter_option(help="Folder of the adapter to measure, in any known format; without one the base is measured.")
@config_options(DataConfig, "data", "mask_prompt", "mask_turns", "max_seq_length", "text_feature", "prompt_feature",
                "completion_feature", "chat_feature")  # fmt: skip
@config_options(TrainConfig, "batch_size")
@click.option("--test-batches", default=-1, show_default=True, help="Batches to measure; -1 for the whole set.")
@click.option("--exact-match", default=0, metavar="N", help="Also answer N rows greedily and count exact answers.")
@click.option("--max-tokens", default=128, show_default=True, help="Longest answer, with --exact-match.")
@trust_option
@json_option
def test(**params: Any):
    """Measure loss, perplexity and, on request, exact match on a test set.

    \b
    mlx-lora test --model Qwen/Qwen3-0.6B --adapter-path adapters --data my_data
    mlx-lora test --model Qwen/Qwen3-0.6B --data my_data --exact-match 100
    """
    data = build(DataConfig, params)
    batch_size = build(TrainConfig, params).batch_size
    if params["exact_match"] < 0 or params["max_tokens"] < 1:
        raise ConfigError(
            "--exact-match and --max-tokens must be positive numbers",
            "Give the rows to answer, such as --exact-match 100; leave --max-tokens out for 128.",
        )
    folder = Path(params["adapter_path"]) if params["adapter_path"] else None
    run = Run(params["model"], folder, data, params["trust_remote_code"], params["as_json"])
    run.load(("test",))
    if folder:
        run.mount()
    run.test(batch_size, params["test_batches"], params["exact_match"], params["max_tokens"])


class Run:
    """The steps that ``train``, ``test`` and ``demo`` share, with their words."""

    def __init__(self, model: str, folder: Path | None, data: DataConfig, trust: bool = False, as_json: bool = False):
        self.name, self.folder, self.data, self.trust, self.as_json = model, folder, data, trust, as_json

    def load(self, splits: tuple[str, ...]) -> None:
        """The model and the data: every bad row is told before anything is trained."""
        from ..data import load_dataset
        from ..model.loading import load

        console.note(f"Loading {self.name}")
        self.model, self.tokenizer = load(self.name, trust_remote_code=self.trust)
        console.note(f"Reading {self.data.data if self.data.hf_dataset is None else 'hf_dataset'}")
        self.sets = load_dataset(self.data, self.tokenizer, splits)
        for text in self.sets.warnings:
            console.warn(text)

    def mount(self) -> None:
        from ..formats import load_adapter
        from ..model.attach import mount

        mount(self.model, load_adapter(self.folder))

    def attach(
        self,
        adapter: AdapterConfig,
        seed: int,
        start: str | None = None,
        asked_layers: bool = False,
        batch_size: int = 4,
        reference: str | None = None,
        resume: bool = False,
    ) -> None:
        """Fresh adapters; ones that start from the file ``start``; or those of the run that goes on."""
        import mlx.core as mx

        from ..data import train_batches
        from ..formats import load_adapter
        from ..init import FROM_DATA, SUBTRACTED
        from ..model.attach import attach, mount
        from ..model.loading import load
        from ..model.targets import layer_paths

        total = len(layer_paths(self.model))
        if asked_layers and adapter.num_layers > total:
            raise ConfigError(
                f"--num-layers is {adapter.num_layers}, but the model has {total} layers", "Use -1 for all of them."
            )
        if start and adapter.init != "default":
            raise ConfigError(f"--resume-adapter-file and --init {adapter.init} contradict each other", "Choose one.")
        mx.random.seed(seed)
        subtracted = adapter.init.startswith(SUBTRACTED)
        if resume and (subtracted or adapter.init in FROM_DATA):  # the ranks and the frozen part are in the folder
            return mount(self.model, load_adapter(self.folder), difference=subtracted)
        more: dict[str, Any] = {}
        if adapter.init in FROM_DATA:
            console.note(f"Looking at the data ({adapter.init})")
            more["batches"] = train_batches(self.sets.train, batch_size, seed=seed)
        if reference is not None:
            console.note(f"Loading {reference}")
            more["reference"] = load(reference, trust_remote_code=self.trust)[0]
        attach(self.model, adapter, **more)
        if start:
            self._start_from(Path(start))

    def _start_from(self, file: Path) -> None:
        from dataclasses import replace

        from ..adapter import SHARED, raise_faults
        from ..formats.files import read_safetensors
        from ..model.attach import extract, mount

        if not file.is_file():
            raise ConfigError(f"{file}: no such file", "--resume-adapter-file takes an adapters.safetensors.")
        fresh, found = extract(self.model), read_safetensors(file)
        wanted = {name: array for name, array in fresh.weights.items() if name not in SHARED}
        faults = [f"{name}: in the file, not in this run" for name in found if name not in (*wanted, *SHARED)]
        faults += [f"{name}: in this run, not in the file" for name in wanted if name not in found]
        faults += [
            f"{name}: {list(found[name].shape)} in the file, {list(array.shape)} in this run"
            for name, array in wanted.items()
            if name in found and found[name].shape != array.shape
        ]
        raise_faults(
            [f"{file}: {f}" for f in faults], "Use the rank, keys and layers that the file was made with.", AdapterError
        )
        mount(self.model, replace(fresh, weights=found))

    def train(
        self,
        optimizer: OptimizerConfig,
        config: TrainConfig,
        resume: bool = False,
        reporters: list = (),
        settings: dict[str, Any] | None = None,
    ) -> bool:
        """Train to the end or to Ctrl-C (then True). Reports go to the console and to ``reporters``."""
        from ..model.attach import extract
        from ..training import TrainingState, build_optimizer, train

        self._introduce(config)
        state = TrainingState.load(self.folder / STATE) if resume else None
        steps = -(-config.iters // config.grad_accumulation_steps)
        saver = Saver(self.folder, lambda: extract(self.model), settings or {}, keep_earlier=not resume)
        first = state.iteration if state else 0
        if first >= config.iters:
            raise ConfigError(f"the run has done its {first} iterations already", "Raise --iters to go on.")
        speaks, stop = _speaks(), Stop()
        bar = console.Bar(config.iters, initial=first, hidden=self.as_json or not speaks)
        speaker = Speaker(bar, config.iters, self.as_json, reporters)
        reports = train(
            self.model,
            build_optimizer(optimizer, steps, self.model),
            self.sets.train,
            self.sets.valid,
            config,
            checkpoint=saver,
            resume=state,
            stop=stop,
        )
        try:
            with stop:
                for report in reports:
                    if speaks:
                        speaker(report)
        finally:
            bar.close()
        return report.stopped

    def _introduce(self, config: TrainConfig) -> None:
        from mlx.utils import tree_flatten

        from ..model.attach import parameter_counts

        trained, total = parameter_counts(self.model)
        summary = self.sets.train.summary
        places = len({n.rpartition(".")[0] for n, _ in tree_flatten(self.model.trainable_parameters())})
        console.note(
            f"Trainable: {trained:,} of {total:,} parameters ({100 * trained / total:.3f} %), in {places} modules"
        )
        valid = f", {self.sets.valid.summary.kept} to validate" if self.sets.valid else ""
        console.note(f"Data: {summary.kept} rows{valid}; {summary.learned_tokens:,} tokens to learn in an epoch")

    def test(self, batch_size: int, batches: int, exact: int, max_tokens: int = 128) -> Any:
        """Loss and perplexity; with ``exact`` > 0 the share of that many rows answered to the letter."""
        from ..training import evaluate

        result = evaluate(self.model, self.sets.test, batch_size, batches)
        fields = asdict(result)
        if exact:
            right, asked = self.exact_match(exact, max_tokens)
            fields |= {"exact_match": right / asked, "answered": asked}
        if self.as_json:
            console.event("TestReport", fields)
        else:
            console.data(f"Test loss {result.loss:.3f}, perplexity {result.perplexity:.3f} ({result.tokens:,} tokens)")
            if exact:
                console.data(f"Exact match {right}/{asked} ({100 * right / asked:.0f} %)")
        return result

    def exact_match(self, count: int, max_tokens: int) -> tuple[int, int]:
        """(right, asked): greedy answers equal to the last answer of a row, outer white space aside."""
        pairs = self.answers(count, max_tokens)
        return sum(given == wanted for _, wanted, given in pairs), len(pairs)

    def answers(self, count: int, max_tokens: int) -> list[tuple[str, str, str]]:
        """(question, wanted, given) for rows of the test set, spread over it; answers are greedy."""
        from ..data import questions
        from ..serving.engine import Engine

        asked = questions(self.data, self.tokenizer, "test", count)
        given = Engine(self.model, self.tokenizer).answers([q.tokens for q in asked], max_tokens)
        bar, pairs = console.Bar(len(asked), unit="row", hidden=self.as_json), []
        for question, answer in zip(asked, given, strict=True):
            pairs.append((question.text, question.answer.strip(), answer.strip()))
            bar.step()
        bar.close()
        return pairs


class Saver:
    """Writes a checkpoint: the adapter, a numbered copy of it, and the state of the run for ``--resume``."""

    def __init__(self, folder: Path, extract, settings: dict[str, Any], keep_earlier: bool):
        self.folder, self.extract, self.settings, self.keep_earlier = folder, extract, settings, keep_earlier

    def __call__(self, state: Any) -> Path:
        from dataclasses import replace

        from ..formats import mlx_lm, save_adapter
        from ..formats.files import write_folder, write_safetensors

        if not _speaks():  # of several processes one writes
            return self.folder
        if self.keep_earlier:
            self._put_earlier_aside()
            self.keep_earlier = False
        adapter = self.extract()
        adapter = replace(adapter, metadata={"mlx-lm": {"training": self.settings}})
        copy = f"{state.iteration:07d}_{mlx_lm.WEIGHTS}"
        write_folder(self.folder, lambda tmp: write_safetensors(tmp / copy, mlx_lm.stored_weights(adapter)))
        save_adapter(adapter, self.folder, overwrite=True)
        state.save(self.folder / STATE)
        return self.folder / copy

    def _put_earlier_aside(self) -> None:
        """An earlier run in the same folder is kept, in a sub-folder."""
        from ..formats import mlx_lm

        names = [mlx_lm.CONFIG, mlx_lm.WEIGHTS, STATE]
        there = [self.folder / n for n in names if (self.folder / n).exists()]
        there += sorted(self.folder.glob(f"[0-9]*_{mlx_lm.WEIGHTS}")) if self.folder.exists() else []
        if not there:
            return
        number = 1
        while (self.folder / f"earlier-{number}").exists():
            number += 1
        target = self.folder / f"earlier-{number}"
        target.mkdir()
        for file in there:
            file.rename(target / file.name)
        console.note(f"{self.folder} held an earlier run; it is now in {target}")


def _speaks() -> bool:
    """Whether this process is the one that writes and talks, under ``mlx.launch``."""
    import mlx.core as mx

    return mx.distributed.init().rank() == 0


class Stop:
    """Ctrl-C asks the run to stop at the next iteration; a second one interrupts at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        try:
            self._before = signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # not in the main thread: Ctrl-C does not come here
            self._before = None
        return self

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        console.note("\nStopping after this iteration; Ctrl-C again to stop at once, unsaved.")

    def __call__(self) -> bool:
        return self.asked


class Speaker:
    """Turns reports into words, JSON lines and log entries."""

    def __init__(self, bar: console.Bar, iters: int, as_json: bool, reporters: list):
        self.bar, self.iters, self.as_json, self.reporters = bar, iters, as_json, reporters
        self.facts: dict[str, str] = {}

    def __call__(self, report: Any) -> None:
        kind = type(report).__name__
        if kind == "Progress":
            if report.loss is not None:
                self.facts["loss"] = f"{report.loss:.3f}"
            return self.bar.step(**self.facts)
        if kind == "TrainReport":
            self.facts |= {"tokens/s": f"{report.tokens_per_second:,.0f}", "peak": f"{report.peak_memory:.2f} GB"}
        if self.as_json:
            console.report_event(report)
        else:
            getattr(self, kind)(report)
        for log in self.reporters if kind in ("TrainReport", "ValReport") else ():
            log({k: v for k, v in asdict(report).items() if k != "iteration"}, report.iteration)

    def TrainReport(self, r: Any) -> None:
        left = (self.iters - r.iteration) / r.iterations_per_second if r.iterations_per_second else 0
        self.bar.line(
            f"Iteration {r.iteration:>5}: loss {r.train_loss:.3f}, rate {r.learning_rate:.2e}, "
            f"{r.tokens_per_second:,.0f} tokens/s, {r.iterations_per_second:.2f} it/s, "
            f"{r.trained_tokens:,} tokens, peak {r.peak_memory:.2f} GB, {console.seconds(left)} left"
        )

    def ValReport(self, r: Any) -> None:
        self.bar.line(f"Iteration {r.iteration:>5}: validation loss {r.val_loss:.3f} ({r.val_time:.1f} s)")

    def SkippedStep(self, r: Any) -> None:
        self.bar.line(f"Iteration {r.iteration:>5}: gradient is not finite; step skipped ({r.in_a_row} in a row)")

    def Checkpoint(self, r: Any) -> None:
        self.bar.line(f"Iteration {r.iteration:>5}: saved {r.path}")

    def Done(self, r: Any) -> None:
        skipped = f", {r.skipped_steps} steps skipped" if r.skipped_steps else ""
        self.bar.line(
            f"{'Stopped' if r.stopped else 'Done'} after {console.seconds(r.seconds)}: {r.trained_tokens:,} tokens "
            f"learned, peak {r.peak_memory:.2f} GB{skipped}"
        )


def _reporters(params: dict[str, Any]) -> list:
    """Functions (fields, iteration) for the services named by --report-to."""
    names = [n.strip() for n in (params["report_to"] or "").split(",") if n.strip()]
    if unknown := [n for n in names if n not in REPORTERS]:
        raise ConfigError(f"--report-to {', '.join(unknown)} is not known", f"Known: {', '.join(REPORTERS)}.")
    if params["project_name"] and not names:
        raise ConfigError("--project-name is for --report-to", "Add --report-to wandb, or leave it out.")
    logs = []
    for name in names:
        try:
            module = __import__(name)
        except ImportError:
            raise ConfigError(
                f"--report-to {name}: the package is not installed", f"pip install 'mlx-lora[{name}]'"
            ) from None
        shown = {k: v for k, v in params.items() if isinstance(v, (str, int, float, bool))}
        module.init(project=params["project_name"] or Path.cwd().name, config=json.loads(json.dumps(shown)))
        logs.append(lambda fields, step, log=module.log: log(fields, step=step))
    return logs


def _next_steps(model: str, folder: Path) -> None:
    console.note()
    console.title("Next")
    for command in ("chat", "generate", "fuse"):
        rest = {"generate": ' --prompt "..."', "fuse": " --save-path fused_model"}.get(command, "")
        console.note(f"  mlx-lora {command} --model {model} --adapter-path {folder}{rest}")
    console.note(f"  mlx-lora convert {folder} {folder}-peft --to peft")
