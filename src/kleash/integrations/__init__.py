"""kleash inside the loops people already run: callbacks and plug-ins for other trainers.

trl            exact KL, a KL budget, tripwires and an exact KL loss in GRPOTrainer and RLOOTrainer
verl           a KL budget and a policy loss for its registries
transformers   drift from the base during any Trainer's run, and `assert_close` for tests

Nothing here is imported by the rest of kleash, and a library is needed only where its module is
used. Left out: generating with another engine, and models split over devices.
"""
