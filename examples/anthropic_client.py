"""Ask a running ``mlx-lora serve`` with Anthropic's client (pip install anthropic). MODEL is the base or an adapter."""

import os

from anthropic import Anthropic

client = Anthropic(
    base_url=os.environ.get("MLX_LORA_URL", "http://127.0.0.1:8080"),
    api_key=os.environ.get("MLX_LORA_API_KEY", "not-needed"),  # the server's --api-key, if it has one
)
model = os.environ.get("MODEL", "base")
messages = [{"role": "user", "content": "Anna left a red kite at the park."}]
with client.messages.stream(model=model, max_tokens=200, messages=messages) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print()
