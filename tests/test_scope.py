"""Which parameters count as normalization parameters, over the families of timm."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.utils import prune

import samon
from samon import scope
from samon.scope import norm_modules, norm_parameters, select, select_bare
from tests.nets import parametrized_norms

# architecture: number of affine normalization tensors. Two (gamma and beta) per normalization layer, one for RMS norms
# and the NoBias variants; layer scale, ResMLP's Affine, ConvNeXt-V2's GRN, tau and v of FRN and EvoNorm do not count.
TENSORS_TABLE = """
resnet50 106, resnet18 40, resnetv2_50 98, wide_resnet50_2 106, resnext50_32x4d 106, seresnet50 106,
ecaresnet50d 110, res2net50_26w_4s 170, resnest50d 142, convnext_tiny 46, convnextv2_tiny 46, efficientnet_b0 98,
tf_efficientnetv2_s 220, tf_efficientnet_lite0 98, mobilenetv3_large_100 92, mobilenetv4_conv_small 92,
regnety_016 172, densenet121 242, vgg16_bn 26, inception_v3 188, xception41 168, dla34 74, hrnet_w18 650,
repvgg_a0 122, ghostnet_100 160, mixnet_s 98, vit_small_patch32_224 50, vit_small_patch16_224 50,
deit3_small_patch16_224 50, vit_so150m_patch16_reg4_map_256 76, eva02_tiny_patch14_224 50,
beit_base_patch16_224 50, swin_tiny_patch4_window7_224 58, swinv2_tiny_window8_256 58, maxvit_tiny_tf_224 158,
coatnet_0_rw_224 70, mixer_b16_224 50, poolformer_s12 50, poolformerv2_s12 30, pvt_v2_b0 60,
xcit_tiny_12_p16_224 114, cait_s24_224 106, levit_128s 104, mobilevit_s 106, edgenext_small 52, nest_tiny 54,
twins_svt_small 96, volo_d1_224 88, focalnet_tiny_srf 58, hiera_tiny_224 50, mambaout_tiny 50,
efficientformer_l1 72, fastvit_t8 140, rdnet_tiny 58, test_vit 26, botnet26t_256 62, resnetv2_50x1_bit 98,
halonet26t 62, convmixer_768_32 130, gmlp_s16_224 122, naflexvit_base_patch16_gap 50, resnetv2_50d_evos 102,
resnetv2_50d_frn 102, skresnet18 72, cspresnet50 110, selecsls42b 82, vovnet39a 78, tresnet_m 120, darknet53 104,
aimv2_large_patch14_224 50, resnetv2_50d_gn 102
"""
TENSORS = {name: int(count) for name, count in map(str.split, TENSORS_TABLE.split(","))}
WITHOUT = ("nfnet_l0", "dm_nfnet_f0", "vgg16", "resmlp_12_224")


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def names_of(model: nn.Module, name: str) -> list[str]:
    """Names of the parameters that the scope perturbs."""
    return list(select(model, name).current())


@pytest.mark.parametrize("name", TENSORS)
def test_architectures(name: str) -> None:
    model = on_meta(name)
    selection = select(model, "samon")
    assert len(selection.parameters) == TENSORS[name]
    owners = {type(m).__name__ for m in norm_modules(model).values()}
    assert all("Norm" in owner for owner in owners)
    # The two scopes split the model: nothing is lost, nothing in both.
    rest = select(model, "samnn").parameters
    assert not set(rest) & set(selection.current())
    assert {*rest, *selection.current()} == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", WITHOUT)
def test_no_normalization_parameters(name: str) -> None:
    with pytest.raises(ValueError, match=rf"samon: {name} has no trainable parameter.*layers: none"):
        select(on_meta(name), "samon")


def test_frozen_parameters_are_left_out_and_shared_ones_counted_once() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4))
    model[2].weight = model[0].weight
    model[3].bias.requires_grad_(False)
    assert names_of(model, "samon") == ["0.weight", "0.bias", "2.bias", "3.weight"]
    for module in (model[0], model[2], model[3]):
        module.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers: LayerNorm.*unfreeze"):
        select(model, "samon")


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        timm.layers.SimpleNorm(4),
        prune.l1_unstructured(nn.LayerNorm(4), "weight", 0.5),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norm_types(norm: nn.Module) -> None:
    """Those that tests/engines/test_groups.py does not step with."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm)
    assert set(norm_parameters(model)) == {f"1.{n}" for n, _ in norm.named_parameters(recurse=False)} != set()


