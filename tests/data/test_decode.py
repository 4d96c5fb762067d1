"""The tensor path against timm's Pillow path: the same choices, nearly the same pixels."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision.transforms import ColorJitter
from torchvision.transforms.functional import pil_to_tensor

from samon import rng
from samon.data.decode import TensorJitter, choose_decoder, decode_pil, decode_tensor
from samon.errors import UserError
from tests import efficientnet_lite0

PHOTOS = sorted(Path(__file__).parents[1].glob("photographs/*/*.jpg"))
EVAL = {"is_training": False, "use_prefetcher": True}
TRAIN = {"is_training": True, "use_prefetcher": True, "color_jitter": None}


def encoded(image, **options):
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


def both_paths(data, size, options, seed=0):
    """One image by timm's Pillow path and by the tensor path, int16 [3, H, W] each."""
    transform = create_transform(size, **options)
    results = []
    for decoder in ("pil", "torch"):
        decode, step = choose_decoder(decoder, transform, "RGB")
        rng.seed(seed)
        results.append(torch.as_tensor(step(decode(data))).to(torch.int16))
    return results


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: path.stem)
def test_jpegs_decode_to_the_same_pixels(photo):
    data = photo.read_bytes()
    assert torch.equal(decode_tensor(data), pil_to_tensor(decode_pil(data)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [{}, {"crop_pct": 1.0}, {"crop_mode": "squash"}])
def test_evaluation_pixels_are_within_one_level(interpolation, crop):
    for photo in PHOTOS:
        pil, tensor = both_paths(photo.read_bytes(), (3, 160, 160), EVAL | {"interpolation": interpolation} | crop)
        assert pil.shape == tensor.shape == (3, 160, 160)
        difference = (pil - tensor).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.01


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_training_makes_the_same_choices(interpolation):
    for photo in PHOTOS:
        for seed in range(20):
            pil, tensor = both_paths(photo.read_bytes(), (3, 96, 96), TRAIN | {"interpolation": interpolation}, seed)
            difference = (pil - tensor).abs()
            # Bicubic overshoots; where that is cut off between the two passes, a few values differ by more.
            assert difference.max() <= (1 if interpolation == "bilinear" else 12)
            assert (difference > 1).float().mean() < 2e-3
            assert difference.float().mean() < 0.25


def test_colour_jitter_is_pillows():
    jitter = ColorJitter(0.4, 0.4, 0.4)
    ours = TensorJitter(jitter)
    for photo in PHOTOS:
        image = decode_pil(photo.read_bytes())
        for seed in range(10):
            torch.manual_seed(seed)
            expected = pil_to_tensor(jitter(image)).to(torch.int16)
            torch.manual_seed(seed)
            difference = (ours(pil_to_tensor(image)).to(torch.int16) - expected).abs()
            assert difference.max() <= 1  # where float32 rounds the other way
            assert difference.float().mean() < 1e-3


def test_timms_default_training_stays_close():
    for photo in PHOTOS:
        for seed in range(10):
            options = {"is_training": True, "use_prefetcher": True}
            pil, tensor = both_paths(photo.read_bytes(), (3, 96, 96), options, seed)
            difference = (pil - tensor).abs()
            assert (difference > 2).float().mean() < 2e-2
            assert difference.float().mean() < 0.5


def test_normalised_output_without_the_prefetcher():
    transform = create_transform((3, 64, 64), use_prefetcher=False)
    data = PHOTOS[0].read_bytes()
    pil, tensor = (
        step(decode(data)) for decode, step in (choose_decoder(name, transform, "RGB") for name in ("pil", "torch"))
    )
    assert (pil - tensor).abs().max() < 1.01 / 255 / 0.224


def test_a_pretrained_models_predictions_do_not_change():
    model = efficientnet_lite0.create().eval()
    options = EVAL | {"interpolation": "bicubic", "crop_pct": 0.875}
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.default_cfg["mean"], model.default_cfg["std"]))
    for photo in PHOTOS:
        image = decode_pil(photo.read_bytes())
        large = encoded(image.resize((2 * image.width, 2 * image.height)), format="JPEG")
        with torch.inference_mode():
            pil, tensor = (model(((x / 255 - mean) / std)[None]).softmax(1) for x in both_paths(large, 224, options))
        assert pil.argmax() == tensor.argmax()
        assert (pil - tensor).abs().max() < 1e-3


