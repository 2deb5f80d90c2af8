#!/usr/bin/env bash
# Everything that a GPU alone can show, in at most ten minutes; ends at the first wrong number.
#
#     bash benchmarks/gpu.sh            # from the checkout, with the package installed
#
# Not run on a GPU yet: the script was read and its parts for a CPU were run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
output=${OUT:-runs/gpu}
mkdir -p "$output"

step() { printf '\n== %s\n' "$1"; }

step "the device"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name(), torch.__version__)'

step "Triton kernels and bfloat16 products against float64"
timeout 180 "$python" -m pytest -q -x tests/scoring/test_triton.py tests/scoring/test_tile_bodies.py

step "exact KL against other implementations"
timeout 120 "$python" benchmarks/exact_kl.py others | tee "$output/exact_kl.txt"

step "stories, 20 steps, bf16"
timeout 240 "$python" -m kleash train stories --device cuda --policy.precision bf16 \
    --steps 20 --output "$output/stories" | tee "$output/stories.txt"
"$python" - "$output/stories/metrics.jsonl" <<'PY'
import json
import sys
from pathlib import Path

lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
steps = [line for line in lines if line.get("objective/kl_ref") is not None]
first, last = steps[0], steps[-1]
worst = max(abs(line["rollout/kl_sampler"]) for line in steps)
print(f"KL {first['objective/kl_ref']:.3g} to {last['objective/kl_ref']:.3g} nats, "
      f"score {first['objective/scores']:+.3f} to {last['objective/scores']:+.3f}, "
      f"largest kl_sampler {worst:.3g}")
assert abs(first["objective/kl_ref"]) < 1e-4, "KL at the first step is not 0"
assert last["objective/scores"] > first["objective/scores"], "the score did not rise"
assert worst < 0.5, "the sampler does not write by the scored law"
PY

step "predicted step on this device"
"$python" -m kleash check stories --device cuda --policy.precision bf16 --world-size 1
echo "all numbers as they should be"
