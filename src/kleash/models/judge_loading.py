"""Opening sequence classifiers as judges: whole, or as a LoRA adapter with its head on a base.

Beside the weights this finds out two things that a configuration does not say reliably: how many
tokens the classifier can take, and whether padding changes its scores.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kleash.errors import ModelError
from kleash.models.loading import (
    Attention,
    Dtype,
    load_classifier,
    load_config,
    load_tokenizer,
    quiet,
    switch_off_dropout,
)
from kleash.models.lora import compilers_kept, require_peft

_ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SAME = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.05}
"""Relative to 1 + |score|: what rounding alone may change."""
_PROBE_TOKENS = (3, 9)


def load_judge(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: Dtype = "float32",
    device: str = "cpu",
    attention: Attention = "auto",
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a classifier of one output and the tokenizer it reads with.

    Args:
        path: a Hugging Face directory or hub name; with an adapter, of the base it was trained on.
        adapter: directory where peft saved an adapter for sequence classification. Its own
            tokenizer is taken where it has one.
        dtype: of the parameters.
        device: a torch device.
        attention: implementation of attention.
        revision: of a hub name.

    Raises:
        ModelError: model, adapter or tokenizer cannot be used, or the head would be random.
    """
    if adapter is None:
        _refuse_adapter_as_path(Path(path))
        model = load_classifier(
            path, dtype=dtype, device=device, attention=attention, revision=revision
        )
    else:
        model = _with_adapter(path, Path(adapter), dtype, device, attention, revision)
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = (
        load_tokenizer(cast(Path, adapter)) if own else load_tokenizer(path, revision=revision)
    )
    return model.requires_grad_(False), tokenizer


def most_tokens(model: PreTrainedModel) -> int | None:
    """How many tokens a text may have; None: no limit.

    The configuration's `max_position_embeddings` counts rows of a table, and some architectures
    never reach the first ones: RoBERTa and its kin count positions from the padding id on.
    """
    claimed = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [claimed] if isinstance(claimed, int) and claimed > 0 else []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and last in ("position_embeddings", "embed_positions"):
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - before)
    return min(limits, default=None)


@torch.no_grad()
def padding_changes(model: PreTrainedModel, limit: int | None) -> bool:
    """Whether a short text scores otherwise beside a longer one, padded on the right.

    Recurrent architectures read the padding, and some take the last position for the text's end.
    Such a classifier is to read texts of one length together.
    """
    pad = model.config.pad_token_id
    if pad is None:
        return False  # it reads one text at a time
    short, long = (min(count, limit or count) for count in _PROBE_TOKENS)
    ids = [token for token in range(_vocabulary(model)) if token != pad][-long:]
    if len(ids) < long:
        return False
    device = model.device
    alone = model(input_ids=torch.tensor([ids[:short]], device=device)).logits[0, 0]
    padded = torch.tensor([ids[:short] + [pad] * (long - short), ids], device=device)
    mask = torch.tensor([[1] * short + [0] * (long - short), [1] * long], device=device)
    beside = model(input_ids=padded, attention_mask=mask).logits[0, 0]
    return not _same(alone, beside, model.dtype)


def adapter_weights(adapter: str | Path) -> dict[str, Tensor]:
    """The weights that an adapter saved whole, such as a head, by their names in the model.

    Raises:
        ModelError: there is no adapter in safetensors.
    """
    try:
        with safe_open(Path(adapter) / _ADAPTER, framework="pt") as saved:
            names = [name for name in saved.keys() if ".lora_" not in name]  # noqa: SIM118
            return {_plain(name): saved.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"expected an adapter saved by peft in {str(adapter)!r}, got no {_ADAPTER} that can be "
            f"read there: give its directory, with weights as safetensors ({_first_line(error)})"
        ) from error


def _plain(name: str) -> str:
    return (
        name.removeprefix(_PREFIX)
        .replace(".modules_to_save.default.", ".")
        .replace(".modules_to_save.", ".")
    )


def _refuse_adapter_as_path(path: Path) -> None:
    settings = path / "adapter_config.json"
    if not settings.is_file() or (path / "config.json").is_file():
        return
    try:
        base = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    named = f" ({base!r})" if isinstance(base, str) else ""
    raise ModelError(
        f"expected a reward model in {str(path)!r}, got a LoRA adapter without the model it was "
        f"trained on: give that model{named} as `path`, and this directory as `adapter`"
    )


