"""Small checkpoints that differ in known ways, and files to audit them on."""

import json
from pathlib import Path

import torch
from tiny_models import tokenizer
from transformers import AutoModelForCausalLM

SMALL = {"max_new_tokens": 8, "keep": 4}


def change(folder: Path, into: Path, how) -> Path:
    """A copy of a model with its weights changed in place by `how`."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            how(name, parameter)
    model.save_pretrained(into)
    tokenizer().save_pretrained(into)
    return into


def noise(_name: str, parameter: torch.Tensor) -> None:
    parameter.add_(0.1 * torch.randn_like(parameter))


def int8(_name: str, parameter: torch.Tensor) -> None:
    step = parameter.abs().max().clamp(min=1e-9) / 127
    parameter.copy_((parameter / step).round() * step)


def bf16(_name: str, parameter: torch.Tensor) -> None:
    parameter.copy_(parameter.bfloat16().float())


def pruned(name: str, parameter: torch.Tensor) -> None:
    if parameter.dim() == 2 and "embed" not in name and "wte" not in name:
        threshold = parameter.abs().flatten().kthvalue(parameter.numel() // 2).values
        parameter.mul_(parameter.abs() > threshold)


def write_prompts(file: Path) -> Path:
    rows = [
        {"prompt": " ".join(f"w{(n * 7 + k) % 20}" for k in range(1 + n % 5)), "group": "ab"[n % 2]}
        for n in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_texts(file: Path) -> Path:
    rows = [
        {"text": " ".join(f"w{(n * n + 3 * k) % 20}" for k in range(3 + n % 17))} for n in range(30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
