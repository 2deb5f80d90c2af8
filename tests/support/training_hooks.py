"""Something done to a run between its steps: an interruption, a fault."""

from collections.abc import Callable

import pytest

from kleash.training.loop import Trainer
from kleash.training.session import Session


def before_each_step(patch: pytest.MonkeyPatch, act: Callable[[Session], None]) -> None:
    """`act` is given the run before each of its steps; what it raises, the step raises."""
    step = Trainer._step

    def acted_on(self, pending):
        act(self.session)
        return step(self, pending)

    patch.setattr(Trainer, "_step", acted_on)


def interrupt_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C once so many steps are made."""

    def act(session: Session) -> None:
        if session.state.step == step:
            raise KeyboardInterrupt

    before_each_step(patch, act)
