"""The card of a checkpoint: read back by YAML and Markdown parsers that are not ours."""

from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from kleash.storage.model_card import ModelCardFacts, model_card

FACTS = ModelCardFacts(
    reference="models/sft", base_model="models/sft", kind="full", algorithm="ppo", step=200,
    version="0.2.0", beta=0.12345, beta_unit="score per nat", placement="reward_k1", kl=4.9012,
    kl_interval=(4.512, 5.287), kl_responses=512, target_kl=5.0, score=1.2345, score_error=0.051,
    reference_score=-0.25, reward_models={"helpful": "models/rm"}, prompts="data/prompts.jsonl",
    seed=7,
)  # fmt: skip
HOSTILE = (
    'x"\n---\nlicense: evil\n# heading',
    "a|b | c",
    "`code` ``two``",
    "<script>alert(1)</script>",
    "[link](javascript:alert(1))",
    "![image](https://example.com/x.png)",
    "pay \u202e001 \ud800 \x00",
    " ",
    "*bold* {{ template }} \\",
    "- item: {a: 1} # comment",
)


def front(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def tokens(text: str) -> list[Any]:
    body = text.split("---\n", 2)[2]
    found = MarkdownIt("commonmark").enable("table").parse(body)
    return [*found, *(child for token in found for child in token.children or [])]


def codes(text: str) -> list[str]:
    return [token.content for token in tokens(text) if token.type == "code_inline"]


def test_the_hub_reads_its_front_matter() -> None:
    data = ModelCard(model_card(FACTS)).data
    assert data.base_model == "models/sft" and data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation" and data.tags == ["kleash", "rlhf", "ppo"]
    adapter = ModelCard(model_card(replace(FACTS, kind="lora"))).data
    assert adapter.library_name == "peft" and "lora" in adapter.tags


def test_it_says_what_was_measured() -> None:
    text = model_card(FACTS)
    for fact in (
        "4.901 nats per response, 95 % interval 4.512 to 5.287, 512 responses",
        "5 nats per response", "0.1235 score per nat", "+1.234 ± 0.051 (s.e.)",
        "the reference's -0.25", "`models/rm`", "`data/prompts.jsonl`", "`reward_k1`",
        "| seed | 7 |", "200 steps of PPO",
    ):  # fmt: skip
        assert fact in text, fact


def test_what_is_not_known_is_left_out() -> None:
    bare = replace(
        FACTS, kl_interval=None, kl_responses=None, target_kl=None, score=None, score_error=None,
        reference_score=None, reward_models=None, prompts=None, seed=None,
    )  # fmt: skip
    text = model_card(bare)
    assert "None" not in text and "KL budget" not in text and "| score |" not in text
    assert "| exact KL(policy ‖ reference) | 4.901 nats per response |" in text


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_code_in_it_compiles_and_names_the_right_class(kind: Any) -> None:
    (code,) = (
        t.content for t in tokens(model_card(replace(FACTS, kind=kind))) if t.type == "fence"
    )
    compile(code, "card", "exec")
    wanted = "AutoPeftModelForCausalLM" if kind == "lora" else "AutoModelForCausalLM"
    assert f"model = {wanted}.from_pretrained(folder, dtype=torch.float32)" in code


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_name_can_add_to_the_card(hostile: str) -> None:
    plain = model_card(FACTS)
    facts = replace(
        FACTS, reference=hostile, base_model=hostile, prompts=hostile, placement=hostile,
        reward_models={hostile: hostile},
    )  # fmt: skip
    text = model_card(facts)
    assert front(text) == {**front(plain), "base_model": hostile}
    kinds = [token.type for token in tokens(text)]
    assert [kind for kind in kinds if kind != "code_inline"] == [
        kind for kind in [token.type for token in tokens(plain)] if kind != "code_inline"
    ]
    assert not {"image", "link_open", "html_block", "html_inline"} & set(kinds)
    # Every name is shown, whole, with what would not show or would end a cell by its number.
    shown = "".join(
        c if c.isprintable() and c != "|" else f"[U+{ord(c):04X}]" for c in hostile
    ).strip()
    assert sum(code.strip() == shown for code in codes(text)) >= 7
    text.encode("utf-8")


def test_an_interval_that_does_not_hold_the_kl_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an interval that holds the KL"):
        model_card(replace(FACTS, kl_interval=(5.0, 6.0)))
