"""Policy-gradient algorithms as pairs of functions over tensors; none of them sees a model.

Each of `ppo.py`, `grpo.py` and `rloo.py` has `prepare` (rewards and advantages, once per rollout)
and `loss` (once per microbatch); `dispatch.py` selects by the type of the settings. Start with
`ppo.py`.

    rewards.py      a score per response and a KL per token to a reward per token
    advantages.py   GAE, leave-one-out, group-relative
    losses.py       clipped policy and value losses
    common.py       what the three share

May import `kl`, `masked`, `types`, `errors`; never transformers, a configuration or a file.
"""
