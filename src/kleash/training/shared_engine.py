"""One engine for several processes: the first asks it, all of them have its answers.

    weights     gathered one after the other; the first process alone keeps and sends them
    responses   written for all rows at once, then sent to every process
    failures    those of the first process, raised in all

A response depends on its seed and not on who asked, so it is the same with any number of processes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.mesh import Mesh
from kleash.rollout.engine import NamedTensors, SeparateEngine, WritingRequest
from kleash.training.data_parallel import together
from kleash.types import Rollout

_PATIENCE = 1.0
"""Seconds between two exchanges while the engine works: none of them may last as long as writing
does, or the processes would give each other up."""


class SharedEngine:
    """A `SeparateEngine` that every process calls alike; the first one alone has a real one."""

    def __init__(self, engine: SeparateEngine | None, mesh: Mesh) -> None:
        """`engine` is None in all processes but the first."""
        self.loaded: int | None = None
        self._engine, self._mesh = engine, mesh

    @property
    def seeded(self) -> bool:
        """Each response has a seed of its own, drawn alike by every process."""
        return True

    @property
    def concurrent(self) -> bool:
        """See `SeparateEngine`: processes that exchange something cannot do so in two threads."""
        return False

    def write(self, request: WritingRequest) -> Rollout:
        """See `RolloutEngine`."""
        rows = range(len(request.prompts.ids))
        try:
            written = self._by_first(lambda engine: engine.write(request), rows=rows)
        except BaseException:
            self.loaded = None
            raise
        columns: dict[str, Tensor] = {}
        if written is not None:
            assert written.sampler_logprobs is not None
            columns = {
                "ids": written.response_ids,
                "mask": written.response_mask.long(),
                "ended": written.ended.long(),
                "logprobs": written.sampler_logprobs,
            }
        got = self._from_first(columns, len(rows))
        prompts, device = request.prompts, request.prompts.ids.device
        return Rollout(
            prompt_ids=prompts.ids,
            prompt_mask=prompts.mask,
            response_ids=got["ids"].to(device),
            response_mask=got["mask"].bool().to(device),
            ended=got["ended"].bool().to(device),
            prompt_index=prompts.index,
            sampler_logprobs=got["logprobs"].to(device),
        )

    def wait_until_back(self) -> None:
        """See `SeparateEngine`."""
        self._by_first(lambda engine: engine.wait_until_back())

    def load_weights(self, weights: NamedTensors) -> None:
        """See `SeparateEngine`."""

        def send() -> None:
            rest = iter(weights)
            try:
                if self._engine is not None:
                    self._engine.load_weights(rest)
            finally:
                # Divided weights are gathered as they are asked for, by all processes together:
                # one that sends nothing, or failed at it, asks for them too.
                for _ in rest:
                    pass

        self._mesh.agree(send)

    def text_logprobs(self, texts: Sequence[Sequence[int]]) -> list[Float[Tensor, " token"]]:
        """See `SeparateEngine`."""
        return self._laws(lambda engine: engine.text_logprobs(texts), texts)

    def next_token_logprobs(
        self, texts: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[Float[Tensor, "token vocab"]]:
        """See `SeparateEngine`."""
        return self._laws(
            lambda engine: engine.next_token_logprobs(texts, temperature=temperature), texts
        )

    def close(self) -> None:
        """See `RolloutEngine`."""
        if self._engine is not None:
            self._engine.close()

    def _laws(
        self, ask: Callable[[SeparateEngine], list[Tensor]], texts: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        said = self._by_first(ask)
        columns = {} if said is None else {"laws": torch.cat(said)}
        lengths = [len(text) - 1 for text in texts]
        return list(self._from_first(columns, sum(lengths))["laws"].split(lengths))

    def _by_first(
        self, work: Callable[[SeparateEngine], Any], *, rows: Sequence[int] | None = None
    ) -> Any:
        """What the first process does with the engine, however long; None in the others.

        Raises:
            KleashError: it failed, in all processes.
        """
        if self._engine is None:
            while not self._mesh.gather(None)[0]:
                pass
            return self._mesh.agree(lambda: None, rows=rows)
        with ThreadPoolExecutor(1, thread_name_prefix="kleash-engine") as pool:
            future: Future[Any] = pool.submit(work, self._engine)
            done = False
            while not done:
                done = bool(wait([future], timeout=_PATIENCE).done)
                self._mesh.gather(done)
        return self._mesh.agree(future.result, rows=rows)

    def _from_first(self, columns: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """The first process's columns, in all."""
        some = list(columns.values())
        numbers = torch.arange(count if columns else 0, device=some[0].device if some else "cpu")
        return together(columns, numbers, count, self._mesh)
