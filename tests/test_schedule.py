"""The tail of a training and rho over time."""

import pytest

import samon


@pytest.mark.parametrize(("total", "fraction", "start"), [(10, 0.3, 7), (10, 1.0, 0), (3, 0.5, 1), (100, 0.006, 99)])
def test_the_tail_is_a_share_of_all_updates(total: int, fraction: float, start: int) -> None:
    tail = samon.Tail(total, fraction)
    assert tail.start == start
    assert [update in tail for update in range(total)] == [update >= start for update in range(total)]


def test_a_ramp_starts_with_the_two_pass_phase() -> None:
    ramp = samon.RhoSchedule("linear", 0.5, rho_min=0.1, start=10, warmup=4)
    assert [ramp.at(update, 0.0) for update in (0, 10, 11, 14, 99)] == pytest.approx([0.1, 0.1, 0.2, 0.5, 0.5])


def test_rho_follows_the_learning_rate() -> None:
    schedule = samon.RhoSchedule("lr", 0.5, rho_min=0.1, lr_max=1.0, lr_min=0.2)
    assert [schedule.at(0, lr) for lr in (1.0, 0.6, 0.2, 0.0, 2.0)] == pytest.approx([0.5, 0.3, 0.1, 0.1, 0.5])
    assert samon.RhoSchedule("constant", 0.5).at(7, 0.1) == 0.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "cosine"}, "one of constant, linear, lr"),
        ({"kind": "lr", "lr_max": 1.0, "rho_min": 0.6}, "rho_min=0.6 must be between"),
        ({"kind": "linear"}, "needs warmup"),
        ({"kind": "lr", "lr_max": 1.0, "warmup": 3}, "needs warmup"),
        ({"kind": "lr", "lr_max": 0.1, "lr_min": 0.1}, "learning rate that is constant"),
    ],
)
def test_what_is_no_schedule_is_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(samon.UserError, match=message):
        samon.RhoSchedule(rho=0.5, **kwargs)


@pytest.mark.parametrize(
    ("total", "fraction", "message"),
    [
        *[(10, fraction, "fraction in") for fraction in (0.0, -0.1, 1.1)],
        *[(total, 0.04, f"0.04 of {total} updates, is less than one") for total in (10, 0, -5)],
    ],
)
def test_a_tail_outside_the_training_is_refused(total: int, fraction: float, message: str) -> None:
    with pytest.raises(samon.UserError, match=message):
        samon.Tail(total, fraction)
