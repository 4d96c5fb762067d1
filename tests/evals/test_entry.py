"""What every evaluation needs: subsets, shares, a model put back, evaluations by name."""

import pytest
from torch import nn

from samon.evals import EVALS, evaluation, needs_data
from samon.evals.entry import choose, evaluating, share
from samon.evals.results import markdown, unique_tails


def test_subsets_and_shares():
    chosen = choose(1000, 100, seed=3)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 100
    assert chosen == choose(1000, 100, seed=3) != choose(1000, 100, seed=4)
    assert choose(5, 100, seed=3) == choose(5, None, seed=3) == [0, 1, 2, 3, 4]
    parts = [share(chosen, 8, rank, 3) for rank in range(3)]
    assert sorted(parts[0] + parts[1] + parts[2]) == chosen
    assert parts[1][:8] == chosen[8:16]


def test_first_is_the_front_of_the_split_and_a_draw_stays_in_it():
    assert choose(1000, None, 0, first=30) == list(range(30))
    assert choose(10, None, 0, first=30) == list(range(10))
    drawn = choose(1000, 20, 3, first=30)
    assert drawn == choose(30, 20, 3)
    assert drawn[-1] < 30


def test_mode_and_gradients_are_put_back_after_an_exception():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    net[0].bias.requires_grad_(False)
    before = [True, False, True, True]

    def fail(gradients, inside):
        with evaluating(net, gradients):
            assert not net.training
            assert [p.requires_grad for p in net.parameters()] == inside
            raise RuntimeError("stopped")

    for gradients, inside in ((None, before), (True, [True] * 4), (False, [False] * 4)):
        with pytest.raises(RuntimeError, match="stopped"):
            fail(gradients, inside)
        assert net.training
        assert [p.requires_grad for p in net.parameters()] == before


def test_every_evaluation_is_a_module_with_rows():
    assert all(callable(evaluation(name).rows) for name in EVALS)
    assert [name for name in EVALS if not needs_data(name)] == ["norm_params"]


def test_headings_name_checkpoints_by_as_much_of_their_paths_as_it_takes():
    """Two checkpoints once made headings of 800 characters."""
    paths = [f"/a/long/way/to/{place}/run-{i}/model_best.pth.tar" for place, i in (("A", 1), ("A", 2), ("B", 1))]
    names = unique_tails(paths)
    short = ["A/run-1/model_best.pth.tar", "run-2/model_best.pth.tar", "B/run-1/model_best.pth.tar"]
    assert [names[path] for path in paths] == short
    about = {"model": "net", "dataset": "d", "eval": "accuracy", "metric": "top1", "value": 50.0, "num_samples": 4}
    head = markdown([about | {"checkpoint": path} for path in paths[1:]]).splitlines()[0]
    assert (
        head
        == "| data set | evaluation | top-1 (run-2/model_best.pth.tar) | top-1 (run-1/model_best.pth.tar) | n | note |"
    )
