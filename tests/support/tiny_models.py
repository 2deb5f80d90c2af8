"""Tiny models and tokenizers with random weights, saved as Hugging Face directories.

Weights are larger than a real initialisation's, so that distributions are far from uniform and a
wrong scale, cap or position is seen. The tokenizer's words are `w0`, `w1`, ...; special tokens
come first.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging

# Progress bars of the tests' own models are nobody's business.
logging.disable_progress_bar()

REAL = Path(__file__).parents[3] / "shared" / "real"
"""An optional folder of real inputs beside the checkout."""

Architecture = Literal["gpt2", "llama", "qwen2", "gemma2", "cohere", "granite", "phi"]
ARCHITECTURES: tuple[Architecture, ...] = (
    "gpt2",
    "llama",
    "qwen2",
    "gemma2",
    "cohere",
    "granite",
    "phi",
)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tokenizer(
    words: int = 20,
    *,
    eos: str | None = "<eos>",
    pad: str | None = "<pad>",
    bos: str | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; special tokens that share a name share an id; BOS is added."""
    special = dict.fromkeys(t for t in ("<unk>", eos, pad, bos) if t is not None)
    roles = ("<user>", "<assistant>")
    vocabulary = [*special, *roles, *(f"w{i}" for i in range(words))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos is not None:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary.index(bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token=eos, pad_token=pad, bos_token=bos
    )
    made.chat_template = chat_template
    return made


def config(kind: Architecture, rows: int, **settings: Any) -> PretrainedConfig:
    """Configuration of a model of width 16 and two layers."""
    if kind == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        dropouts = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
        ends = {"bos_token_id": 1, "eos_token_id": 1}
        return GPT2Config(
            vocab_size=rows, initializer_range=0.3, **sizes, **dropouts, **ends, **settings
        )
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    }
    common: dict[str, Any] = {
        "vocab_size": rows,
        "initializer_range": 0.3,
        "attention_dropout": 0.5,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 1,
        **sizes,
    }
    match kind:
        case "llama":
            return LlamaConfig(**{**common, **settings})
        case "qwen2":
            return Qwen2Config(**{**common, "tie_word_embeddings": True, **settings})
        case "gemma2":
            # A cap that the logits really reach.
            special = {"final_logit_softcapping": 1.5, "head_dim": 8, "query_pre_attn_scalar": 8}
            return Gemma2Config(**{**common, **special, **settings})
        case "cohere":
            return CohereConfig(**{**common, "logit_scale": 0.25, **settings})
        case "granite":
            return GraniteConfig(**{**common, "logits_scaling": 3.0, **settings})
        case "phi":
            # The one with a bias in its head.
            return PhiConfig(**{**common, **settings})


def save_model(
    folder: Path,
    kind: Architecture = "llama",
    *,
    tok: PreTrainedTokenizerFast | None = None,
    rows: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """A causal language model and its tokenizer."""
    tok = tok or tokenizer()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(kind, rows or len(tok), **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def save_classifier(
    folder: Path,
    kind: Architecture = "llama",
    *,
    tok: PreTrainedTokenizerFast | None = None,
    seed: int = 0,
    labels: int = 1,
    **settings: Any,
) -> Path:
    """A sequence classifier (a reward model) and its tokenizer."""
    tok = tok or tokenizer()
    torch.manual_seed(seed)
    made = config(kind, len(tok), num_labels=labels, **settings)
    made.pad_token_id = tok.pad_token_id
    model = AutoModelForSequenceClassification.from_config(made)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder
