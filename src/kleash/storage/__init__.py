"""What kleash writes to disk, and reads back.

run_directory        metrics.jsonl, config.yaml, run.json; created, continued and read here
samples, events      samples.jsonl and events.jsonl of a run
plan_file            plan.json
model_card           README.md of a checkpoint
atomic_files         whole or not at all, also after a kill; atomic_directories the same

Imports kleash.errors and kleash.kl alone of the package. Start reading at run_directory.RunWriter.
"""
