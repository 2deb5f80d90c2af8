"""How the KL coefficient β moves during training.

A controller is a frozen dataclass with `init() -> BetaState` and
`update(state, measurement) -> BetaState`; the state is plain numbers, kept in checkpoints.
Start with `controllers.py`.

    controllers.py    fixed, scheduled and Ziegler's adaptive β
    budget.py         β that holds a KL budget: feed-forward from the plan, feedback for the rest
    groups.py         a controller for each group of prompts
    state.py          measurement, state, and checks of settings

May import `kl`, `types`, `errors`; knows nothing of models, runs or files.
"""
