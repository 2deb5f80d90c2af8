"""Mistakes, and what a stranger is told: code, what came, what to do; and that it then works.

The real command line, within this process. A configuration that is sound gets as far as training,
which is left out: what is shown there is that nothing stops it any more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from command_line import CommandLine

import kleash.playground.build
import kleash.training.loop
from kleash.config.schema import Config

Changes = Mapping[str, object]


@pytest.fixture
def kleash_(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    def unchanged(config: Config) -> Config:
        return config

    def fit(trainer: kleash.training.loop.Trainer) -> Path:
        return Path(trainer.config.output)

    monkeypatch.setattr(kleash.playground.build, "with_world", unchanged)
    monkeypatch.setattr(kleash.training.loop.Trainer, "fit", fit)
    return CommandLine(tmp_path, monkeypatch, capsys)


@dataclass(frozen=True)
class Mistake:
    """A command that is wrong, and the one that its message leads to."""

    command: str
    says: tuple[str, ...]
    """What came, and what to do."""
    then: str | None = None
    """The command after the fix; None: it takes a model, or a run."""
    code: int = 2


@dataclass(frozen=True)
class WrongKey:
    """A configuration that is wrong: `kleash train run.yaml`."""

    changes: Changes
    says: tuple[str, ...]
    then: Changes = field(default_factory=dict[str, object])
    """The changes after the fix."""


TRAIN = "train run.yaml"
COMMANDS = (
    Mistake("chek", ('"chek"', 'Did you mean "check"?')),
    Mistake("train storis", ("'storis'", "did you mean stories?", "kleash recipes"), TRAIN),
    Mistake("train run.yml", ("no configuration file at run.yml", "check the path"), TRAIN),
    Mistake("train .", (". is a directory", "give a YAML file"), TRAIN),
    Mistake("train run.yaml b.yaml", ("one CONFIG, got 'run.yaml' and 'b.yaml'",), TRAIN),
    Mistake(f"{TRAIN} --steps", ("--steps needs a value: --steps VALUE",), f"{TRAIN} --steps 3"),
    Mistake(f"{TRAIN} --steps x", ("valid integer", "got 'x'"), f"{TRAIN} --steps 3"),
    Mistake(f"{TRAIN} --stesp 3", ("--stesp", "did you mean --steps?"), f"{TRAIN} --steps 3"),
    Mistake(
        f"{TRAIN} --steps 3 --steps 4",
        ("--steps is given twice", "leave one of them out"),
        f"{TRAIN} --steps 4",
    ),
    Mistake(f"{TRAIN} --leash.taget-kl 6", ("did you mean --leash.target_kl?",)),
    Mistake(
        f"{TRAIN} --leash 2",
        ("--leash: `leash`: expected a section of keys and their values, got 2",),
        f"{TRAIN} --leash.target-kl 2",
    ),
    Mistake(
        f"{TRAIN} --leash.target-kl.x 2",
        ("`leash.target_kl` is a single value, not a section",),
        f"{TRAIN} --leash.target-kl 2",
    ),
    Mistake(
        f"{TRAIN} --leash.groups {{a:", ("--leash.groups: cannot read the value '{a:'",)
    ),
    Mistake(
        f"{TRAIN} --leash.target-kl none",
        ("give exactly one of `beta` (fixed), `target_kl` (adaptive)", "got none of them"),
        f"{TRAIN} --leash.beta 0.1",
    ),
    Mistake(
        f"{TRAIN} --prompts.train nope.jsonl",
        ("--prompts.train", "got nothing there for 'nope.jsonl'", "check the path"),
        f"{TRAIN} --prompts.train prompts.jsonl",
    ),
    Mistake(
        f"{TRAIN} --policy.path ./nope",
        ("--policy.path", "got nothing there for './nope'", "check the path"),
        f"{TRAIN} --policy.path ./models",
    ),
    Mistake(f"{TRAIN} --resume runs/one", ("--resume takes its configuration", "give no CONFIG")),
    Mistake("train --resume none", ("expected a run directory, got 'none'",), code=1),
    Mistake("kl 0.5,0.5", ("parameter Q requires an argument",), "kl 1,0 1,0"),
    Mistake("kl 0.5,0.6 0.5,0.5", ("sum to 1, got 1.1",), "kl 0.5,0.5 0.5,0.5"),
    Mistake("kl 0.5,0.5 0.2,0.3,0.5", ("the same outcomes, got 2 and 3",), "kl 0.5,0.5 0.2,0.8"),
    Mistake("kl -0.5,1.5 0.5,0.5", ("-0.5",), "kl 0.5,0.5 0.5,0.5"),
    Mistake("kl 1;0 1,0", ("separated by commas, got '1;0'",), "kl 1,0 1,0"),
    Mistake(
        "kl 1,0 1,0 --samples many",
        ("numbers of samples from 1 to 10,000,000, separated by commas, got 'many'",),
        "kl 1,0 1,0 --samples 10",
    ),
    Mistake("plan run.yaml --kl one", ("numbers separated by commas, got 'one'",)),
    Mistake(
        "plan run.yaml --responses 1", ("--plan.responses", "greater than or equal to 3, got 1")
    ),
    Mistake("plan --scores nope.json", ("got nothing there", "kleash plan CONFIG"), code=1),
    Mistake("plan --scores a.json --responses 8", ("--scores has its samples", "no --responses")),
    Mistake("audit a", ("needs two checkpoints: kleash audit POLICY REFERENCE",)),
    Mistake("audit a b", ("got none: --prompts FILE, --texts FILE or --responses FILE",)),
    Mistake(
        "audit a b --prompts p --texts t", ("expected one of", "got prompts and texts", "--prompts")
    ),
    Mistake(
        "audit ./a ./b --prompts prompts.jsonl", ("a model at './a'", "check the path"), code=1
    ),
    Mistake(
        "audit a b --prompts prompts.jsonl --into x", ("--into is called --output",)
    ),
    Mistake("report nope", ("expected a run directory, got 'nope'",), code=1),
    Mistake("report .", ("holds no run.json", "the directory that `kleash train` wrote"), code=1),
    Mistake("check run.yaml --framework trll", ('"trll"', 'Did you mean "trl"?')),
    Mistake("recipes storis", ("expected nothing after the command, got 'storis'",), "recipes"),
    Mistake("init", ("MODEL_PATH requires an argument",)),
    Mistake("init ./nope", ("a model at './nope'", "check the path"), code=1),
    Mistake("demo --seed x", ("--seed", '"x"')),
)  # fmt: skip

KEYS = (
    WrongKey({"leash.beta": 0.1}, ("exactly one of", "got beta, target_kl")),
    WrongKey(
        {"leash.target_kl": None},
        ("exactly one of", "got none of them"),
        {"leash.target_kl": None, "leash.beta": 1.0},
    ),
    WrongKey({"leash.target": 2}, ("unknown key `leash.target`: did you mean target_kl?",)),
    WrongKey({"policy": None}, ("`policy` is missing",)),
    WrongKey({"output": None}, ("`output` is missing",)),
    WrongKey({"reward_models": {}}, ("give at least one of `reward_models`, got none",)),
    WrongKey(
        {"reward_models.words.callable": "m:f"},
        ("exactly one of `path` and `callable`",),
        {"reward_models.words.path": None, "reward_models.words.callable": "m:f"},
    ),
    WrongKey(
        {"algorithm": "grpo"},
        ("`algorithm: grpo` compares", "`rollout.responses_per_prompt` of 2 or more"),
        {"algorithm": "grpo", "rollout.responses_per_prompt": 2},
    ),
    WrongKey(
        {"rollout.truncated": "penalise"},
        ("`missing_eos_penalty` goes with `truncated: penalise`",),
        {"rollout.truncated": "penalise", "rollout.missing_eos_penalty": 1.0},
    ),
    WrongKey(
        {"tripwires.then": "rollback"},
        ("needs `logging.checkpoint_every`",),
        {"tripwires.then": "rollback", "logging.checkpoint_every": 5},
    ),
    WrongKey({"leash.groups": {"others": 1.0}}, ("may not be named `others`", "rename it")),
    WrongKey({"leash": 5}, ("`leash`: expected a section of keys and their values, got 5",)),
)

SAME = {
    "leash.target_kl": (-1, "greater than 0, got -1"),
    "leash.placement": ("loss_k1", "use 'reward_k1' or 'exact'"),
    "leash.horizon": (5, "is for `controller: ziegler_code` alone"),
    "algorithm": ("dpo", "expected one of 'ppo', 'grpo', 'rloo', 'distill', got 'dpo'"),
    "algorithm.minibatches": (3, "does not divide the 8 responses"),
    "optimizer.lr": ("fast", "valid number, unable to parse string as a number, got 'fast'"),
    "optimizer.beta1": (1.5, "less than 1, got 1.5"),
    "rollout.temperature": (0, "greater than 0, got 0"),
    "tripwires.stop_kl": (1.0, "is within the target of 2"),
    "reference.kind": ("adapter_off", "needs `policy.lora`"),
    "steps": (0, "greater than 0, got 0"),
    "logging.trackers": (["mlflow"], "'tensorboard', 'wandb' or 'trackio', got 'mlflow'"),
    "prompts.heldout": ("absent.jsonl", "got nothing there for 'absent.jsonl': check the path"),
    "stepz": (3, "did you mean"),
}
"""Key, impossible value, what is said of it."""


def one_sentence(err: str) -> str:
    """What stands on standard error: one line, and no traceback."""
    assert err.startswith("kleash: ") and err.count("\n") == 1, err
    assert "Traceback" not in err and "Error:" not in err and "[Errno" not in err, err
    return err


@pytest.mark.parametrize("mistake", COMMANDS, ids=lambda mistake: mistake.command)
def test_a_wrong_command(kleash_: CommandLine, mistake: Mistake) -> None:
    kleash_.write_config({})
    (kleash_.folder / "models").mkdir()
    before = kleash_.written()
    found = kleash_.run(*mistake.command.split())
    assert found.code == mistake.code, found
    said = one_sentence(found.err)
    assert [part for part in mistake.says if part not in said] == [], said
    assert kleash_.written() == before
    if mistake.then is not None:
        fixed = kleash_.run(*mistake.then.split())
        assert fixed.code == 0, fixed


@pytest.mark.parametrize("mistake", KEYS, ids=lambda mistake: next(iter(mistake.changes)))
def test_a_wrong_key(kleash_: CommandLine, mistake: WrongKey) -> None:
    kleash_.write_config(mistake.changes)
    before = kleash_.written()
    found = kleash_.run("train", "run.yaml")
    assert found.code == 2, found
    said = one_sentence(found.err)
    assert [part for part in ("run.yaml", *mistake.says) if part not in said] == [], said
    assert kleash_.written() == before
    # An unknown key is left out; what it should have been is there already.
    kleash_.write_config(mistake.then)
    assert kleash_.run("train", "run.yaml").code == 0


@pytest.mark.parametrize("key", SAME)
def test_a_mistake_is_the_same_in_the_file_and_on_the_command_line(
    kleash_: CommandLine, key: str
) -> None:
    value, sentence = SAME[key]
    kleash_.write_config({key: value})
    in_file = kleash_.run("train", "run.yaml")
    kleash_.write_config({})
    on_line = kleash_.run("train", "run.yaml", f"--{key}", str(value))
    assert in_file.code == on_line.code == 2, (in_file, on_line)
    for found, place in ((in_file, "run.yaml, line "), (on_line, f"--{key}")):
        said = one_sentence(found.err)
        assert place in said and sentence in said, said
