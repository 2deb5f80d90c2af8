"""Tiny random models of many architectures of transformers, and the ways a policy can begin."""

import warnings
from pathlib import Path
from typing import Any

import peft
import tiny_models
import torch
from tiny_configs import config
from transformers import AutoModelForCausalLM, PreTrainedModel

TWELVE = {
    "gpt2": "GPT-2",
    "llama": "Llama",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma 3",
    "mistral": "Mistral",
    "phi": "Phi",
    "opt": "OPT",
    "gpt_neox": "GPT-NeoX",
    "falcon": "Falcon",
    "bloom": "Bloom",
    "mixtral": "Mixtral (mixture of experts)",
    "mamba": "Mamba (state space)",
}
WAYS = ("full", "LoRA", "LoRA on an adapter", "LoRA with saved head")


def sum_of_words(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that is hardly ever the same twice, so that two steps move every weight."""
    return [float(sum(hash_of(word) for word in text.split())) for text in responses]


def hash_of(word: str) -> int:
    """A small number for a word, the same in every process."""
    return sum(map(ord, word)) % 7


def save(folder: Path, kind: str) -> Path:
    """A random model with distributions that are far from uniform, and its tokenizer."""
    tok = tiny_models.tokenizer()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config(kind, len(tok)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def linear(model: PreTrainedModel) -> str:
    """Name of a linear layer of the trunk that an adapter can have."""
    head = model.get_output_embeddings()
    preferred = ("q_proj", "query_key_value", "c_attn", "in_proj")
    names = [
        name.split(".")[-1]
        for name, module in model.named_modules()
        if module is not head
        and type(module).__name__.removeprefix("Falcon") in ("Linear", "Conv1D")
    ]
    return next((name for name in preferred if name in names), names[0])


def head_name(model: PreTrainedModel) -> str:
    """Name of the head's module."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def save_adapter(folder: Path, base: Path) -> Path:
    """An adapter, as supervised training would leave it: far from no change."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(target_modules=[linear(model)], r=3, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, settings)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        wrapped.save_pretrained(folder)
    return folder


def way(name: str, folder: Path, base: Path) -> dict[str, Any]:
    """The `policy` section of a run that begins in this way."""
    model = AutoModelForCausalLM.from_pretrained(base)
    policy: dict[str, Any] = {"path": str(base)}
    if name != "full":
        policy["lora"] = {"rank": 2, "alpha": 8, "targets": [linear(model)]}
    if name == "LoRA on an adapter":
        policy["adapter"] = str(save_adapter(folder / "adapter", base))
    if name == "LoRA with saved head":
        policy["lora"]["modules_to_save"] = [head_name(model)]
    return policy


def open_plainly(folder: Path) -> torch.nn.Module:
    """What anyone opens there with transformers and peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (folder / "adapter_config.json").is_file():
            settings = peft.PeftConfig.from_pretrained(folder)
            base = AutoModelForCausalLM.from_pretrained(settings.base_model_name_or_path)
            return peft.PeftModel.from_pretrained(base, folder).eval()
        return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def reading(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """log-probabilities of every word, by the model's own logits, in float64."""
    return model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
