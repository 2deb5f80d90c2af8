"""The checks, one module per subject: `logprobs.head` is `head` in `logprobs.py`.

logprobs, sampling, masks    of the policy's and reference's numbers, responses and masks
reference, reward_model, prompts    of what a run is given
objective, precision, resources    of the loss and β, of updates in half precision, of memory

Each takes a `Trial` (see `preflight.probe_batch`) and returns a `Finding`; none changes the run.
May import what preflight may. Start reading at `masks.py`.
"""
