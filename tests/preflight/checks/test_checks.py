"""Branches of single checks that no planted fault goes through: what is skipped, and why."""

import re
from dataclasses import replace
from pathlib import Path

import fault_types
import pytest
import tiny_models
import torch
from chat_families import CHATML, ROWS, TOOLS, byte_tokenizer

from kleash.config.leash import LeashConfig
from kleash.models.callable_reward import CallableReward
from kleash.models.lm_head import apply_head
from kleash.preflight.checks import (
    logprobs,
    masks,
    objective,
    prompts,
    reference,
    resources,
    reward_model,
    sampling,
)
from kleash.preflight.comparison import gap
from kleash.preflight.findings import Finding
from kleash.preflight.probe_batch import QUICK, Tilted, Trial, draw, own_reading, rollout_of
from kleash.rollout.prompts import Prompt, read_prompts
from kleash.rollout.sampling import response_texts
from kleash.training.assembly import assemble


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fault_types.material(tmp_path_factory.mktemp("world"), "gemma2")


@pytest.fixture(scope="module")
def trial(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("run")
        config = fault_types.clean(material, "gemma2", patch, folder).config()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return draw(config, assemble(config), QUICK)


def test_the_tilted_policy_differs_at_every_token_and_reads_alike(trial: Trial) -> None:
    """Its KL is that of two dense softmaxes; with a soft cap the bias comes before it."""
    mask = trial.rollout.response_mask
    assert bool((trial.tilted.kl[mask] > 1e-3).all())
    text = trial.texts[0]
    states = text.of_response()
    with torch.no_grad():
        p, q = (
            apply_head(model.head, states).double().log_softmax(-1)
            for model in (trial.components.policy, Tilted(trial.components.policy))
        )
    expected = (p.exp() * (p - q)).sum(-1)
    found = trial.tilted.kl[text.row][mask[text.row]]
    assert gap(found.double(), expected) < 1e-5


def test_a_text_is_read_as_the_model_reads_it(trial: Trial) -> None:
    text = trial.texts[-1]
    _, logits = own_reading(trial.components.policy, text.prompt, text.response)
    assert torch.equal(logits, text.logits)
    assert logits.shape[0] == len(text.response)
    padded = rollout_of(text.prompt, text.response, left=2, right=3, fill=5)
    assert padded.prompt_mask.sum() == len(text.prompt)
    assert padded.response_ids[0, -3:].tolist() == [5, 5, 5]


def test_what_is_skipped_says_why(trial: Trial) -> None:
    later = replace(trial, at_start=False)
    no_sampler = replace(trial.rollout, sampler_logprobs=None)
    written = replace(trial.written.responses, rollout=no_sampler)
    blind = replace(trial, written=replace(trial.written, responses=written))
    far = replace(trial, scored=replace(trial.scored, kl=trial.scored.kl + 1))
    free = replace(trial, config=trial.config.model_copy(
        update={"leash": trial.config.leash.model_copy(update={"beta": 0.0})}
    ))  # fmt: skip
    for finding, why in (
        (logprobs.start(later), "has been updated"),
        (logprobs.packing(trial), "packs none"),
        (sampling.ratio(blind), "gave no log-probabilities"),
        (sampling.mean_weight(far), "rare responses carry"),
        (reference.adapter(trial), "No adapter"),
        (objective.target(trial), "there is no target per response"),
        (objective.strength(free), "measured, not charged"),
    ):
        assert finding.verdict == "skipped"
        assert why in finding.cause


def test_weights_that_do_not_average_to_one(trial: Trial) -> None:
    shifted = trial.scored.ref_logprobs.clone()
    shifted[:, 0] -= 0.3
    found = sampling.mean_weight(replace(trial, scored=replace(trial.scored, ref_logprobs=shifted)))
    assert found.verdict == "fail"
    assert "do not average to 1" in found.cause


def test_the_same_weights_under_other_settings(trial: Trial, material: Path) -> None:
    components = assemble(trial.config)
    components.reference.model.config.final_logit_softcapping = 2.0
    capped = replace(trial, components=components)
    cause, remedy = logprobs.why_apart(capped)
    assert "final_logit_softcapping 30.0 and 2.0" in cause
    assert "final_logit_softcapping" in remedy
    components.reference.model.config.final_logit_softcapping = 30.0
    assert "have the same weights and settings" in logprobs.why_apart(capped)[0]
    components.reference.model.to(torch.bfloat16)
    assert "float32 and the reference in bfloat16" in logprobs.why_apart(capped)[0]


def test_a_model_that_is_random_without_dropout(trial: Trial) -> None:
    components = assemble(trial.config)

    handle = components.policy.model.base_model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: output + 0.1 * torch.randn_like(output)
    )
    found = logprobs.dropout(replace(trial, components=components))
    handle.remove()
    assert found.verdict == "fail"
    assert "not deterministic though no dropout is on" in found.cause


