"""The tensor path against timm's Pillow path: the same choices, nearly the same pixels."""

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision.transforms.functional import pil_to_tensor

from samon import rng
from samon.cli import make_shards
from samon.data import decode as decoding
from samon.data.corrupt import SampleError
from samon.data.decode import DECODERS, choose_decoder, decode_pil, decode_tensor
from samon.data.source_factory import open_source
from samon.errors import UserError
from samon.trainer.flag_rows import TRAIN as TRAIN_FLAGS

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


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [{}, {"crop_pct": 1.0}, {"crop_mode": "squash"}])
def test_evaluation_pixels_are_within_one_level(interpolation, crop):
    for photo in PHOTOS:
        pil, tensor = both_paths(photo.read_bytes(), (3, 160, 160), EVAL | {"interpolation": interpolation} | crop)
        assert pil.shape == tensor.shape == (3, 160, 160)
        difference = (pil - tensor).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.01


@pytest.mark.parametrize(
    ("options", "largest", "share", "mean"),
    [
        ({"interpolation": "bilinear"}, 1, 0, 0.25),
        # Bicubic overshoots; where that is cut off between the two passes, a few values differ by more.
        ({"interpolation": "bicubic"}, 12, 2e-3, 0.25),
        ({"interpolation": "random"}, 12, 2e-3, 0.25),
        ({"color_jitter": 0.4}, 255, 2e-2, 1.5),  # torchvision's jitter rounds otherwise on tensors
    ],
)
def test_training_makes_the_same_choices(options, largest, share, mean):
    for photo in PHOTOS:
        for seed in range(10):
            pil, tensor = both_paths(photo.read_bytes(), (3, 96, 96), TRAIN | options, seed)
            difference = (pil - tensor).abs()
            assert difference.max() <= largest
            assert (difference > (2 if "color_jitter" in options else 1)).float().mean() <= share
            assert difference.float().mean() < mean


EXIF = Image.Exif()
EXIF[0x0112] = 6  # rotated, which timm leaves alone


def _modes():
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (40, 30, 4), dtype=np.uint8), "RGBA")
    rgb = color.convert("RGB")
    palette = rgb.convert("P")
    palette.info["transparency"] = b"\x80" * 200
    return {
        "rgba png": (color, {"format": "PNG"}),
        "palette png": (palette, {"format": "PNG"}),
        "bilevel png": (rgb.convert("1"), {"format": "PNG"}),
        "gray png": (rgb.convert("L"), {"format": "PNG"}),
        "gray alpha png": (color.convert("LA"), {"format": "PNG"}),
        "gray jpeg": (rgb.convert("L"), {"format": "JPEG"}),
        "cmyk jpeg": (rgb.convert("CMYK"), {"format": "JPEG"}),
        "progressive jpeg": (rgb, {"format": "JPEG", "progressive": True}),
        "444 jpeg": (rgb, {"format": "JPEG", "subsampling": 0}),
        "rgb jpeg": (rgb, {"format": "JPEG", "keep_rgb": True}),
        "rotated jpeg": (rgb, {"format": "JPEG", "exif": EXIF}),
        "gif": (rgb, {"format": "GIF"}),
        "bmp": (rgb, {"format": "BMP"}),
        "tiff": (rgb, {"format": "TIFF"}),
        "float tiff": (rgb.convert("F"), {"format": "TIFF"}),
        "webp": (color, {"format": "WEBP", "lossless": True}),
    }


MODES = _modes()


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", MODES)
def test_any_mode_comes_out_as_pillow_converts_it(name):
    image, options = MODES[name]
    data = encoded(image, **options)
    with Image.open(io.BytesIO(data)) as opened:
        with_alpha = pil_to_tensor(opened.convert("RGBA"))
        opened.info.pop("transparency", None)  # its warning is what decode_pil silences
        expected = pil_to_tensor(opened.convert("RGB"))
    assert torch.equal(pil_to_tensor(decode_pil(data, "RGBA")), with_alpha)
    assert torch.equal(decode_tensor(data), expected)
    assert torch.equal(pil_to_tensor(decode_pil(data)), expected)


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


JPEG_KINDS = [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"restart_marker_blocks": 5}]
JPEG_KINDS += [{"exif": EXIF}, {"mode": "L"}]


def jpeg_of(photo, factor=1, mode="RGB", **options):
    image = Image.open(photo).convert(mode)
    return encoded(image.resize((image.width * factor, image.height * factor)), format="JPEG", **options)


partial = pytest.mark.skipif(not decoding.can_decode_regions(), reason="nvImageCodec is not installed")


