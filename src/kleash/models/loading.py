"""Opening checkpoints: Hugging Face directories or hub names, safetensors only, dropout off.

Nothing is loaded that could execute code: weights come from safetensors, `trust_remote_code` is
off. What the library would do with a warning (initialise a missing matrix at random) is an error.
Left out: what the models are used for; that is `models`, `values` and `reward_models`.
"""

import contextlib
import json
import re
from collections.abc import Collection, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from kleash.errors import ModelError
from kleash.models.hub import require_source
from kleash.models.probing import first_lines
from kleash.models.quantization import (
    Quantization,
    compute_in,
    dequantised,
    keep_rest_in,
    new_settings,
    opening,
    quantised_layers,
    require_library,
    stored_settings,
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]

_OF_FILES = (OSError, ValueError, ImportError, SafetensorError)
"""What `from_pretrained` raises of files and settings; other errors come from the model's code."""


def load_causal_lm(
    path: str | Path,
    *,
    dtype: Dtype,
    device: str,
    attention: Attention,
    revision: str | None = None,
    quantization: Quantization | Mapping[str, Any] = "none",
) -> PreTrainedModel:
    """Open a causal language model, complete and without dropout, in evaluation mode.

    Args:
        path: a Hugging Face directory or hub name.
        dtype: of the parameters, and of the products of quantised ones.
        device: a torch device.
        attention: implementation of attention.
        revision: of a hub name.
        quantization: how the linear layers are kept, or bitsandbytes' own settings. A checkpoint
            that is quantised keeps its settings; with `none` it is opened as plain matrices.

    Raises:
        ModelError: if there is no model, only pickled weights, or some weights are missing; or
            bitsandbytes is missing where it is needed.
    """
    _require_decoder(load_config(path, revision=revision), path)
    model, missing = _load(
        AutoModelForCausalLM, path, revision, dtype, device, attention, quantization
    )
    if missing:
        raise ModelError(
            f"expected every weight of the language model in {str(path)!r}, got none for "
            f"{_some(missing)}: they would be random numbers; give a complete checkpoint"
        )
    return model


def _require_decoder(settings: PretrainedConfig, path: str | Path) -> None:
    """Refuse what is no causal language model by its class, before its weights are read."""
    name = (settings.architectures or [type(settings).__name__])[0]
    if settings.is_encoder_decoder:
        raise ModelError(
            f"expected a causal language model in {str(path)!r}, got {name}, an encoder–decoder, "
            "which writes from what its encoder has read: take a model that is a decoder alone"
        )
    if type(settings) not in cast(Any, AutoModelForCausalLM)._model_mapping:
        raise ModelError(
            f"expected a causal language model in {str(path)!r}, got {name}, for which "
            "transformers has no head that predicts the next token: take a decoder"
        )


def load_classifier(
    path: str | Path,
    *,
    dtype: Dtype,
    device: str,
    attention: Attention,
    revision: str | None = None,
) -> PreTrainedModel:
    """Open a sequence classifier of one output, complete and without dropout.

    Raises:
        ModelError: if there is no model, only pickled weights, the number of outputs is not 1, or
            the head (or any other weight) is missing and would be random.
    """
    labels = load_config(path, revision=revision).num_labels
    if labels != 1:
        raise ModelError(
            f"expected a reward model of 1 output in {str(path)!r}, got num_labels = {labels}: "
            "train or export it with num_labels=1"
        )
    model, missing = _load(
        AutoModelForSequenceClassification, path, revision, dtype, device, attention
    )
    if missing:
        raise ModelError(
            f"expected a trained reward model in {str(path)!r}, got no weights for "
            f"{_some(missing)}: its head would be random numbers; give a checkpoint saved by "
            "AutoModelForSequenceClassification"
        )
    return model


def load_config(path: str | Path, *, revision: str | None = None) -> PretrainedConfig:
    """Read a model's configuration, dropouts set to 0.

    Raises:
        ModelError: if there is none, it names no architecture that transformers knows, or a
            revision is asked of a directory.
    """
    check_revision(path, revision)
    require_source("a model", path, revision)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                str(path), revision=revision or "main", trust_remote_code=False
            )
    # Each of several hundred configurations checks itself, and raises whatever it likes.
    except Exception as error:
        raise ModelError(_cannot_load("a model", path, error)) from error
    _zero_dropout_settings(config)
    return config


