"""Adapters of many kinds, as another library leaves them: far from no change."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from kleash.models.lora import compilers_kept

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "ia3": {},
    "trainable tokens": {"trainable_token_indices": [5, 8]},
    "saved": {},
}
NEIGHBOURS: dict[str, tuple[type[peft.PeftConfig], dict[str, Any]]] = {
    "loha": (peft.LoHaConfig, {"r": 2}),
    "lokr": (peft.LoKrConfig, {"r": 2}),
    "oft": (peft.OFTConfig, {"r": 0, "oft_block_size": 4}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4}),
    "vera": (peft.VeraConfig, {"r": 2}),
    "trainable tokens alone": (peft.TrainableTokensConfig, {"token_indices": [5, 8]}),
}
"""Kinds that change weights in other ways."""
PROMPTS: dict[str, type[peft.PeftConfig]] = {
    "prompt": peft.PromptTuningConfig,
    "prefix": peft.PrefixTuningConfig,
    "p": peft.PromptEncoderConfig,
}
"""Kinds that change no weights: they add inputs."""
EMBEDDINGS_ONLY = ("trainable tokens", "trainable tokens alone")
NOT_ON_EMBEDDINGS = ("ia3", "loha", "lokr", "boft", "vera")
"""peft has no layers for it."""
PLACES = {"attention": "q_proj", "head": "lm_head", "embedding": "embed_tokens"}


def made(kind: str, place: str) -> peft.PeftConfig:
    target = PLACES[place]
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if kind in NEIGHBOURS:
        settings, own = NEIGHBOURS[kind]
        return settings(**{"target_modules": [target], **own, **common})
    if kind == "ia3":
        return peft.IA3Config(target_modules=[target], feedforward_modules=[], **common)
    common |= {"r": 3, "lora_alpha": 7, **KINDS[kind]}
    if kind == "saved":
        return peft.LoraConfig(target_modules=["v_proj"], modules_to_save=[target], **common)
    targets = ["v_proj"] if kind == "trainable tokens" else [target]
    return peft.LoraConfig(target_modules=targets, **common)


def wrap(model: Any, settings: peft.PeftConfig) -> Any:
    with compilers_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, settings)


def save_adapter(base: Path, folder: Path, settings: peft.PeftConfig) -> Path:
    """An adapter of large random numbers on a base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        wrapped = wrap(AutoModelForCausalLM.from_pretrained(base), settings)
        with torch.no_grad():
            for name, p in wrapped.named_parameters():
                if p.requires_grad and "magnitude" not in name:
                    p.add_(torch.randn_like(p) * 0.3)
        wrapped.save_pretrained(folder)
    return folder
