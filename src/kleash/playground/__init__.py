"""The embedded world: a help desk with a known language, known preferences and a known truth.

build             a world in a directory: models, prompts, preferences; start reading here
language          its questions and replies;  preferences  what its raters like
gold              the true quality of a reply;  evaluate  a policy by it
learning, sampling    supervised and reward-model training, and drawing replies
example_reward, vader    rewards of `kleash init` and of the recipe `stories`

May import rollout, models, algorithms, storage, scoring, kl, masked, types and errors.
"""
