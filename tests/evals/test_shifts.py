"""ImageNet's class lists and label conventions, against facts from outside: published lists, counts and indices."""

import json

import pytest

from samon.data.classes import validation_number
from samon.errors import UserError
from samon.evals import shifts


def test_class_lists_are_the_published_ones():
    for synset, index in (("n01443537", 1), ("n07753592", 954), ("n01795545", 80)):  # goldfish, banana, black grouse
        assert shifts.synsets()[index] == synset
    a, r = shifts.subset_indices("a"), shifts.subset_indices("r")
    assert len(a) == len(r) == 200
    assert a[:5] == [6, 11, 13, 15, 17]  # Hendrycks et al. 2021: stingray, goldfinch, junco, robin, jay
    assert r[:5] == [1, 2, 4, 6, 8]  # goldfish, great white shark, hammerhead, stingray, hen
    objects = shifts.objectnet_classes()
    assert (len(objects), objects["banana"], objects["bench"]) == (113, [954], [703])
    assert sum(len(indices) > 1 for indices in objects.values()) == 9
    assert shifts.SETS["objectnet"].border == 2
    v2 = {name for name in shifts.SETS if name.startswith("imagenetv2")}
    assert v2 == {f"imagenetv2-{form}" for form in ("matched-frequency", "threshold0.7", "top-images")}
    assert int(shifts.real_labels().any(1).sum()) == 46837


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        ("imagenetv2-top-images", ["0", "n01440764"], r"'n01440764' is no integer 0\.\.999"),
        ("imagenet-sketch", ["tench"], "'tench' is no ImageNet synset"),
        ("imagenet-r", ["n01440764"], "'n01440764' is not among the 200 classes of imagenet-r"),
        ("objectnet", ["n01440764"], "'n01440764' is no ObjectNet class"),
        ("imagenet-r", None, "need class_names in _info.json"),
    ],
)
def test_unknown_classes(kind, names, message):
    with pytest.raises(UserError, match=message):
        shifts.label_table(kind, names)


def test_validation_images_are_numbered_from_one():
    assert validation_number("x/ILSVRC2012_val_00000001.JPEG") == 0
    for wrong in ("tench.png", "ILSVRC2012_val_00000000.JPEG", "ILSVRC2012_val_00050001.JPEG"):
        with pytest.raises(UserError, match=f"{wrong}: labels of .* go by"):
            validation_number(wrong)


@pytest.mark.parametrize("wrong", [{"a": 1}, [[0]] * 49_999, [[-1]] * 50_000, [[1000]] * 50_000, [0] * 50_000, "{"])
def test_real_labels_are_lists_of_classes(tmp_path, wrong):
    path = tmp_path / "real.json"
    path.write_text(wrong if isinstance(wrong, str) else json.dumps(wrong))
    with pytest.raises(UserError, match=r"--real-labels .*/real\.json: "):
        shifts.real_labels(str(path))