def test_a_chat_model_with_bare_prompts(trial: Trial) -> None:
    tok = tiny_models.tokenizer(bos="<bos>", chat_template=tiny_models.CHAT_TEMPLATE)
    components = replace(trial.components, policy=replace(trial.components.policy, tokenizer=tok))
    found = prompts.chat_template(replace(trial, components=components))
    assert found.verdict == "warn"
    assert "chat template is missing" in found.cause
    marked = [Prompt("<user> w1 <assistant>", (1, 2), 0)]
    used = replace(components, prompts=marked, heldout=[])
    assert prompts.chat_template(replace(trial, components=used)).verdict == "ok"


def test_tokens_that_the_reward_does_not_see(trial: Trial) -> None:
    tokenizer, rollout = trial.components.policy.tokenizer, trial.rollout
    ids = rollout.response_ids.clone()
    ids[0, :2] = torch.tensor([tokenizer.pad_token_id, tokenizer.unk_token_id])
    changed = replace(trial.written.responses, rollout=replace(rollout, response_ids=ids))
    written = replace(trial.written, responses=changed)
    stop_ids = trial.components.policy.stop_ids
    texts = response_texts(tokenizer, written.rollout, stop_ids=stop_ids)
    seen = replace(trial, written=replace(written, responses=replace(changed, texts=texts)))
    assert "<unk>" in texts[0] and reward_model.dropped_tokens(seen).verdict == "ok"
    bare = [text.replace("<unk>", "") for text in texts]
    found = reward_model.dropped_tokens(
        replace(trial, written=replace(written, responses=replace(changed, texts=bare)))
    )
    assert found.verdict == "warn" and "'<unk>' (" in found.cause and "<pad>" not in found.cause


def test_tools_that_the_template_does_not_write(trial: Trial) -> None:
    assert prompts.tools(trial).verdict == "skipped"

    def found(template: str, *rows: object) -> Finding:
        tok = byte_tokenizer(template)
        policy = replace(trial.components.policy, tokenizer=tok)
        made = read_prompts(list(rows), tok, context=None, max_new_tokens=4)
        components = replace(trial.components, policy=policy, prompts=made, heldout=[])
        return prompts.tools(replace(trial, components=components))

    assert found(CHATML, ROWS[0], ROWS[2]).verdict == "ok"
    deaf = found("{{ messages[0].content }}", ROWS[0], {"prompt": "w1", "tools": TOOLS}, "w2")
    assert deaf.verdict == "warn" and deaf.measured.startswith("2 of 2 prompts with tools")


def test_some_copies_and_a_small_leak_only_warn(trial: Trial) -> None:
    repeated = [Prompt(f"w{i % 7}", (i % 7,), i) for i in range(10)]
    held = [Prompt("w0", (0,), 0), *(Prompt(f"h{i}", (i,), i) for i in range(1, 30))]
    components = replace(trial.components, prompts=repeated, heldout=held)
    changed = replace(trial, components=components)
    assert prompts.duplicates(changed).verdict == "warn"
    assert prompts.leak(changed).verdict == "warn"
    nothing = replace(trial, components=replace(components, heldout=[]))
    assert prompts.leak(nothing).verdict == "skipped"


def test_memory_that_nearly_suffices(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(trial: Trial = trial) -> Finding:
        return resources.examine(trial)[0]

    plenty = memory()
    assert plenty.verdict == "ok"
    needs = float(plenty.measured.split()[1]) * 2**30
    monkeypatch.setattr(resources, "machine_bytes", lambda device: int(needs * 1.05))
    assert memory().verdict == "warn"
    # The remedy names the key that is in force.
    tokens = trial.config.algorithm.model_copy(update={"microbatch_tokens": 64})
    by_tokens = replace(trial, config=trial.config.model_copy(update={"algorithm": tokens}))
    assert "Lower algorithm.microbatch_tokens (now 64) and rollout" in memory(by_tokens).remedy


def test_adam_is_counted_once_for_every_parameter(trial: Trial) -> None:
    components = trial.components
    learning = [*components.policy.parameters(), *components.value.parameters()]
    assert resources.adam_bytes(components.parameters()) == 8 * sum(p.numel() for p in learning)


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.0, "12 s"), (600.0, "10 min"), (36_000.0, "10.0 h")]
)
def test_a_time_is_spelled(seconds: float, text: str) -> None:
    assert resources._spelled(seconds) == text


