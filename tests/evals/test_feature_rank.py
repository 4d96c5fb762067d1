import pytest
import timm
import torch
from torch import nn

from samon.errors import UserError
from samon.evals.feature_rank import energy_rank, extract_features, feature_matrix, squared_singular_values


def with_singular_values(values, rows, columns):
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64, generator=generator))
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("shape", [(40, 15), (15, 40)])
def test_rank_counts_singular_values_that_hold_99_percent(shape):
    phi = with_singular_values([10.0, 5.0, 1.0, 0.5, 0.1], *shape)  # shares .7920 .9901 .9980 ...
    squares = squared_singular_values(phi, "none")
    assert squares[:5].sqrt().tolist() == pytest.approx([10, 5, 1, 0.5, 0.1], rel=1e-6)
    assert energy_rank(squares) == 2
    assert energy_rank(squares, 0.995) == 3
    assert energy_rank(squares, 0.5) == 1
    assert energy_rank(torch.zeros(4)) == 0
    assert energy_rank(torch.tensor([95.0, 3.5, 1.0, 0.5])) == 3  # 98.5 % are too few


def test_centering_subtracts_the_mean_of_examples_or_of_features():
    phi = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    for centering, centered in (("row", phi - phi.mean(1, keepdim=True)), ("column", phi - phi.mean(0))):
        exact = torch.linalg.svdvals(centered.double()).square()
        assert torch.allclose(squared_singular_values(phi, centering), exact, atol=1e-5)
    one_feature = torch.ones(30, 8) * torch.arange(30.0)[:, None]  # no variance within a row
    assert energy_rank(squared_singular_values(one_feature, "row")) == 0
    assert energy_rank(squared_singular_values(one_feature, "column")) == 1


def test_layers_by_name_and_the_class_token():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens = vit.forward_features(x)
        assert torch.equal(extract_features(vit, x), tokens[:, 0])
        assert torch.equal(extract_features(vit, x, token="all"), tokens.flatten(1))
        assert torch.equal(vit.norm(extract_features(vit, x, "blocks.1", "all").view_as(tokens)), tokens)
        assert torch.equal(vit.head(extract_features(vit, x, "pre_logits")), vit(x))
        assert torch.equal(extract_features(vit, x, "norm", "cls"), tokens[:, 0])
    net = timm.create_model("resnet10t", num_classes=4).eval()
    assert extract_features(net, torch.randn(2, 3, 64, 64)).shape == (2, 512 * 2 * 2)
    with pytest.raises(UserError, match=r"no layer 'blocks.7'.*blocks.0"):
        extract_features(vit, x, "blocks.7")


def test_feature_matrix_fills_its_rows_in_eval_mode():
    class Net(nn.Module):
        def forward_features(self, x):
            assert not self.training
            return 2 * x

    x = torch.randn(5, 3)
    batches = [(torch.tensor([3, 4]), x[3:]), (torch.tensor([0, 1]), x[:2])]
    net = Net().train()
    phi = feature_matrix(net, batches, 5)
    assert torch.equal(phi, 2 * torch.cat([x[:2], torch.zeros(1, 3), x[3:]]))
    assert net.training
    with pytest.raises(UserError, match="no batch"):
        feature_matrix(net, [], 5)
