"""The command line. Sub-commands import what they need when they run, so that `--help` is quick.

Exit codes: 0 done; 1 an error the user can fix, in one sentence; 2 the command line or the
configuration is wrong, wherever the setting was given; 3 and 4 an audit with `--fail-above` lies
above, or is undecided; 5 a check failed; 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

import json
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from kleash import __version__
from kleash.auditing.options import AuditOptions, check_bytewise, one_source
from kleash.cli.console import (
    numbers,
    quiet_libraries,
    split_overrides,
    without_collection,
)
from kleash.cli.explicit_kl import kl_command
from kleash.cli.recipes import init, recipes_app
from kleash.cli.rollout_server import serve_rollouts
from kleash.config.recipe_library import FOLDER
from kleash.errors import ConfigError, KleashError, UsageError

_EXAMPLES = """Examples:

    kleash kl 0.7,0.3 0.5,0.5

    kleash demo

    kleash check

    kleash plan --kl 0.5,1,2

    kleash train --steps 10 --leash.beta 0.2 --output runs/tight

    kleash report runs/tight

    kleash audit runs/tight/checkpoints/step-000010/policy models/sft --prompts prompts.jsonl"""

app = App(
    name="kleash",
    help="Keep a language model on a KL leash: train it near a frozen reference, measure how far "
    "it has gone, and show where.",
    help_epilogue=_EXAMPLES,
    version=__version__,
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,  # `main` says what was kept
    result_action="return_value",
)

_EMBEDDED_WORLD = FOLDER / "embedded-world.yaml"

app.command(recipes_app)
app.command(
    kl_command,
    name="kl",
    help_epilogue="Examples:\n\n    kleash kl 0.7,0.3 0.5,0.5\n\n    kleash kl 0.25,0.75 0.05,0.95"
    "\n\n    kleash kl 0.25,0.75 0.05,0.95 --samples 1,100,10000"
    "\n\n    kleash kl 0.7,0.3 0.5,0.5 --json",
)
app.command(
    init,
    help_epilogue="Examples:\n\n    kleash init models/sft\n\n    kleash init models/sft "
    "--output run.yaml",
)
app.command(
    serve_rollouts,
    help_epilogue="Examples:\n\n    kleash serve-rollouts run.yaml\n\n    kleash serve-rollouts "
    "run.yaml --port 8123 --rollout.vllm.kv-cache-gib 4",
)

_Debug = Annotated[bool, Parameter(negative="", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point of the `kleash` command."""
    arguments = sys.argv[1:]
    try:
        app(arguments)
    except UnusedCliTokensError as error:
        unused = " ".join(error.unused_tokens or ())
        _fail(f"expected nothing after the command, got {unused!r}: leave it out", 2)
    except CycloptsError as error:
        if "--into" in {argument.split("=")[0] for argument in arguments}:
            _fail("--into is called --output, as in every other command", 2)
        _fail(f"{error}. See kleash --help.".replace("..", "."), 2)
    except KleashError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        _fail(str(error) or "interrupted", getattr(error, "exit_code", 130))
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        raise SystemExit(0) from None


def _fail(message: str, code: int) -> None:
    print(f"kleash: {message}", file=sys.stderr)
    raise SystemExit(code)