def test_every_option_that_does_nothing(trial: Trial) -> None:
    tree = trial.config.model_dump()
    tree["leash"] = {"beta": 0.0, "placement": "exact"}
    tree["reward_models"]["rm"]["weight"] = 0.0
    tree["reference"] = {"reference_differs": True}
    tree["optimizer"]["warmup_steps"] = 500
    tree["heldout"] = {"every": 500}
    tree["logging"] = {"checkpoint_every": 500}
    changed = replace(trial, config=type(trial.config)(**tree))
    named = [o.split(" ")[0] for o in objective.inert_options(changed)]
    assert named == [
        "leash.placement",
        "reward_models.rm.weight",
        "reference.reference_differs",
        "optimizer.warmup_steps",
        "heldout.every",
        "logging.checkpoint_every",
    ]


@pytest.mark.parametrize(("tokens", "verdict"), [(15, "ok"), (25, "warn")])
def test_a_tenth_of_a_nat_is_meant_per_token_if_responses_are_long(
    trial: Trial, tokens: int, verdict: str
) -> None:
    tree = trial.config.model_dump()
    tree["leash"] = {"target_kl": 0.1}
    mask = (torch.arange(trial.rollout.response_mask.shape[1]) < tokens).expand_as(
        trial.rollout.response_mask
    )
    changed = replace(trial.rollout, response_mask=mask)
    long = replace(trial.written, responses=replace(trial.written.responses, rollout=changed))
    found = objective.target(replace(trial, written=long, config=type(trial.config)(**tree)))
    assert found.verdict == verdict
    assert verdict == "ok" or "leash.target_kl_per_token: 0.1" in found.remedy


def test_an_empty_mask_row_is_no_hole(trial: Trial) -> None:
    assert masks.shape(trial).verdict == "ok"
    mask = trial.rollout.prompt_mask.clone()
    mask[0, -1] = False
    changed = replace(trial.rollout, prompt_mask=mask)
    broken = replace(trial.written, responses=replace(trial.written.responses, rollout=changed))
    assert "prompt mask has holes" in masks.shape(replace(trial, written=broken)).cause


def test_without_a_classifier_its_checks_are_skipped(trial: Trial) -> None:
    rewards = {"short": (CallableReward("fault_types:short"), 1.0)}
    components = replace(trial.components, reward=replace(trial.components.reward, rewards=rewards))
    changed = replace(trial, components=components)
    for one in (
        reward_model.head,
        reward_model.last_token,
        reward_model.bos,
        reward_model.template,
    ):
        assert one(changed).verdict == "skipped"
    assert reward_model.alone(changed).verdict == "ok"


def test_groups_start_each_from_a_target_of_its_own(trial: Trial) -> None:
    section = LeashConfig(groups={"near": 1.0, "far": 4.0})
    grouped = replace(trial, config=trial.config.model_copy(update={"leash": section}))
    states = objective.starting_states(grouped)
    assert states["near"].beta == pytest.approx(2 * states["far"].beta)
    assert "follows from" in objective.strength(grouped).cause
    assert "a target of its own" in objective.target(grouped).cause
    assert "4 nats per response of far (β from" in objective.objective(grouped).measured


def test_no_number_of_beta_is_said_but_the_plans(trial: Trial) -> None:
    """A few responses of a check would give another β than a plan's many."""
    for section in (LeashConfig(target_kl=2.0), LeashConfig(groups={"near": 1.0})):
        changed = replace(trial, config=trial.config.model_copy(update={"leash": section}))
        said = objective.objective(changed).measured
        assert "β from its plan, as `kleash plan` says it" in said
        assert not re.search(r"β( from|:| =) [0-9]", said)
        assert not re.search(r"β = [0-9]", objective.strength(changed).cause)
    given = LeashConfig(target_kl=2.0, initial_beta=0.25)
    changed = replace(trial, config=trial.config.model_copy(update={"leash": given}))
    assert "β from 0.25, moved" in objective.objective(changed).measured
