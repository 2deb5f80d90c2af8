"""Findings about a run, read from its metrics and kept responses.

drift                budget, efficiency, and the identities that every run must keep
overoptimisation     score against gold score, repetition
kl_by_position       where in a response the policy departs

Every finding is a sentence with the numbers it rests on; nothing here needs a model.
Start reading at drift.drift_findings.
"""