@app.command(
    help_epilogue="Examples:\n\n    kleash train\n\n    kleash train stories "
    "--leash.target-kl 5\n\n    kleash train --leash.beta 0 --steps 20 --output runs/free"
    "\n\n    kleash train --resume runs/free\n\n    kleash train stories-rloo "
    "--algorithm grpo\n\n    torchrun --nproc-per-node 2 -m kleash train"
)
def train(
    *arguments: Annotated[
        str, Parameter(allow_leading_hyphen=True, name="CONFIG --dotted.key VALUE")
    ],
    resume: Path | None = None,
    no_check: Annotated[bool, Parameter(negative="")] = False,
    debug: _Debug = False,
) -> None:
    """RLHF on the leash; with no CONFIG, on the embedded world.

    Every key of the configuration can be overridden: `--section.key VALUE`; the keys are in
    `docs/configuration.md`. Started by torchrun, several processes divide the rows
    (`docs/distributed.md`).

    Parameters
    ----------
    arguments
        A YAML file or the name of a recipe, then overrides of its keys.
    resume
        Continue the run in this directory from its newest checkpoint, with other values of keys
        that change no step already made: --resume RUN --steps 200 extends it. The same command as
        before, with the same output, does it too.
    no_check
        Skip the quick part of `kleash check`, which otherwise runs first.
    """
    del debug
    with without_collection():
        path, overrides = split_overrides(arguments)
    if resume is not None and path is not None:
        raise UsageError("--resume takes its configuration from the run: give no CONFIG")
    with without_collection():
        from rich.console import Console

        from kleash.config.loading import load_config
        from kleash.mesh import is_first_process, joined, reported_once
        from kleash.playground.build import with_world
        from kleash.preflight.runner import require_sound
        from kleash.preflight.runtime_monitor import RuntimeMonitor
        from kleash.training.continuation import config_of_run
        from kleash.training.loop import Trainer
        from kleash.training.progress import saying

    quiet_libraries()
    with reported_once():
        console = Console(quiet=not is_first_process())
        with saying("train", console) as say:
            if resume is None:
                config = load_config(path, overrides, base=_EMBEDDED_WORLD, say=say)
            else:
                config = config_of_run(resume, overrides)
        with joined(config.distributed.timeout_s) as mesh:
            with saying("train", console) as say:
                say("building the embedded world, where there is one")
                config = mesh.first(partial(with_world, config))
            checked = partial(require_sound, status=partial(saying, "check", console))
            trainer = Trainer(
                config,
                callbacks=[RuntimeMonitor()],
                preflight=None if no_check else checked,
                argv=sys.argv,
            )
            directory = trainer.fit()
        if is_first_process():
            print(f"{directory}: finished. Look at it with: kleash report {directory}")


@app.command(
    help_epilogue="Examples:\n\n    kleash check stories\n\n    kleash check --quick "
    "--leash.beta 0.2\n\n    kleash check mine.yaml --json > findings.json"
)
def check(
    *arguments: Annotated[
        str, Parameter(allow_leading_hyphen=True, name="CONFIG --dotted.key VALUE")
    ],
    quick: Annotated[bool, Parameter(negative="")] = False,
    pairs: Path | None = None,
    framework: Literal["trl", "verl", "openrlhf"] | None = None,
    world_size: int | None = None,
    prompt_tokens: int = 256,
    network: float = 25.0,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    debug: _Debug = False,
) -> None:
    """Look for the fault before it costs a run: exit 0, or 5 if a check fails.

    Every check is made on the very objects that training would use; nothing is trained or written.

    Parameters
    ----------
    arguments
        A YAML file or the name of a recipe, then overrides of its keys; with no CONFIG, the
        embedded world.
    quick
        Only the checks that `kleash train` makes by itself.
    pairs
        JSON lines with `prompt`, `chosen` and `rejected`, to try the reward on.
    framework
        CONFIG is that framework's own file (or its arguments follow): say what its KL settings
        amount to. Nothing is loaded or run.
    world_size
        Predict memory, network and time of the run on so many devices instead; of the model only
        its config.json is read.
    prompt_tokens
        Longest prompt, for that prediction.
    network
        GB/s that each device can send, for that prediction.
    as_json
        Print JSON instead of a table.
    """
    del debug
    from rich.console import Console

    from kleash.preflight.console import print_report

    if world_size is not None:
        from kleash.cli.devices import Devices, predict

        devices = Devices(world_size, prompt_tokens, network)
        return predict(arguments, devices, base=_EMBEDDED_WORLD, as_json=as_json)
    if framework is not None:
        from kleash.preflight.framework_configs import read_framework

        report = read_framework(framework, arguments)
    else:
        from kleash.config.loading import load_config
        from kleash.playground.build import with_world
        from kleash.preflight.checks.reward_model import read_pairs
        from kleash.preflight.runner import check as examine
        from kleash.training.progress import saying

        path, overrides = split_overrides(arguments)
        quiet_libraries()
        with saying("check", Console(quiet=as_json)) as say:
            config = with_world(load_config(path, overrides, base=_EMBEDDED_WORLD, say=say))
            given = read_pairs(pairs) if pairs else ()
            report = examine(config, quick=quick, pairs=given, say=say)
    if as_json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        print_report(report, Console(highlight=False))
    if report.fails:
        raise SystemExit(5)