def test_activation_inside_a_norm_layer_is_not_normalization() -> None:
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.PReLU)
    assert list(norm_parameters(nn.Sequential(norm))) == ["0.weight", "0.bias"]


def test_parametrized_gamma() -> None:
    """gamma is computed from other parameters, which are then those of the normalization layer."""
    model = parametrized_norms(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)))
    assert names_of(model, "samon") == ["1.parametrizations.weight.original", "1.bias"]
    assert names_of(model, "samnn") == ["0.weight", "0.bias"]


def test_regular_expression() -> None:
    model = on_meta("resnet18")
    late = select(model, "samon", r"layer4|^fc")
    assert late.narrowed
    assert all(n.startswith("layer4") for n in late.current())
    assert len(late.current()) == 10
    assert not select(model, "samon", ".").narrowed
    with pytest.raises(ValueError, match="perturb='layer9' matches none of the 40 trainable parameters"):
        select(model, "samon", "layer9")
    with pytest.raises(ValueError, match=r"perturb='\(' is not a regular expression"):
        select(model, "samon", "(")


def test_summary_counts_by_layer_type() -> None:
    text = select(on_meta("maxvit_tiny_tf_224"), "samon").summary().splitlines()
    assert text[0].startswith("samon perturbs ")
    assert text[0].endswith("of maxvit_tiny_tf_224")
    assert {line.split(":")[0].strip() for line in text[1:]} == {"BatchNormAct2d", "LayerNorm", "LayerNorm2d"}
    rows = [int(line.split(": ")[1].split(" in ")[0].replace(",", "")) for line in text[1:]]
    assert sum(rows) == int(text[0].split()[2].replace(",", ""))


@pytest.mark.parametrize("way", ["bare", "SAM"])
def test_parameters_unfrozen_later_are_perturbed(way: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4))
    model[1].requires_grad_(False)
    if way == "SAM":
        opt = samon.SAM(torch.optim.SGD(model.parameters(), lr=0.1), select(model, "samon"), rho=0.1)
    else:
        opt = create_optimizer_v2(model.parameters(), "sam", lr=0.1, weight_decay=0.0)
    before = len(opt.perturbed_parameters())
    assert f"in {before} tensors" in opt.selection.summary()
    model[1].requires_grad_(True)
    assert len(opt.perturbed_parameters()) == before + 2
    assert {id(p) for p in opt.perturbed_parameters().values()} >= {id(p) for p in model[1].parameters()}


def test_everything_frozen_and_bare() -> None:
    with pytest.raises(
        samon.UserError, match="none of the 0 trainable parameters of scope sam in the parameter groups"
    ):
        create_optimizer_v2(nn.Linear(4, 4).requires_grad_(False).parameters(), "sam", lr=0.1)


def test_an_attribute_called_module_is_no_wrapper() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.module = nn.LayerNorm(4), nn.ModuleDict({"norm": nn.LayerNorm(4)})
            self._orig_mod = nn.Linear(4, 4)

    names = ["norm.weight", "norm.bias", "module.norm.weight", "module.norm.bias"]
    everything = [*names, "_orig_mod.weight", "_orig_mod.bias"]
    assert names_of(Pair(), "samon") == names
    assert names_of(Pair(), "sam") == everything
    assert names_of(nn.DataParallel(Pair()), "sam") == everything


def test_names_are_those_without_the_wrappers_around_and_inside_a_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4)), nn.LayerNorm(4))
    bare = names_of(model, "sam")
    assert names_of(torch.compile(model), "sam") == bare
    model[1] = torch.compile(nn.DataParallel(model[1]), backend="eager")
    model[2] = torch.compile(model[2], backend="eager")
    assert names_of(model, "sam") == bare
    assert names_of(model, "samon") == ["1.0.weight", "1.0.bias", "2.weight", "2.bias"]


