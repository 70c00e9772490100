"""The command line's work in Python: fine-tune, look at the result, save it for mlx-lm and for PEFT.

python examples/fine_tune.py
"""

import mlx_lora  # before mlx: on Linux it opens a fast BLAS
from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from mlx_lora.tiny_base import PATH, skill

# The tiny model that comes with the package; any Hugging Face model goes here.
model, tokenizer = mlx_lora.load(PATH)

data = DataConfig(mask_prompt=True)
train_set = mlx_lora.tokenize(skill.rows("train", 400), tokenizer, data)
valid_set = mlx_lora.tokenize(skill.rows("valid", 40), tokenizer, data)

# Freezes the base and adds the adapters: at first they change nothing.
mlx_lora.attach(model, AdapterConfig(method="dora", rank=8, alpha=32, num_layers=-1))

config = TrainConfig(iters=60, batch_size=16, steps_per_report=20, steps_per_eval=60)
optimizer = mlx_lora.build_optimizer(OptimizerConfig(learning_rate=2e-3, warmup=5), steps=config.iters)
for report in mlx_lora.train(model, optimizer, train_set, valid_set, config):
    if not isinstance(report, mlx_lora.Progress):
        print(report)

adapter = mlx_lora.extract(model)  # a value: a config and named arrays
mlx_lora.save_adapter(adapter, "adapters", overwrite=True)  # loads in mlx-lm
mlx_lora.save_adapter(adapter, "adapters-peft", format="peft", overwrite=True)  # loads in PEFT and transformers

mlx_lora.unmount(model)  # the base again
mlx_lora.mount(model, adapter)  # and back, in milliseconds
for layer in mlx_lora.fuse(model):
    print(layer.path, layer.storage, f"cosine {layer.cosine:.4f}")
