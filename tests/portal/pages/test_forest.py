from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portal.pages.forest import forest

shares = st.floats(-0.5, 1.0)


def at(position: str) -> float:
    assert position.endswith("%")
    return float(position[:-1])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault of the drawing's
@given(st.lists(st.tuples(st.floats(0, 1), shares, st.floats(0, 0.3)), min_size=1, max_size=30))
def test_everything_drawn_is_inside_and_in_order(rows):
    drawn = forest([(count, share, share - width, share + width) for count, share, width in rows])

    for mark in drawn.marks:
        assert -0.01 <= at(mark.low) <= at(mark.x) <= at(mark.high) <= 100.01
        assert -0.01 <= at(mark.count) <= 100.01
    places = [at(tick.x) for tick in drawn.ticks]
    assert places == sorted(places) and places[0] == 0 and places[-1] == 100
    assert 2 <= len(places) <= 8
    assert sum(tick.is_zero for tick in drawn.ticks) == 1


def test_ticks_are_round_and_say_their_share():
    drawn = forest([(0.10, 0.20, 0.177, 0.227), (0.04, -0.011, -0.02, 0.003)])

    assert [tick.label for tick in drawn.ticks] == ["−10 %", "0 %", "10 %", "20 %", "30 %"]
    assert (drawn.marks[0].x, drawn.marks[0].count) == ("75.00%", "50.00%")


def test_what_was_not_measured_has_a_count_only():
    drawn = forest([(0.6, None, None, None), (0.4, None, None, None)])

    assert [mark.has_measure for mark in drawn.marks] == [False, False]