@partial
@pytest.mark.parametrize("options", JPEG_KINDS, ids=lambda options: "-".join(options))
def test_a_region_has_the_pixels_of_the_whole(options):
    draw = random.Random(0)
    for photo in PHOTOS[:3]:
        data = jpeg_of(photo, 2, quality=90, **options)
        whole = decode_tensor(data)
        jpeg = decoding.parse_jpeg(data)
        assert jpeg.meta().shape == whole.shape
        for _ in range(40):
            top, left = draw.randrange(whole.shape[1] - 1), draw.randrange(whole.shape[2] - 1)
            height, width = draw.randint(1, whole.shape[1] - top), draw.randint(1, whole.shape[2] - left)
            part = jpeg.decode_region(top, left, height, width)
            assert torch.equal(part, whole[:, top : top + height, left : left + width])


@partial
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_decoding_the_crop_alone_changes_nothing(interpolation, caplog):
    caplog.set_level("INFO")
    transform = create_transform((3, 96, 96), **TRAIN | {"interpolation": interpolation})
    whole, only = choose_decoder("torch", transform, "RGB"), choose_decoder("auto", transform, "RGB")
    assert caplog.messages[-1].endswith("JPEGs only in the region of the crop")
    for data in [photo.read_bytes() for photo in PHOTOS] + [jpeg_of(PHOTOS[0], mode=mode) for mode in ("L", "CMYK")]:
        for seed in range(20):
            results = []
            for decode, step in (whole, only):
                rng.seed(seed)
                results.append((step(decode(data)), random.random(), torch.rand(())))
            assert torch.equal(results[0][0], results[1][0])
            assert results[0][1:] == results[1][1:]  # the generators stand where they would


@partial
def test_a_crop_of_a_truncated_file_is_right_or_refused(capfd):
    data = PHOTOS[0].read_bytes()
    jpeg = decoding.parse_jpeg(data[: len(data) // 2])
    height, width = jpeg.meta().shape[1:]
    assert torch.equal(jpeg.decode_region(0, 0, height // 8, width), decode_tensor(data)[:, : height // 8])
    assert jpeg.decode_region(0, 0, height, width) is None
    step = choose_decoder("auto", create_transform((3, 32, 32), scale=(1, 1), ratio=(1, 1), **TRAIN), "RGB")[1]
    with pytest.raises(SampleError, match="cannot be decoded"):
        step(jpeg)
    assert capfd.readouterr().err == ""  # neither about the file nor about libraries that the machine lacks


def test_the_decoders_are_those_of_the_flag(monkeypatch):
    flags = [flag for rows in TRAIN_FLAGS.values() for flag in rows]
    assert next(flag for flag in flags if flag.name == "decoder").choices == DECODERS
    monkeypatch.setattr(decoding, "can_decode_regions", lambda: False)
    transform = create_transform((3, 32, 32), **TRAIN)
    with pytest.raises(UserError, match=r"pip install 'samon-timm\[decode\]'"):
        choose_decoder("crop", transform, "RGB")
    assert choose_decoder("auto", transform, "RGB")[0] is decode_tensor


def test_unknown_decoders_and_modes():
    transform = create_transform((1, 32, 32), use_prefetcher=True)
    with pytest.raises(UserError, match="choose auto, torch, crop, pil"):
        choose_decoder("fast", transform, "RGB")
    with pytest.raises(UserError, match="image mode 'L'"):
        choose_decoder("torch", transform, "L")
    decode, step = choose_decoder("auto", transform, "L")
    assert step(decode(PHOTOS[0].read_bytes())).shape == (1, 32, 32)


@pytest.mark.parametrize(("kind", "ending"), [("AVIF", "avif"), ("JPEG2000", "jp2")])
def test_newer_formats_open_and_are_packed_under_names_that_reading_knows(tmp_path, kind, ending):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    (tmp_path / "in/a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "in/a/0.png", kind)
    assert decode_pil((tmp_path / "in/a/0.png").read_bytes()).size == (30, 20)
    make_shards.main(["--source", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--split", "train"])
    source = open_source("wds/x", str(tmp_path / "out"), "train")
    assert source.read([0])[0].image == (tmp_path / "in/a/0.png").read_bytes()
    with tarfile.open(tmp_path / "out/train-0000.tar") as tar:
        assert f"a/0.{ending}" in tar.getnames()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_gray_of_16_bits_keeps_its_range(kind):
    values = np.array([[0, 255, 256, 32768, 65535]] * 5, dtype=np.uint16)
    for mode in ("L", "RGB"):
        image = decode_pil(encoded(Image.fromarray(values), format=kind), mode)
        assert np.asarray(image).reshape(5, 5, -1)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(("values", "taken"), [([0, 255], True), ([0, 65535], False), ([0.0, 1.0], False)])
def test_values_of_32_bits_are_taken_only_where_white_is_known(values, taken):
    kind = np.int32 if values[1] > 1 else np.float32
    data = encoded(Image.fromarray(np.array([values] * 2, dtype=kind)), format="TIFF")
    if taken:
        assert np.asarray(decode_pil(data, "L"))[0].tolist() == values
    else:
        with pytest.raises(SampleError, match="of 32 bits; save it with 8 or 16 bits"):
            decode_pil(data)
