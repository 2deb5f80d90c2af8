"""Bins of positions: narrow where most responses are, open at the end."""

from kleash.kl.position_bins import POSITIONS, first_position, position_bins


def test_bins_of_positions_go_up_and_never_end() -> None:
    bins = position_bins(5000)
    assert bool((bins.diff() >= 0).all()) and bins[:64].tolist() == list(range(64))
    assert int(bins.max()) < POSITIONS and position_bins(0).shape == (0,)
    for at in (0, 63, 64, 100, 4999):
        place = int(bins[at])
        assert first_position(place) <= at < first_position(place + 1)
    assert int(position_bins(2_000_000).max()) == POSITIONS - 1