def _with_adapter(
    path: str | Path,
    adapter: Path,
    dtype: Dtype,
    device: str,
    attention: Attention,
    revision: str | None,
) -> PreTrainedModel:
    brought = adapter_weights(adapter)
    config = load_config(path, revision=revision)
    # The base of a judge is often a language model, whose configuration speaks of no outputs.
    heads = [weight for name, weight in brought.items() if _is_head(name)]
    labels = heads[-1].shape[0] if heads else cast(int, config.num_labels)
    if labels != 1:
        raise ModelError(
            f"expected a reward model of 1 output, got num_labels = {labels} from the adapter in "
            f"{str(adapter)!r}: train it with num_labels=1"
        )
    config.num_labels = labels
    try:
        with quiet():
            model, info = cast(Any, AutoModelForSequenceClassification).from_pretrained(
                str(path),
                config=config,
                revision=revision or "main",
                dtype=dtype,
                attn_implementation=None if attention == "auto" else attention,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    # The files come from others, and each architecture's code raises errors of its own.
    except Exception as error:
        raise ModelError(
            f"expected the base of the adapter {str(adapter)!r} at {str(path)!r}, got: "
            f"{_first_line(error)}"
        ) from error
    random = sorted(set(info["missing_keys"]) - brought.keys())
    if random:
        raise ModelError(
            f"expected a trained head for {str(path)!r}, got no weights for "
            f"{', '.join(random[:3])} there or in the adapter {str(adapter)!r}: save the adapter "
            "with its head (task_type SEQ_CLS)"
        )
    model = model.to(device)
    switch_off_dropout(model)
    return _merged(model, adapter)


def _is_head(name: str) -> bool:
    return name.split(".")[0] in ("score", "classifier") and name.endswith(".weight")


@torch.no_grad()
def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with the adapter in its weights, which scores as the unmerged one does."""
    peft = require_peft()
    text = torch.arange(_vocabulary(model), device=model.device)[-_PROBE_TOKENS[1] :][None]
    try:
        with compilers_kept(), warnings.catch_warnings():
            # A key that the model lacks is a warning there; here it is another model's adapter.
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", FutureWarning)
            loaded = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
            _require_same_names(set(peft.get_peft_model_state_dict(loaded)), adapter)
            before = loaded(input_ids=text).logits[0, 0]
            merged = cast(PreTrainedModel, loaded.merge_and_unload())
    # Warnings are errors here, and peft's dozens of tuners raise what they like.
    except Exception as error:
        raise ModelError(
            f"expected a LoRA adapter for {type(model).__name__} in {str(adapter)!r}, got: "
            f"{_first_line(error)}"
        ) from error
    after = merged(input_ids=text).logits[0, 0]
    if not _same(before, after, merged.dtype):
        raise ModelError(
            f"expected the adapter in {str(adapter)!r} to score the same merged into its base, got "
            f"{float(after):.6g} for {float(before):.6g}: merge it with peft and give the result "
            "as `path`"
        )
    switch_off_dropout(merged)
    return merged


def _require_same_names(taken: set[str], adapter: Path) -> None:
    """Every weight of the adapter has found its place: a smaller base would drop some of them."""
    with safe_open(adapter / _ADAPTER, framework="pt") as saved:
        left = sorted(set(saved.keys()) - taken)
    if left:
        raise ValueError(f"no place in the model for {', '.join(left[:3])}")


def _vocabulary(model: PreTrainedModel) -> int:
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]


def _same(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    gap = float((one.double() - other.double()).abs())
    return gap <= _SAME[dtype] * (1 + abs(float(one)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def saved_head(
    folder: Path, adapter: str | None, names: Sequence[str] = ("score.weight",)
) -> Mapping[str, Tensor]:
    """The head as the files have it: of the adapter, or of the checkpoint; empty where unknown."""
    if adapter is not None:
        return {name: w for name, w in adapter_weights(adapter).items() if name in names}
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with safe_open(file, framework="pt") as saved:
            found |= {name: saved.get_tensor(name) for name in names if name in set(saved.keys())}
    return found
