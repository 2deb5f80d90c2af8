"""`kleash serve-rollouts` as a command; `serve_rollouts`, loaded when it runs, does the work."""

from typing import Annotated

from cyclopts import Parameter

from kleash.cli.console import quiet_libraries, split_overrides
from kleash.config.recipe_library import FOLDER
from kleash.errors import UsageError


def serve_rollouts(
    *arguments: Annotated[
        str, Parameter(allow_leading_hyphen=True, name="CONFIG --dotted.key VALUE")
    ],
    host: str = "127.0.0.1",
    port: int = 8000,
    debug: Annotated[bool, Parameter(negative="", help="Show the traceback of an error.")] = False,
) -> None:
    """Start a vLLM server that writes the responses of a run: its rollout.vllm.url.

    Parameters
    ----------
    arguments
        The YAML file of the run or the name of a recipe, then overrides of its keys.
    host
        Address to listen on; whoever reaches it can change the weights.
    port
        Port to listen on.
    """
    del debug
    path, overrides = split_overrides(arguments)
    if path is None:
        raise UsageError("kleash serve-rollouts needs the CONFIG of the run whose policy it serves")
    if not 0 < port < 2**16:
        raise UsageError(f"expected a port from 1 to 65535, got {port}")
    from kleash.cli.serve_rollouts import serve
    from kleash.config.loading import load_config
    from kleash.playground.build import with_world

    quiet_libraries()
    config = with_world(load_config(path, overrides, base=FOLDER / "embedded-world.yaml"))
    code = serve(
        config.policy,
        config.reference,
        config.rollout.vllm,
        device="cpu",
        host=host,
        port=port,
    )
    if code:
        raise SystemExit(code)
