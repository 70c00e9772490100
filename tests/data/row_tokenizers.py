"""Small tokenizers made here, and short ways to tokenize rows with them."""

import numpy as np
import pytest

from mlx_lora.config import DataConfig
from mlx_lora.data import tokenize
from mlx_lora.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}({{ c.function.arguments | tojson }})</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template=CHATML, merges=(("h", "e"), ("\u010a", "\u010a"), ("\u0120", "o"))):
    """A byte-level tokenizer of 262 tokens and the ``merges``, with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    out = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|endoftext|>")
    out.chat_template = template
    return out


def learned(example, tokenizer):
    """The runs of learned tokens, decoded."""
    cuts = np.flatnonzero(np.diff(np.r_[False, example.mask, False].astype(int)))
    return [tokenizer.decode(example.tokens[a:b].tolist()) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]


def chat(*contents):
    """Messages by user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def one(row, tokenizer, **knobs):
    return tokenize([row], tokenizer, DataConfig(**knobs))[0]


def faults_of(rows, tokenizer, **knobs):
    with pytest.raises(DataError) as error:
        tokenize(rows, tokenizer, DataConfig(**knobs))
    return error.value.message


def with_bos(template=None, merges=()):
    """A tokenizer that adds BOS, as Llama's and Gemma's do."""
    from tokenizers import processors

    tokenizer = make_tokenizer(template, merges)
    bos = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer
