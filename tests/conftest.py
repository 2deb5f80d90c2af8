"""Shared by all tests: one thread and one Hypothesis profile, so that runs repeat exactly."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("kleash", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("kleash")