@app.command(
    name="plan",
    help_epilogue="Examples:\n\n    kleash plan\n\n    kleash plan stories "
    "--kl 0.5,1,2 --responses 128 --output runs/plan\n\n    kleash plan --scores "
    "runs/plan/plan.json --beta 0.2,0.1",
)
def plan_command(
    *arguments: Annotated[
        str, Parameter(allow_leading_hyphen=True, name="CONFIG --dotted.key VALUE")
    ],
    beta: Annotated[str, Parameter(show_default=False)] = "",
    kl: Annotated[str, Parameter(show_default=False)] = "",
    responses: int | None = None,
    prompts: int | None = None,
    scores: Path | None = None,
    output: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    debug: _Debug = False,
) -> None:
    """Before training: which β spends which KL for which score, from reference samples alone.

    Parameters
    ----------
    arguments
        A YAML file or the name of a recipe, then overrides of its keys; with no CONFIG, the
        embedded world.
    beta
        βs to plan for, separated by commas; by default a ladder of them.
    kl
        Budgets to plan for, in nats per response, separated by commas.
    responses
        Reference responses to each prompt; by default `plan.responses`.
    prompts
        Prompts to draw them for; by default `plan.prompts`.
    scores
        An earlier plan.json: plan from its samples instead of drawing new ones.
    output
        Directory for plan.json and plan.html.
    as_json
        Print plan.json instead of a table.
    """
    del debug
    path, overrides = split_overrides(arguments)
    if scores is not None and (path is not None or responses or prompts):
        raise UsageError("--scores has its samples already: give no CONFIG, no --responses")
    try:
        betas, budgets = (numbers(text) if text else [] for text in (beta, kl))
    except ValueError as error:
        raise UsageError(str(error)) from None
    from rich.console import Console

    from kleash.cli import plan as planning
    from kleash.config.loading import load_config
    from kleash.playground.build import with_world
    from kleash.storage.atomic_files import plain_json
    from kleash.storage.plan_file import frontier_json
    from kleash.training.progress import saying

    quiet_libraries()
    if scores is not None:
        request = planning.PlanRequest(betas, budgets)
        frontier = planning.replan(scores, request)
    else:
        sizes = {"plan.responses": responses, "plan.prompts": prompts}
        overrides |= {key: str(size) for key, size in sizes.items() if size is not None}
        with saying("plan", Console(quiet=as_json)) as say:
            config = with_world(load_config(path, overrides, base=_EMBEDDED_WORLD, say=say))
        request = planning.plan_request(config.leash, betas=betas, budgets=budgets)
        frontier = planning.plan(config, request)
    sentences = planning.plan_sentences(frontier, request)
    if as_json:
        print(plain_json(frontier_json(frontier)))
    else:
        planning.print_plan(frontier, sentences)
    if output is not None:
        title = str(path or scores or "the embedded world")
        page = planning.write_plan(output, frontier, sentences, title=title)
        print(f"{output / 'plan.json'}\n{page}", file=sys.stderr if as_json else sys.stdout)


@app.command(help_epilogue="Examples:\n\n    kleash demo\n\n    kleash demo --seed 3")
def demo(*, seed: int = 0, output: Path = Path("runs/demo"), debug: _Debug = False) -> None:
    """The story on the embedded world: check, plan, train on and off the leash, audit, report.

    Parameters
    ----------
    seed
        Which world; each has its own language of questions, raters and models.
    output
        Directory for the two runs, the audit and the report.
    """
    del debug
    from kleash.cli.demo import run_demo

    quiet_libraries()
    run_demo(seed, output)


