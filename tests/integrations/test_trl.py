"""Inside TRL's real trainers: what is measured is the KL, and measuring changes nothing."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import tiny_models
import torch
import trl_trainers
from trl_trainers import batches_of, make_trainer, plain_kl

from kleash.errors import ConfigError
from kleash.integrations.trl import KLAudit, KLBudget, Tripwires, exact_kl_loss
from kleash.kl.control.controllers import BetaState, BudgetBeta, Measurement
from kleash.kl.statistics import clustered_mean
from kleash.report.html import write_report
from kleash.storage.run_directory import read_run

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and transformers' own, of each other

ROOT = Path(__file__).parents[2]
OLDER = ROOT / ".venv-trl112"
"""The last TRL with PPO, installed by `make test` into a folder of its own."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("trl") / "base", attention_dropout=0.0)


def reading_and_plain(trainer, audit, batches, *, policy, reference):
    """The last measurement, and the same KL of the same tokens from plain models."""
    return audit.history[-1]["objective/kl_ref"], plain_kl(policy, reference, batches[-1])


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_thirty_steps_are_measured_exactly_and_reported(
    base: Path, tmp_path: Path, kind: str
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 29, "max_steps": 30}
    trainer = make_trainer(kind, str(base), tmp_path / "out", **saving)
    batches = batches_of(trainer)
    audit = KLAudit(every=29).attach(trainer)
    trainer.train()
    last = audit.history[-1]
    assert last["step"] == 30
    found, plain = reading_and_plain(
        trainer, audit, batches, policy=tmp_path / "out" / "checkpoint-29", reference=base
    )
    assert found > 0.05
    assert found == pytest.approx(sum(plain) / len(plain), abs=1e-5)
    # Fresh completions of the saved checkpoint, written and read by plain transformers.
    fresh = fresh_kl(tmp_path / "out" / "checkpoint-29", base)
    error = (last["objective/kl_ref_se"] ** 2 + fresh.standard_error**2) ** 0.5
    assert abs(found - fresh.mean) < 2 * error
    page, _ = write_report([tmp_path / "out" / "kleash"])
    assert "KL to the reference" in page.read_text(encoding="utf-8")
    run = read_run(tmp_path / "out" / "kleash")
    assert run.status == "finished"
    assert [line["step"] for line in run.metrics] == [1, 30]
    assert {sample.step for sample in run.samples} == {1, 30}
    logged = [line for line in trainer.state.log_history if "kleash/kl_ref" in line]
    assert [line["step"] for line in logged] == [1, 30]
    assert logged[-1]["kleash/kl_ref"] == found