def _modes():
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (40, 30, 4), dtype=np.uint8), "RGBA")
    rgb = colour.convert("RGB")
    palette = rgb.convert("P")
    palette.info["transparency"] = b"\x80" * 200
    deep = Image.fromarray(rng.integers(0, 65536, (40, 30)).astype(np.uint16))
    return {
        "rgba png": (colour, {"format": "PNG"}),
        "palette png": (palette, {"format": "PNG"}),
        "16 bit png": (deep, {"format": "PNG"}),
        "bilevel png": (rgb.convert("1"), {"format": "PNG"}),
        "grey png": (rgb.convert("L"), {"format": "PNG"}),
        "grey alpha png": (colour.convert("LA"), {"format": "PNG"}),
        "grey jpeg": (rgb.convert("L"), {"format": "JPEG"}),
        "cmyk jpeg": (rgb.convert("CMYK"), {"format": "JPEG"}),
        "progressive jpeg": (rgb, {"format": "JPEG", "progressive": True}),
        "444 jpeg": (rgb, {"format": "JPEG", "subsampling": 0}),
        "rgb jpeg": (rgb, {"format": "JPEG", "keep_rgb": True}),
        "gif": (rgb, {"format": "GIF"}),
        "bmp": (rgb, {"format": "BMP"}),
        "tiff": (rgb, {"format": "TIFF"}),
        "float tiff": (rgb.convert("F"), {"format": "TIFF"}),
        "webp": (colour, {"format": "WEBP", "lossless": True}),
    }


MODES = _modes()


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", MODES)
def test_any_mode_comes_out_as_pillow_converts_it(name):
    image, options = MODES[name]
    data = encoded(image, **options)
    with Image.open(io.BytesIO(data)) as opened:
        if opened.mode == "P":
            opened.info.pop("transparency", None)  # its warning is what decode_pil silences
        expected = pil_to_tensor(opened.convert("RGB"))
    assert torch.equal(decode_tensor(data), expected)
    assert torch.equal(pil_to_tensor(decode_pil(data)), expected)


def test_exif_orientation_is_left_alone_as_in_timm():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.open(PHOTOS[0]), format="JPEG", exif=exif)
    assert torch.equal(decode_tensor(data), pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB")))


def test_random_damage_is_treated_alike():
    data = PHOTOS[0].read_bytes()
    rng = random.Random(0)
    outcomes = []
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        damaged = damaged[: rng.choice([len(data), rng.randrange(len(data))])]
        results = []
        for decode in (decode_tensor, lambda d: pil_to_tensor(decode_pil(d))):
            try:
                results.append(decode(bytes(damaged)))
            except ValueError as error:
                results.append(type(error))
        first, second = results
        assert first is second if isinstance(first, type) else torch.equal(first, second)
        outcomes.append(isinstance(first, type))
    assert any(outcomes)
    assert not all(outcomes)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"is_training": True, "auto_augment": "rand-m9"}, "RandAugment"),
        ({"is_training": True, "grayscale_prob": 0.5}, "RandomGrayscale"),
        ({"is_training": True, "train_crop_mode": "rkrc"}, "ResizeKeepRatio, CenterCropOrPad"),
        ({"interpolation": "lanczos"}, "Resize"),
    ],
)
def test_what_tensors_cannot_do_goes_to_pillow(options, why, caplog):
    transform = create_transform((3, 32, 32), use_prefetcher=True, **options)
    caplog.set_level("INFO")
    decode, chosen = choose_decoder("auto", transform, "RGB")
    assert chosen is transform
    assert isinstance(decode(PHOTOS[0].read_bytes()), Image.Image)
    assert f"no tensor form of {why}" in caplog.text
    with pytest.raises(UserError, match=why):
        choose_decoder("torch", transform, "RGB")


def test_unknown_decoders_and_modes():
    transform = create_transform((1, 32, 32), use_prefetcher=True)
    with pytest.raises(UserError, match="choose auto, torch or pil"):
        choose_decoder("fast", transform, "RGB")
    with pytest.raises(UserError, match="image mode 'L'"):
        choose_decoder("torch", transform, "L")
    decode, step = choose_decoder("auto", transform, "L")
    assert step(decode(PHOTOS[0].read_bytes())).shape == (1, 32, 32)
