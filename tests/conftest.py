"""Shared by all tests: one thread and one Hypothesis profile, so that runs repeat exactly."""

import pytest
import torch
from browser import CHROMIUM
from hypothesis import settings
from playwright.sync_api import sync_playwright

torch.set_num_threads(1)
settings.register_profile("kleash", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("kleash")


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()
