"""Numbers have decimals by what they measure and units by their size."""

import pytest

from samon.format import metric_format, quantity, wrapped


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("eval_loss", 0.0123456, "0.0123"),
        ("train_loss_perturbed", 12.34567, "12.3457"),
        ("eval_top1", 87.4, "87.40"),
        ("robust_top1", 100.0, "100.00"),
        ("lr", 0.00012346, "0.0001235"),
    ],
)
def test_a_metric_always_has_the_same_decimals(metric: str, value: float, text: str) -> None:
    assert f"{value:{metric_format(metric)}}" == text


def test_units_go_by_size() -> None:
    assert quantity(2.1555e9, "FLOP") == "2.155 GFLOP"
    assert quantity(0, "B", 1024) == "0 B"
    assert quantity(3 * 2**20, "B", 1024) == "3 MiB"
    assert quantity(1000, "B", 1024) == "1000 B"
    assert quantity(1e24, "FLOP") == "1e+06 EFLOP"


def test_paths_are_wrapped_at_their_directories() -> None:
    assert wrapped("a/run/model.pth", 30) == "a/run/model.pth"
    assert wrapped("20261125-214518-resnet10t/model_best.pth.tar", 30) == (
        "20261125-214518-resnet10t/\nmodel_best.pth.tar"
    )
    assert max(map(len, wrapped("a" * 70 + "/b" * 30, 30).splitlines())) <= 30
