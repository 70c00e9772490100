"""Learn a preference (DPO) from pairs that the model itself generates: answers in quotes are preferred.

python examples/preference.py
"""

import random

import mlx_lora  # before mlx: on Linux it opens a fast BLAS
from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from mlx_lora.tiny_base import PATH, corpus
from mlx_lora.training import ValReport


def answers(model, tokenizer, questions: list[str]) -> list[str]:
    """The model's greedy answers."""
    from mlx_lm import batch_generate

    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    return [text.strip() for text in batch_generate(model, tokenizer, prompts, max_tokens=24).texts]


def pairs(model, tokenizer, count: int, seed: int) -> list[dict]:
    """Rows as TRL writes them. The chosen answer is the model's own answer when it is asked for quotes."""
    rng = random.Random(seed)
    facts = [corpus.Fact.draw(rng) for _ in range(count)]
    asked = [(fact.sentence(rng), rng.choice(fact.fields())[0]) for fact in facts]
    bare = answers(model, tokenizer, [f"{text} Say only the {key}." for text, key in asked])
    quoted = answers(model, tokenizer, [f"{text} Say the {key} in quotes." for text, key in asked])
    return [
        {"prompt": f"{text} Say only the {key}.", "chosen": chosen, "rejected": rejected}
        for (text, key), chosen, rejected in zip(asked, quoted, bare, strict=True)
        if chosen and rejected and chosen != rejected
    ]


def main(folder: str = "adapters", train: int = 240, held_out: int = 60, iters: int = 60) -> dict[str, float]:
    """Returns the rewards on held-out pairs."""
    model, tokenizer = mlx_lora.load(PATH)
    sets = [
        mlx_lora.tokenize(pairs(model, tokenizer, count, seed), tokenizer, DataConfig(), kind="pairs")
        for seed, count in enumerate((train, held_out))
    ]
    test = [row["prompt"] for row in pairs(model, tokenizer, 4, seed=2)]
    before = answers(model, tokenizer, test)
    for report in mlx_lora.run(
        folder,
        model=(model, tokenizer),
        data=tuple(sets),
        adapter=AdapterConfig(rank=8, num_layers=-1),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup=5),
        # The reference is the model before training; no second one is loaded.
        train=TrainConfig(loss="dpo", beta=0.1, iters=iters, batch_size=8, val_batches=-1, steps_per_report=20),
    ):
        if isinstance(report, ValReport):
            rewards = report.metrics
        if not isinstance(report, mlx_lora.Progress):
            print(report)
    for question, was, now in zip(test, before, answers(model, tokenizer, test), strict=True):
        print(f"{question}\n  before: {was}\n  after:  {now}")
    return rewards


if __name__ == "__main__":
    print(main())
