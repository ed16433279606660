"""The written order: spamd for large messages, spamd, clamd, never the signatures."""

import pytest

from contentfilter.model import Scanner
from contentfilter.policy.shedding import SHED, expected_wait, mean_with, patience, what_is_shed
from contentfilter.settings import ClamdSettings, SpamdSettings


def test_patience_ends_in_the_written_order() -> None:
    order = [
        patience(Scanner.SPAMD, large=True, max_wait=SpamdSettings().max_wait),
        patience(Scanner.SPAMD, large=False, max_wait=SpamdSettings().max_wait),
        patience(Scanner.CLAMD, large=True, max_wait=ClamdSettings().max_wait),
    ]
    assert order == sorted(set(order))
    assert patience(Scanner.CLAMD, large=False, max_wait=7.0) == patience(Scanner.CLAMD, large=True, max_wait=7.0)


def test_what_is_left_out_has_a_name_and_the_signatures_have_none() -> None:
    words = {
        what_is_shed(scanner, large=large) for scanner in (Scanner.CLAMD, Scanner.SPAMD) for large in (True, False)
    }
    assert words | {"waiting"} == set(SHED)
    assert "signatures" not in SHED


@pytest.mark.parametrize(("ahead", "places", "mean", "wait"), [(0, 1, 2.0, 2.0), (9, 5, 2.0, 4.0), (99, 2, 0.0, 0.0)])
def test_the_wait_goes_by_those_ahead_and_the_places(ahead: int, places: int, mean: float, wait: float) -> None:
    assert expected_wait(ahead, places, mean) == wait


def test_the_mean_follows_the_answers() -> None:
    mean = mean_with(None, 10.0)
    assert mean == 10.0
    for _ in range(50):
        mean = mean_with(mean, 1.0)
    assert 1.0 < mean < 1.1
