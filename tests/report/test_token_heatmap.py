"""Which responses a page shows, and how their tokens read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import synthetic_sample, write_synthetic_run

from kleash.report.token_heatmap import MAX_RESPONSES, level, page_samples, spaced
from kleash.storage.run_directory import read_run


@pytest.mark.parametrize(("kl", "expected"), [(0, 0), (0.00999, 0), (0.01, 1), (10, 7), (1e9, 7)])
def test_levels(kl, expected):
    assert level(float(kl)) == expected


@given(
    words=st.lists(st.text("ab", min_size=1), max_size=6),
    gaps=st.lists(st.sampled_from([" ", "\n", "  "]), min_size=6, max_size=6),
)
def test_tokens_get_their_spaces_back(words, gaps):
    response = "".join(gap + word for gap, word in zip(gaps, words, strict=False))
    assert "".join(spaced([*words, "<eos>"], response)) == response + "<eos>"
    whole = [response[:3], response[3:]] if len(response) > 3 else [response]
    assert spaced(whole, response) == whole


def test_a_page_holds_an_equal_share_of_each_run(tmp_path):
    extra = tuple(synthetic_sample(step=step, tokens=2) for step in range(MAX_RESPONSES + 10))
    long = read_run(write_synthetic_run(tmp_path / "a", steps=1, responses=0, extra_samples=extra))
    short = read_run(write_synthetic_run(tmp_path / "b", steps=1, responses=2))
    shown, words, left_out = page_samples([long, short])
    assert len(shown) == MAX_RESPONSES // 2 + 4 and left_out == MAX_RESPONSES // 2 + 10
    assert shown[0]["step"] == MAX_RESPONSES + 9
    assert len(words) == len(set(words)) < 5 * len(shown)
