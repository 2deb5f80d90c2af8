"""`bf16` of a divided model: half of the bytes gathered, and the numbers of one process.

The oracle is the whole model under autocast, in a process of its own memory.
"""

from collections.abc import Generator

import pytest
import sharded_bf16
import small_run
import tiny_models
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Generator[Ranks]:
    folder = tmp_path_factory.mktemp("models")
    small_run.save_material(folder, prompts=small_run.two_words(range(8)), heldout=["w1"])
    for kind in ("llama", "gpt2"):
        tiny_models.save_model(folder / kind, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sharded_bf16.FOLDER, str(folder))
        started = Ranks()
    yield started
    started.close()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_are_gathered_in_bfloat16_and_compute_what_one_process_does(
    ranks: Ranks, kind: str
) -> None:
    for found in ranks.call(f"sharded_bf16:{kind}", size=2):
        assert found["gathered"] == ["torch.bfloat16"]
        assert found["vectors"] == found["weights"] == found["gradients"] == ["torch.float32"]
        # Every product has the same factors, rounded in the same way.
        assert found["states"]
        assert found["references"] == [True, True]
        # So a run goes on with another number of processes: its reference is the same.
        assert found["hashes"] == [True, True]
        assert found["gradients apart"] < 1e-6


def test_a_run_gathers_in_its_precision_and_verifies_its_checkpoint_in_it(ranks: Ranks) -> None:
    for found in ranks.call("sharded_bf16:of_a_run", size=2):
        assert found["gathered"] == ["torch.bfloat16"]
        damaged, right = found["refused"]
        assert "opened with plain transformers" in damaged
        assert right is None
