"""Policy, reference, reward and value models: opened, checked, probed and written.

loading, hub, trunk    models and tokenizers from a directory or hub name; nothing executes code
policy, lm_head        a causal language model as hidden states and a head; its adapter is in lora
reference_offload      a reference kept in main memory;  merging  adapters into their base
reward_model, judge_loading, callable_reward, async_calls, user_code    scores of responses
value_model            a critic;  chat_templates, vocabulary  text to token ids
batching               rows that are read together, microbatches and shares of processes
checkpoint, fingerprint, probing    writing, naming and testing a model

May import storage, scoring, kl, masked, types and errors; knows no configuration and no run.
Start reading at `policy.py`.
"""
