"""The checks before a run, over the objects that training uses, and the monitor during it.

runner                  all checks in order over one shared batch; checks/ has them by subject
probe_batch             that batch: sampled, scored by policy and reference, judged
findings, console       the result of a check, and the table of all results
comparison              two ways to compute a log-probability;  sampling_distribution  its tests
framework_configs       KL settings of other frameworks, read from their files
runtime_monitor         a callback of the training loop

May import training and everything below it; training never imports it. Start reading at
`runner.check`.
"""