def check_revision(path: str | Path, revision: str | None) -> None:
    """Refuse a revision of a directory: there is but one, and a wish for another goes unheard.

    Raises:
        ModelError: if there is a revision and the path is a directory.
    """
    if revision is not None and Path(path).is_dir():
        raise ModelError(
            f"expected a hub name with revision {revision!r}, got the directory {str(path)!r}: "
            "leave the revision out, or name the model as the hub does"
        )


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Open a tokenizer, the one that was saved.

    For some architectures the library builds its own tokenizer around the saved vocabulary. Where
    that makes another kind of tokenizer (byte-level pieces out of whole words: every text becomes
    nothing), the saved file is read as it is.

    Raises:
        ModelError: if there is none.
    """
    require_source("a tokenizer", path, revision)
    file = Path(path) / "tokenizer.json"
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                str(path), revision=revision or "main", trust_remote_code=False
            )
            if file.is_file() and _kind(tokenizer) != _saved_kind(file):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path))
            return tokenizer
    # Its files come from others, and the library raises bare `Exception` among the rest.
    except Exception as error:
        raise ModelError(_cannot_load("a tokenizer", path, error)) from error


def require_special_tokens(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Check that a tokenizer can end a text and pad a batch.

    Neither is chosen silently: an end token the model never learnt would never be written. The
    padding token may be the end token, since masks come from lengths and not from ids.

    Raises:
        ModelError: if the tokenizer has no end-of-sequence or no padding token.
    """
    for role, token in (("eos_token", tokenizer.eos_token), ("pad_token", tokenizer.pad_token)):
        if token is None:
            hint = (
                "name the token that ends a text"
                if role == "eos_token"
                else f"any token serves, also {tokenizer.eos_token!r}, for masks come from lengths"
            )
            raise ModelError(
                f"expected a tokenizer with {role} in {str(path)!r}, got None: set {role!r} in its "
                f"tokenizer_config.json ({hint})"
            )


def number_of_words(tokenizer: PreTrainedTokenizerBase, rows: int, path: str | Path) -> int:
    """Count the rows of a vocabulary matrix that stand for text: the largest id + 1.

    Checkpoints often pad the vocabulary to a round number. An id without text can be neither read
    nor rewarded, so the rows beyond the tokenizer have probability 0 for everyone alike: the
    sampler, the policy's scoring and the reference's. Differently padded copies of one model then
    stay comparable. Added tokens that have no row are no harm until one occurs in a text.

    Raises:
        ModelError: if the matrix has no row for the end token or for a token of the basic
            vocabulary.
    """
    ids = set(tokenizer.get_vocab().values())
    words = max(ids) + 1
    spare = set(tokenizer.added_tokens_decoder) - {cast("int | None", tokenizer.eos_token_id)}
    if words > rows and max(ids - spare) < rows:
        return rows
    if words > rows:
        raise ModelError(
            f"expected at most {rows} token ids, the rows of the model in {str(path)!r}, got a "
            f"tokenizer with {words}: resize the model's embeddings or take its own tokenizer"
        )
    return words


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's end token and those of the model's own settings.

    Chat models often have several (end of turn, end of text), listed in `generation_config`.

    Raises:
        ModelError: what is listed are no token ids.
    """
    return ending_ids(model.generation_config, tokenizer, owner=type(model).__name__)


def ending_ids(
    settings: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, *, owner: str
) -> tuple[int, ...]:
    """The tokenizer's end token and those of a model's own settings, which may be missing.

    Raises:
        ModelError: what is listed are no token ids; it names the owner.
    """
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, getattr(settings, "eos_token_id", None)):
        some = cast(list[object], [] if ids is None else ids if isinstance(ids, list) else [ids])
        if not all(isinstance(one, int) for one in some):
            raise ModelError(
                f"expected token ids as eos_token_id of {owner} (generation_config.json), got "
                f"{ids!r}: list the ids that end a text"
            )
        found.update(cast(list[int], some))
    return tuple(sorted(found))


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0 and put it in evaluation mode, for training too.

    Dropout makes log-probabilities unrepeatable: the ratio of the first minibatch would not be 1,
    and a policy would be at a distance from itself. Besides `nn.Dropout` modules, attention layers
    keep rates as plain attributes that only `training` silences.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # pyright: ignore[reportPrivateUsage]
            module.p = 0.0
        for name, rate in list(vars(module).items()):
            if "drop" in name and isinstance(rate, float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Silence the library's progress bars and notices; what matters is checked and raised."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _load(
    auto: Any,
    path: str | Path,
    revision: str | None,
    dtype: Dtype,
    device: str,
    attention: Attention,
    quantization: Quantization | Mapping[str, Any] = "none",
) -> tuple[PreTrainedModel, list[str]]:
    """Open a model; return it with the names of the weights that its files lack."""
    config = load_config(path, revision=revision)
    how = _quantised_opening(config, path, dtype, device, quantization)
    _refuse_pickles(path)
    _require_generation_settings(Path(path))
    try:
        with quiet():
            model, info = auto.from_pretrained(
                str(path),
                config=config,
                revision=revision or "main",
                dtype=dtype,
                attn_implementation=None if attention == "auto" else attention,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **how,
            )
        model = model.to(device)
    except _OF_FILES as error:
        if "attn_implementation" in str(error) or "attention implementation" in str(error):
            raise ModelError(
                f"expected an attention implementation that the model in {str(path)!r} has, got "
                f"{attention!r}: take 'auto' or 'eager'"
            ) from error
        raise ModelError(_cannot_load("a model", path, error)) from error
    # Raised by the code of one of several hundred architectures.
    except Exception as error:
        name = (config.architectures or [type(config).__name__])[0]
        raise ModelError(
            f"expected a configuration that {name} accepts in {str(path)!r}, got an error in the "
            f"model's own code: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    surplus = _surplus_layers(model.state_dict().keys(), info["unexpected_keys"])
    if surplus:
        raise ModelError(
            f"expected a configuration with every layer that the files in {str(path)!r} hold, got "
            f"none for {_some(surplus)}: a model with fewer layers is another model; correct the "
            "number of layers in config.json, or save the shorter model with save_pretrained"
        )
    if how:
        model = _with_quantisation(model, path, dtype, quantization)
    switch_off_dropout(model)
    return model, sorted(info["missing_keys"])


def _quantised_opening(
    shape: PretrainedConfig,
    path: str | Path,
    dtype: Dtype,
    device: str,
    quantization: Quantization | Mapping[str, Any],
) -> dict[str, Any]:
    """What `from_pretrained` is given besides; empty for weights that are and stay plain."""
    stored = stored_settings(shape, path)
    if stored is None and quantization == "none":
        return {}
    require_library()
    kind = shape.dtype if dtype == "auto" else getattr(torch, dtype)
    compute = kind if isinstance(kind, torch.dtype) else torch.float32
    wanted = quantization if isinstance(quantization, Mapping) else new_settings(compute)
    return opening(wanted, stored=stored is not None, device=device, compute=compute)


def _with_quantisation(
    model: PreTrainedModel,
    path: str | Path,
    dtype: Dtype,
    quantization: Quantization | Mapping[str, Any],
) -> PreTrainedModel:
    """A model that was opened in four bits, as it is wanted.

    Raises:
        ModelError: none of its layers is in four bits.
    """
    if not any(quantised_layers(model)):
        raise ModelError(
            f"expected linear layers to quantise in {str(path)!r}, got none in "
            f"{type(model).__name__}: leave quantization out"
        )
    if dtype != "auto":
        keep_rest_in(model, getattr(torch, dtype))
    if quantization == "none":
        return dequantised(model, model.dtype)
    compute_in(model, model.dtype)
    return model


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _surplus_layers(known: Collection[str], unexpected: Iterable[str]) -> list[str]:
    """Weights in files that are those of one layer more: a known name but for a layer's number.

    Other weights that a model has no place for (the head of a classifier that is opened as a
    language model) change nothing of what it computes.
    """
    patterns = {_NUMBER.sub("*", name) for name in known}
    return sorted(name for name in unexpected if _NUMBER.sub("*", name) in patterns)


def _kind(tokenizer: PreTrainedTokenizerBase) -> str:
    """Kind of a tokenizer's model: BPE, WordLevel, Unigram or WordPiece."""
    return type(cast(Any, tokenizer).backend_tokenizer.model).__name__


