"""`kleash.audit`: the audit as a function."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from kleash.auditing.inputs import Source
from kleash.auditing.model_sources import ModelSource, opened_pair
from kleash.auditing.options import AuditKeywords, SourceKind, make_options, one_source
from kleash.auditing.result import Audit
from kleash.auditing.runner import Watch, audit_pair

Texts = str | Path | Sequence[str] | Sequence[Mapping[str, Any]]
"""A file, or texts, or rows as a file would hold them."""


def audit(
    policy: ModelSource,
    reference: ModelSource,
    prompts: Texts | None = None,
    *,
    texts: Texts | None = None,
    responses: Texts | None = None,
    watch: Watch | None = None,
    **options: Unpack[AuditKeywords],
) -> Audit:
    """Measure exactly how far a policy is from a reference, with 95 % intervals.

    Give one of prompts (the policy answers them: KL(π‖π_ref) on its own responses), texts (both
    read them) or responses (rows of prompt and response).

    Args:
        policy: a Hugging Face directory or hub name, the directory of a PEFT adapter or of a run
            (the policy of its newest checkpoint), or a loaded transformers or PEFT model with its
            tokenizer, as `(model, tokenizer)`.
        reference: the same.
        prompts: a prompt file, or a list of prompts.
        texts: a .txt file, a file with rows of `text`, or a list of texts.
        responses: a file with rows of `prompt` and `response`, or a list of such rows.
        watch: called after each batch.
        options: see `AuditOptions`, which names them all with their defaults.

    Raises:
        ConfigError: if there is not exactly one source, or an option cannot be.
        ModelError: if a model cannot be used, or the two have different tokens.
        PromptError: if the source cannot be used.
        RunError: if `output` cannot be written, or holds another audit.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> inner = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>"))
        >>> inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> ends = {"eos_token": "<eos>", "pad_token": "<eos>"}
        >>> tok = PreTrainedTokenizerFast(tokenizer_object=inner, **ends)
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> config = LlamaConfig(vocab_size=3, num_hidden_layers=1, eos_token_id=0, **sizes)
        >>> tuned, base = LlamaForCausalLM(config), LlamaForCausalLM(config)
        >>> audit((tuned, tok), (base, tok), ["a", "b a"], max_new_tokens=4).kl.per_token.n
        2
        >>> audit((tuned, tok), (tuned, tok), texts=["a b a"]).kl.per_token.mean
        0.0
    """
    chosen = make_options(options)
    kind, what = one_source({"prompts": prompts, "texts": texts, "responses": responses})
    with (
        opened_pair(policy, reference, dtype=chosen.dtype, device=chosen.device) as pair,
        tempfile.TemporaryDirectory() as folder,
    ):
        return audit_pair(pair, Source(kind, _as_file(kind, what, Path(folder))), chosen, watch)


def _as_file(kind: SourceKind, given: Texts, folder: Path) -> Path:
    if isinstance(given, str | Path):
        return Path(given)
    key = "text" if kind == "texts" else "prompt"
    rows = [row if isinstance(row, Mapping) else {key: row} for row in given]
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