def fresh_kl(policy: Path, reference: Path):
    """The KL of completions that plain `generate` writes, clustered by prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(policy)
    tok = AutoTokenizer.from_pretrained(policy)
    prompts = [row["prompt"] for row in trl_trainers.prompts()]
    asked = tok(prompts * 8, return_tensors="pt")
    ids, mask = asked["input_ids"], asked["attention_mask"]
    out = model.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=6, min_new_tokens=0
    )[:, ids.shape[1] :]
    ended = (out == tok.eos_token_id).cumsum(1)
    kept = (ended - (out == tok.eos_token_id).long()) == 0
    batch = {"prompt_ids": ids, "prompt_mask": mask, "completion_ids": out, "completion_mask": kept}
    each = torch.tensor(plain_kl(policy, reference, batch))
    return clustered_mean(each, torch.arange(len(prompts)).repeat(8))


def test_a_trainer_with_beta_zero_is_measured_against_where_it_came_from(
    base: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(
        "grpo", str(base), tmp_path / "out", beta=0.0, save_strategy="steps", save_steps=2
    )
    batches = batches_of(trainer)
    audit = KLAudit(every=1, both=True).attach(trainer)
    trainer.train()
    assert trainer.ref_model is None
    found, plain = reading_and_plain(
        trainer, audit, batches, policy=tmp_path / "out" / "checkpoint-2", reference=base
    )
    assert found > 0.01
    assert found == pytest.approx(sum(plain) / len(plain), abs=1e-5)
    back = plain_kl(base, tmp_path / "out" / "checkpoint-2", batches[-1])
    assert audit.history[-1]["objective/reverse_kl_ref"] == pytest.approx(
        sum(back) / len(back), abs=1e-5
    )


def test_an_adapter_is_measured_against_itself_turned_off(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer("grpo", str(base), tmp_path / "out", lora=True, learning_rate=0.05)
    batches = batches_of(trainer)
    audit = KLAudit(every=1).attach(trainer)
    trainer.train()
    # One more batch is written by the policy that came out, and read without being learnt from.
    trainer.model.train()
    trainer._generate_and_score_completions([{"prompt": "w1 w2"}] * 16)
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    found, plain = reading_and_plain(
        trainer, audit, batches, policy=tmp_path / "merged", reference=base
    )
    assert found > 0.01
    assert found == pytest.approx(sum(plain) / len(plain), abs=1e-5)


def test_measuring_changes_nothing(base: Path, tmp_path: Path) -> None:
    losses = []
    for name in ("plain", "measured"):
        trainer = make_trainer("grpo", str(base), tmp_path / name)
        if name == "measured":
            KLAudit(every=1, both=True).attach(trainer)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history[:-1]])
    assert losses[0] == losses[1]


def test_tokens_of_tools_are_context(base: Path, tmp_path: Path) -> None:
    """As if the policy had written only the completion's first two tokens."""
    trainer = make_trainer("grpo", str(base), tmp_path / "out")
    audit = KLAudit(every=1, reference=tiny_models.save_model(tmp_path / "other", seed=1)).attach(
        trainer
    )
    generate = trainer._kleash_watcher
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "w1 w2"}] * 16)
    own = torch.zeros_like(batch["completion_mask"])
    own[:, :2] = batch["completion_mask"][:, :2]
    audit._last = None
    generate._measure({**batch, "tool_mask": own})
    plain = plain_kl(base, tmp_path / "other", {**batch, "completion_mask": own})
    found = audit.history[-1]["objective/kl_ref"]
    assert found == pytest.approx(sum(plain) / len(plain), abs=1e-5)
    assert found < audit.history[0]["objective/kl_ref"] - 0.1


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_budget_moves_beta_by_its_controller(base: Path, tmp_path: Path, kind: str) -> None:
    trainer = make_trainer(kind, str(base), tmp_path / "out", max_steps=4)
    batches = batches_of(trainer)
    rewards = trainer._calculate_rewards
    scored: list[torch.Tensor] = []
    trainer._calculate_rewards = lambda *a: scored.append(rewards(*a)) or scored[-1]
    audit = KLAudit(every=1).attach(trainer)
    KLBudget(target_kl=0.5).attach(trainer)
    trainer.train()
    controller = state = None
    for line, batch, score in zip(audit.history, batches, scored, strict=True):
        priced = batch["advantages"] if kind == "grpo" else score.sum(1)
        # Four completions to each prompt, one after the other.
        variance = float(priced.double().view(-1, 4).var(1).mean())
        if controller is None:
            # Of scores that vary so much, in the limit of a small tilt: KL = variance/(2β²).
            controller = BudgetBeta(0.5, initial=(variance / (2 * 0.5)) ** 0.5)
            state = controller.init()
        spent, error = line["objective/kl_ref"], line["objective/kl_ref_se"]
        state = controller.update(state, Measurement(spent, error, 16, variance))
    betas = [line["kleash/beta"] for line in trainer.state.log_history[:-1]]
    assert betas[0] == 0.1
    assert len(set(betas)) > 2
    assert trainer.beta == pytest.approx(state.beta, rel=1e-9)


def test_a_run_that_broke_off_goes_on_with_the_same_beta(base: Path, tmp_path: Path) -> None:
    # In the middle of an epoch: at the end of one, TRL itself does not go on with the same draws.
    def trainer_in(name: str):
        trainer = make_trainer(
            "grpo", str(base), tmp_path / name, max_steps=6, save_strategy="steps", save_steps=2
        )
        KLAudit(every=1).attach(trainer)
        KLBudget(target_kl=0.5).attach(trainer)
        return trainer

    trainer_in("whole").train()
    broken = trainer_in("broken")
    generate = broken._generate_and_score_completions

    def breaks(inputs):
        if broken.state.global_step == 5:
            raise KeyboardInterrupt
        return generate(inputs)

    broken._generate_and_score_completions = breaks
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    trainer_in("broken").train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    whole, resumed = (
        [
            (line["step"], line["objective/beta"], line["objective/kl_ref"])
            for line in read_run(tmp_path / name / "kleash").metrics
        ]
        for name in ("whole", "broken")
    )
    assert whole == resumed
    assert len({beta for _, beta, _ in whole}) > 3