def test_two_parameters_of_one_name() -> None:
    class Extended(nn.DataParallel):
        def __init__(self, module: nn.Module):
            super().__init__(module)
            self.head = nn.Linear(4, 4)

    model = nn.Sequential(Extended(nn.ModuleDict({"head": nn.Linear(4, 4)})))
    with pytest.raises(samon.UserError, match=r"'0\.head\.weight' names two"):
        select(model, "sam")
    groups = [{"params": [(n, p) for n, p in nn.Linear(2, 2).named_parameters()]} for _ in range(2)]
    with pytest.raises(samon.UserError, match="'weight' names two"):
        samon.SAM(base := torch.optim.SGD(groups, lr=0.1), select_bare(base.param_groups, "sam"), rho=0.1)


class LlamaRMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class OwnLayerNorm(LlamaRMSNorm):
    pass


class ChannelNorm(nn.Module):
    def __init__(self, *shape: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(shape))


@pytest.mark.parametrize(("shape", "warns"), [((4,), True), ((1, 4, 1, 1), True), ((1, 1, 4), False), ((4, 4), False)])
def test_a_norm_by_name_is_recognized_by_its_parameters(shape: tuple[int, ...], warns: bool) -> None:
    """[1, 1, C] is a class token or a position embedding."""
    assert scope.looks_like_norm(ChannelNorm(*shape)) == warns


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(scope, "NORM_TYPES", dict(scope.NORM_TYPES))


def test_unknown_normalization_layers(registry) -> None:
    alone, mixed = (nn.Sequential(nn.Linear(4, 4), LlamaRMSNorm(4), *more) for more in ([], [nn.LayerNorm(4)]))
    with pytest.raises(samon.UserError, match=r"layers: none.*LlamaRMSNorm.*samon\.register_norm"):
        create_optimizer_v2(alone, "samon", lr=0.1)
    for name in ("samon", "samnn"):
        with pytest.warns(UserWarning, match=rf"{name}: Sequential .* LlamaRMSNorm; .*samon\.register_norm"):
            opt = create_optimizer_v2(mixed, name, lr=0.1)
    assert "1.scale" in opt.perturbed_parameters()
    create_optimizer_v2(mixed, "sam", lr=0.1)  # no warning: all is perturbed whatever it is
    samon.register_norm(LlamaRMSNorm, dim=-1)
    mixed.append(OwnLayerNorm(4))
    assert names_of(mixed, "samon") == ["1.scale", "2.weight", "2.bias", "3.scale"]
    assert names_of(mixed, "samnn") == ["0.weight", "0.bias"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("convert", [torch.jit.script, torch.fx.symbolic_trace])
def test_conversions_that_hide_the_classes_of_layers_are_refused(convert) -> None:
    hidden = convert(nn.Sequential(nn.Linear(4, 4), timm.layers.LayerNorm(4)))
    with pytest.raises(samon.UserError, match="hide which layers normalize"):
        create_optimizer_v2(nn.Sequential(hidden, nn.LayerNorm(4)), "samon", lr=0.1)
    create_optimizer_v2(hidden, "sam", lr=0.1)
    create_optimizer_v2(torch.fx.symbolic_trace(on_meta("resnet18")), "samon", lr=0.1)  # has its layers as modules
    create_optimizer_v2(nn.Sequential(convert(timm.layers.Mlp(4)), nn.LayerNorm(4)), "samon", lr=0.1)  # has no norm


def test_register_norm_refuses_what_is_no_class_or_dimension() -> None:
    with pytest.raises(samon.UserError, match=r"takes an nn\.Module class"):
        samon.register_norm(LlamaRMSNorm(4), dim=1)
    with pytest.raises(samon.UserError, match="dim must be 1"):
        samon.register_norm(LlamaRMSNorm, dim=2)