@app.command(
    help_epilogue="Examples:\n\n    kleash audit runs/tuned models/sft --prompts prompts.jsonl"
    "\n\n    kleash audit quantised full --texts texts.jsonl --output audits/quantised"
    "\n\n    kleash audit step-100 step-200 step-300 sft --prompts prompts.jsonl --output drift"
    "\n\n    kleash audit new old --prompts prompts.jsonl --fail-above 0.05"
)
def audit(
    policy: str,
    /,
    *others: str,
    prompts: Path | None = None,
    texts: Path | None = None,
    responses: Path | None = None,
    options: Annotated[AuditOptions | None, Parameter(name="*", negative="")] = None,
    bytewise: Annotated[bool, Parameter(name="--bytes", negative="")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    debug: _Debug = False,
) -> None:
    """How far is POLICY from REFERENCE: exact KL, with 95 % intervals, down to the token.

    The last checkpoint is the reference; several before it give a drift curve.

    Parameters
    ----------
    policy
        A Hugging Face directory or hub name, the directory of a LoRA adapter, or that of a run: the
        policy of its newest checkpoint.
    others
        More policies, and at last the reference.
    prompts
        A prompt file: the policy answers, both models read the answers.
    texts
        A .txt file, or rows of `text`: both models read them.
    responses
        Rows of `prompt` and `response`: both models read the responses.
    bytewise
        For models of different tokens: bits per byte of whole texts instead of a KL.
    as_json
        Print JSON instead of a table.
    """
    del debug
    # What is wrong with the arguments is said before seconds of imports.
    options = options or AuditOptions()
    if not others:
        raise UsageError("kleash audit needs two checkpoints: kleash audit POLICY REFERENCE")
    try:
        kind, file = one_source({"prompts": prompts, "texts": texts, "responses": responses})
    except ConfigError as error:
        raise UsageError(f"{error}: --prompts FILE, --texts FILE or --responses FILE") from None
    if bytewise:
        check_bytewise(kind, options)
    with without_collection():
        from kleash.auditing.command import AuditCommand, run_command
        from kleash.auditing.inputs import Source

    quiet_libraries()
    code = run_command(
        AuditCommand(
            policies=(policy, *others[:-1]),
            reference=others[-1],
            source=Source(kind, file),
            options=options,
            as_json=as_json,
            bytewise=bytewise,
        )
    )
    if code:
        raise SystemExit(code)


@app.command(
    help_epilogue="Examples:\n\n    kleash report runs/demo/leashed\n\n"
    "    kleash report runs/demo/leashed runs/demo/free --output runs"
)
def report(run: Path, /, *others: Path, output: Path | None = None, debug: _Debug = False) -> None:
    """One self-contained HTML page, and its JSON twin, from run directories alone.

    Parameters
    ----------
    run
        A run directory.
    others
        More runs to compare it with.
    output
        Directory for the page; by default the run's own, or where several lie, their parent.
    """
    del debug
    from kleash.report.html import write_report

    page, twin = write_report([run, *others], into=output)
    print(f"{page}\n{twin}")


@app.command(help_epilogue="Examples:\n\n    kleash push runs/stories OWNER/stories-on-a-leash")
def push(
    run: Path,
    repo: str,
    /,
    *,
    step: int | None = None,
    public: Annotated[bool, Parameter(negative="")] = False,
    debug: _Debug = False,
) -> None:
    """Put a run's policy on the Hugging Face Hub, with its tokenizer and its card.

    Parameters
    ----------
    run
        A run directory.
    repo
        `owner/name`; made if missing.
    step
        Whose checkpoint; by default the newest.
    public
        Make a new repository public.
    """
    del debug
    from huggingface_hub import HfApi

    from kleash.models.publishing import push_run

    print(push_run(run, repo, client=HfApi(), step=step, private=not public))