def test_the_older_version_measures_the_same(tmp_path: Path) -> None:
    if not (OLDER / "trl").is_dir():
        reason = f"TRL 1.12.0 is not in {OLDER.name}: `make {OLDER.name}` puts it there"
        print(reason)
        pytest.skip(reason)
    path = [str(OLDER), str(ROOT / "src"), str(ROOT / "tests" / "support")]
    program = ROOT / "tests" / "support" / "trl_trainers.py"
    for kind in ("grpo", "rloo"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(program), kind, str(tmp_path / kind)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["trl"] == "1.12.0"
        assert found["kl"][2] > 0.01
        assert found["kl"][2] == pytest.approx(fmean(found["plain"]), abs=1e-5)
        assert len(set(found["beta"])) > 1


def test_two_processes_measure_the_rows_of_both_and_stop_together(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / "policy").symlink_to(base)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = [str(ROOT / "src"), str(ROOT / "tests" / "support")]
    program = [sys.executable, "-W", "ignore", str(ROOT / "tests/support/trl_trainers.py")]
    processes = [
        subprocess.Popen(
            [*program, "grpo", str(tmp_path)],
            env={
                **os.environ,
                **{"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
                **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    told = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    found = [json.loads(one.splitlines()[-1]) for one in told]
    assert found[0]["samples"] != found[1]["samples"]
    plain = [*found[0]["plain"], *found[1]["plain"]]
    assert len(plain) == 16
    for one in found:
        assert one["kl"][2] > 1e-3
        assert one["kl"][2] == pytest.approx(fmean(plain), abs=1e-5)
    for name in ("kl", "scores", "beta"):
        assert found[0][name] == found[1][name], name
    assert len(set(found[0]["beta"])) > 1
    run = read_run(tmp_path / "out" / "kleash")
    assert [line["objective/kl_ref"] for line in run.metrics] == found[0]["kl"]
    assert [(one["stopped_after"], one["measured"]) for one in found] == [(2, 1), (2, 1)]
    stopped = (tmp_path / "stopped" / "kleash" / "events.jsonl").read_text(encoding="utf-8")
    assert "the completions of process 1 cannot be measured" in stopped


def test_what_cannot_be_seen_into_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    import trl

    trainer = make_trainer("grpo", str(base), tmp_path / "out", beta=0.0)
    with pytest.raises(ConfigError, match=r"expected beta above 0 .* got 0.0"):
        KLBudget(target_kl=1.0).attach(trainer)
    trainer.mask_truncated_completions = True
    with pytest.raises(ConfigError, match="mask_truncated_completions=False, got True"):
        KLAudit().attach(trainer)
    trainer.mask_truncated_completions = False
    del trainer.temperature
    with pytest.raises(ConfigError, match=f"GRPOTrainer of TRL {trl.__version__}, without temp"):
        KLAudit().attach(trainer)

    class SomeTrainer:
        beta = 0.1

    with pytest.raises(ConfigError, match=r"GRPOTrainer or RLOOTrainer.*got SomeTrainer of TRL"):
        KLAudit().attach(SomeTrainer())
    rloo = make_trainer("rloo", str(base), tmp_path / "rloo")
    with pytest.raises(ConfigError, match="expected a GRPOTrainer, got RLOOTrainer"):
        exact_kl_loss(rloo)
    KLAudit(reference=str(base)).attach(rloo)
    with pytest.raises(ConfigError, match="one reference for all callbacks"):
        KLBudget(target_kl=1.0, reference="elsewhere").attach(rloo)


@pytest.mark.parametrize(
    "callback", [KLAudit(), KLBudget(target_kl=1.0)], ids=lambda one: type(one).__name__
)
def test_a_callback_that_was_not_attached_says_so(base: Path, tmp_path: Path, callback) -> None:
    trainer = make_trainer("grpo", str(base), tmp_path / "out")
    trainer.add_callback(callback)
    with pytest.raises(ConfigError, match=rf"{type(callback).__name__}\(…\)\.attach\(trainer\)"):
        trainer.train()


def test_settings_that_cannot_be_are_refused() -> None:
    for make in (
        lambda: KLAudit(every=0),
        lambda: KLBudget(target_kl=0.0),
        lambda: KLBudget(1.0, controller=BudgetBeta(2.0, initial=0.1)),
        lambda: Tripwires(stop_kl=-1.0),
        lambda: Tripwires(beta_factor=1.0),
    ):
        with pytest.raises(ConfigError, match="expected"):
            make()


def test_the_state_of_a_budget_is_plain(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer("grpo", str(base), tmp_path / "out", save_strategy="steps", save_steps=2)
    budget = KLBudget(target_kl=0.5).attach(trainer)
    trainer.train()
    assert budget.state is not None
    saved = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    kept = saved["stateful_callbacks"]["kleash"]["KLBudget"]
    assert BetaState(**kept["state"]) == budget.state
    assert kept["initial"] == pytest.approx(budget.controller.initial)


def test_a_controller_of_ones_own_is_taken_at_its_word(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer("grpo", str(base), tmp_path / "out", max_steps=2)
    own = BudgetBeta(0.5, initial=7.0, rate_max=0.01)
    KLBudget(0.5, controller=own).attach(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["kleash/beta"] == 7.0
    assert trainer.beta == pytest.approx(7.0 * math.exp(-0.01))


def test_scores_that_do_not_vary_move_no_beta(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer("grpo", str(base), tmp_path / "out")
    trainer.reward_funcs = [lambda completions, **columns: [1.0] * len(completions)]
    budget = KLBudget(0.5).attach(trainer)
    trainer.train()
    assert trainer.beta == 0.1 and budget.state is None