def _saved_kind(file: Path) -> str:
    return cast(str, json.loads(file.read_text(encoding="utf-8"))["model"]["type"])


def _refuse_pickles(path: str | Path) -> None:
    """Refuse a directory whose only weights are pickles, which can execute code when read."""
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(f.name for suffix in ("bin", "pt", "pth") for f in folder.glob(f"*.{suffix}"))
    if pickles:
        raise ModelError(
            f"expected weights as safetensors in {str(path)!r}, got {_some(pickles)}: a pickle can "
            "execute code when read; convert it with save_pretrained"
        )


def _require_generation_settings(folder: Path) -> None:
    """Refuse a file that the library would leave out without a word, and with it what ends a text.

    Raises:
        ModelError: `generation_config.json` is there and no JSON object.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        reason = f"a {type(found).__name__}"
    except (ValueError, OSError, RecursionError) as error:
        found, reason = None, _reason(error)
    if not isinstance(found, dict):
        raise ModelError(
            f"expected a JSON object in {str(file)!r}, which says what ends a text, got: {reason}; "
            "copy it from where the model began, or remove it"
        )


def _zero_dropout_settings(settings: PretrainedConfig) -> None:
    for name, value in settings.to_dict().items():
        if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(settings, name, 0.0)


def _cannot_load(what: str, path: str | Path, error: Exception) -> str:
    reason = _mistaken(what, Path(path)) or _reason(error)
    return f"expected {what} at {str(path)!r} (a Hugging Face directory or hub name), got: {reason}"


def _reason(error: Exception) -> str:
    """An error's message on one line; with its kind where that is no error of files."""
    if isinstance(error, _OF_FILES) and str(error).strip():
        return str(error).strip().splitlines()[0]
    return f"{type(error).__name__}: {first_lines(error)}" if str(error) else type(error).__name__


def _mistaken(what: str, path: Path) -> str | None:
    """What a path is instead of a model, where that can be seen; the library's words do not say."""
    if path.is_file():
        return f"a file: give the directory {str(path.parent)!r}"
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return (
            "a LoRA adapter without the model it was trained on: give that model as path, and this "
            "directory as its adapter (`policy.adapter`)"
        )
    vocabularies = [file for name in ("token*", "vocab*", "*.model") for file in path.glob(name)]
    if what == "a tokenizer" and path.is_dir() and not vocabularies:
        return (
            "a directory without one: copy tokenizer.json and tokenizer_config.json there from "
            "where the model began"
        )
    return None


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
