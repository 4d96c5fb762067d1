import pytest
import torch
import torch.nn.functional as F

from samon.errors import UserError
from samon.evals.accuracy import accuracy, score

LOGITS = torch.randn(37, 9, generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(0, 9, (37,), generator=torch.Generator().manual_seed(1))


class Table(torch.nn.Module):
    """Gives the logits that its input names by row."""

    def forward(self, rows):
        assert not self.training
        return LOGITS[rows]


def loader(size=10, target=TARGET):
    rows = torch.arange(37)
    return [(rows[i : i + size], target[i : i + size]) for i in range(0, 37, size)]


def test_figures_equal_their_definition_and_the_mode_is_put_back():
    model = Table().train()
    found = accuracy(model, loader(), device="cpu")
    order = LOGITS.argsort(1, descending=True)
    assert found["num_samples"] == 37
    assert found["top1"] == pytest.approx(100 * (order[:, 0] == TARGET).double().mean().item())
    assert found["top5"] == pytest.approx(100 * (order[:, :5] == TARGET[:, None]).any(1).double().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(LOGITS, TARGET).item(), rel=1e-6)
    assert model.training


def test_restricted_predictions_use_timms_convention():
    columns = [1, 4, 6, 8]
    target = torch.arange(37) % 4  # positions among the columns
    found = score(Table(), loader(target=target), {"kept": (columns, None)}, device="cpu")["kept"]
    kept = LOGITS[:, columns]
    assert found["top1"] == pytest.approx(100 * (kept.argmax(1) == target).double().mean().item())
    assert found["top5"] == 100  # of four columns
    assert found["loss"] == pytest.approx(F.cross_entropy(kept, target).item(), rel=1e-6)


def test_label_sets_count_any_of_them_and_leave_out_rows_without_labels():
    sets = torch.zeros(3, 9, dtype=torch.bool)
    sets[0, [2, 5]] = True
    sets[1, 7] = True  # row 2 has no label
    target = torch.arange(37) % 3
    found = score(Table(), loader(target=target), {"sets": (None, sets)}, device="cpu")["sets"]
    counted = target < 2
    right = sets[target].gather(1, LOGITS.argmax(1, keepdim=True))[:, 0]
    probability = (LOGITS.softmax(1) * sets[target]).sum(1)
    assert found["num_samples"] == counted.sum()
    assert found["top1"] == pytest.approx(100 * right[counted].double().mean().item())
    assert found["loss"] == pytest.approx(-probability[counted].log().mean().item(), rel=1e-5)


def test_one_pass_gives_several_readings():
    one_hot = F.one_hot(TARGET, 9).bool()
    rows = torch.arange(37)
    found = score(Table(), loader(target=rows), {"a": (None, one_hot), "b": ([0, 1], one_hot)}, device="cpu")
    assert found["a"]["top1"] == pytest.approx(accuracy(Table(), loader(), device="cpu")["top1"])
    assert found["b"]["num_samples"] == (TARGET < 2).sum()


def test_nothing_to_count_is_an_error():
    with pytest.raises(UserError, match="nothing to evaluate"):
        accuracy(Table(), [], device="cpu")
