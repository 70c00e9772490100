"""Ask a running ``mlx-lora serve`` with the official client (pip install openai). MODEL is the base or an adapter."""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("MLX_LORA_URL", "http://127.0.0.1:8080/v1"),
    api_key=os.environ.get("MLX_LORA_API_KEY", "not-needed"),  # the server's --api-key, if it has one
)
model = os.environ.get("MODEL", "base")
messages = [{"role": "user", "content": "Anna left a red kite at the park."}]
for chunk in client.chat.completions.create(model=model, messages=messages, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
