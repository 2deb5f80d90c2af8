"""Prompts in, scored responses out.

prompt_files    rows of files, data sets and lists, each with its place in words
prompts         rows to token ids, with the columns that the reward reads; the cursor over them
sampling        the policy writes responses; their text and tokens for reward models
engine          the protocol of what writes: the policy itself, or vLLM
hand_over       the policy's weights to an engine of its own, and the proof that they arrived
scoring_pass    log-probabilities and KL of what was written, by policy and reference
top_tokens      the likeliest tokens at a position, for reports
text_metrics    variety of texts

May import models, algorithms, scoring, kl, masked, types and errors. Begin with `prompts`.
"""
