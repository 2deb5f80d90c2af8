"""The training loop, its state, recovery, and several processes.

loop                     the steps of a run; start reading here
assembly, components     models, prompts and rewards from a configuration
startup, session, state, snapshot, recovery    starting, continuing and undoing
optimization, kl_control, tripwires, reference_guard, calibration    parts of a step
evaluation, metrics, evidence, progress, trackers, callbacks    what is measured and reported
data_parallel, replicas, record    several processes: rows divided, steps compared, one that writes

May import report, config and everything below them; never preflight, auditing or cli.
"""
