"""Fine-tune a model in Python, and save the adapter for PEFT.

python examples/fine_tune.py
"""

import mlx_lora  # before mlx: on Linux it opens a fast BLAS
from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from mlx_lora.tiny_base import PATH, skill

# The tiny model and data that come with the package. With your own, run() takes names and loads both:
# model="Qwen/Qwen3-0.6B", data=DataConfig(data="folder/with/jsonl/files", mask_prompt=True).
model, tokenizer = mlx_lora.load(PATH)
data = DataConfig(mask_prompt=True)
train_set = mlx_lora.tokenize(skill.rows("train", 400), tokenizer, data)
valid_set = mlx_lora.tokenize(skill.rows("valid", 40), tokenizer, data)

for report in mlx_lora.run(
    "adapters",  # receives the adapter in mlx-lm's format, and everything needed to resume
    model=(model, tokenizer),
    data=(train_set, valid_set),
    adapter=AdapterConfig(method="dora", rank=8, alpha=32, num_layers=-1),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup=5),
    train=TrainConfig(iters=60, batch_size=16, val_batches=2, steps_per_report=20),
):
    if not isinstance(report, mlx_lora.Progress):
        print(report)

mlx_lora.save_adapter(mlx_lora.extract(model), "adapters-peft", format="peft", overwrite=True)
