"""What is a whole picture, where its views lie, and their pixels against torchvision's."""

import numpy as np
import pytest
import torch

from bilevel_fast.data.pictures import MAX_KEY, MAX_VIEWS, Framing, Unusable, upright_size
from coco_folder import SIDE, by_torchvision, encoded, picture, turned, upright

PICTURES = {
    "smaller.jpg": encoded(picture(1, 400, 301), quality=90),
    "larger.jpg": encoded(picture(2, 41, 53)),
    "grey.jpg": encoded(picture(3, 91, 67).convert("L")),
    "cmyk.jpg": encoded(picture(4, 80, 131).convert("CMYK")),
    "progressive.jpeg": encoded(picture(5, 99, 120), progressive=True),
    **{f"turned{i}.jpg": encoded(picture(5 + i, 130, 77), exif=turned(i)) for i in range(1, 9)},
    "turned.png": encoded(picture(20, 90, 140), "PNG", exif=turned(8)),
    "alpha.png": encoded(picture(21, 70, 90).convert("RGBA"), "PNG"),
    "palette.PNG": encoded(picture(22, 70, 90).convert("P"), "PNG"),
    "photo.webp": encoded(picture(23, 130, 90), "WEBP"),
    "old.bmp": encoded(picture(24, 130, 90), "BMP"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_size_is_that_of_the_upright_picture(name):
    width, height = upright(PICTURES[name]).size
    assert upright_size(PICTURES[name], name) == (height, width)


def test_pixels_are_those_of_torchvision():
    pytest.importorskip("nvidia.dali")
    from bilevel_fast.data.dali import Decoder

    framing, views = Framing(SIDE, seed=3), 3
    sizes = [upright_size(data, name) for name, data in PICTURES.items()]
    crops = [framing.cut([key] * views, range(views), [size] * views) for key, size in enumerate(sizes)]
    assert len({crop.mirrored for each in crops for crop in each}) == 2
    decode = Decoder(SIDE, views, len(PICTURES), "cpu", torch.device("cpu"), threads=1)
    pixels, reasons = decode(list(PICTURES.values()), crops)
    assert reasons == [None] * len(PICTURES)
    assert [(x.shape, x.dtype) for x in pixels] == [((len(PICTURES), 3, SIDE, SIDE), torch.float32)] * views
    for (name, data), mine, each in zip(PICTURES.items(), torch.stack(pixels, dim=1), crops, strict=True):
        for view, crop in zip(mine, each, strict=True):
            error = (255 * (view + 1) / 2 - by_torchvision(data, crop)).abs()
            assert error.mean() < 0.5, (name, crop)  # the issue asks for 2; both round to whole numbers
            assert error.max() <= 3, (name, crop)


def test_one_damaged_picture_costs_no_other_its_place():
    pytest.importorskip("nvidia.dali")
    from bilevel_fast.data.dali import UNDECODABLE, Decoder

    names = ["smaller.jpg", "larger.jpg", "grey.jpg"]
    files = [PICTURES[name] for name in names]
    framing = Framing(SIDE, seed=0)
    crops = [framing.cut([0], [0], [upright_size(data, name)]) for name, data in zip(names, files, strict=True)]
    decode = Decoder(SIDE, 1, 3, "cpu", torch.device("cpu"), threads=1)
    (whole,), _ = decode(files, crops)
    kept = whole.clone()
    decode(files[::-1], crops[::-1])
    assert torch.equal(whole, kept), "what was given out is not written over"
    cut = files[1][: len(files[1]) // 2]
    (pixels,), reasons = decode([files[0], cut, files[2]], crops)
    assert reasons == [None, UNDECODABLE, None]
    assert torch.equal(pixels[[0, 2]], whole[[0, 2]])
    (again,), _ = decode(files[::-1], crops[::-1])
    assert torch.equal(again, kept.flip(0)), "the next batch is as if nothing had happened"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jpg", b"", "empty"),
        ("a.jpg", b"<html>", "not an image"),
        ("a.jpg", PICTURES["alpha.png"], "is PNG, its name says JPEG"),
        ("a.png", PICTURES["grey.jpg"], "is JPEG, its name says PNG"),
        ("a.tiff", PICTURES["grey.jpg"], "its name does not end in"),
        ("a.jpg", PICTURES["grey.jpg"][:-2], "the end of the JPEG is missing"),
        ("a.jpg", PICTURES["grey.jpg"][:300], "damaged|the end of the JPEG is missing"),
        ("a.png", PICTURES["alpha.png"][:-12], "the end of the PNG is missing"),
        ("a.webp", PICTURES["photo.webp"][:-4], "damaged|the end of the WEBP is missing"),
        ("a.bmp", PICTURES["old.bmp"][:-4], "the end of the BMP is missing"),
    ],
)
def test_what_is_no_whole_picture(name, data, reason):
    with pytest.raises(Unusable, match=reason):
        upright_size(data, name)


def test_a_thumbnail_is_not_the_end_of_a_jpeg():
    exif = turned(1)
    thumbnail = encoded(picture(0, 32, 32))
    whole = encoded(picture(1, 90, 90), exif=exif.tobytes() + thumbnail)
    assert whole.index(b"\xff\xd9") < len(whole) - 2, "there is a thumbnail with an end of its own"
    assert upright_size(whole, "a.jpg") == (90, 90)
    with pytest.raises(Unusable, match="the end of the JPEG is missing"):
        upright_size(whole[:-2], "a.jpg")


def test_views_depend_on_seed_key_and_number_only():
    framing, size = Framing(SIDE, seed=1), (200, 301)
    alone = [framing.cut([key], [view], [size])[0] for key in (0, 7, MAX_KEY - 1) for view in (0, 5, MAX_VIEWS - 1)]
    keys, views = [0] * 3 + [7] * 3 + [MAX_KEY - 1] * 3, [0, 5, MAX_VIEWS - 1] * 3
    assert framing.cut(keys, views, [size] * 9) == alone
    assert len({(crop.left, crop.mirrored) for crop in alone}) > 6
    assert Framing(SIDE, seed=2).cut([7], [5], [size]) != [alone[4]]


def test_crops_reach_every_place_and_half_are_mirrored():
    framing = Framing(4, seed=0)
    crops = framing.cut(range(4000), [0] * 4000, [(8, 14)] * 4000)  # scaled to 4 x 7
    counts = np.bincount([crop.left for crop in crops])
    assert (crops[0].scaled, {crop.top for crop in crops}, len(counts)) == ((4, 7), {0}, 4)
    assert abs(counts - 1000).max() < 4 * np.sqrt(750)
    assert abs(sum(crop.mirrored for crop in crops) - 2000) < 4 * np.sqrt(1000)
    assert not any(crop.mirrored for crop in Framing(4, 0, flip=False).cut(range(99), [0] * 99, [(8, 14)] * 99))
    assert {crop.left for crop in Framing(4, 0, crop="center").cut(range(99), [0] * 99, [(8, 16)] * 99)} == {2}


def test_mirrored_and_placed_independently():
    crops = Framing(8, seed=5).cut(range(3000), [0] * 3000, [(16, 32)] * 3000)
    left, mirrored = np.array([[crop.left, crop.mirrored] for crop in crops], dtype=float).T
    assert abs(np.corrcoef(left, mirrored)[0, 1]) < 4 / np.sqrt(3000)


def test_size_numbers_say_where_the_view_lies_in_the_picture_as_it_is_seen():
    """A mirrored view is cut out of the mirrored picture: there its corner is."""
    seen = set()
    for key in range(8):
        (crop,) = Framing(SIDE, seed=2).cut([key], [0], [(SIDE + 20, 2 * SIDE)])
        height, width, top, left, *target = crop.sizes
        assert ((height, width), target) == ((SIDE + 20, 2 * SIDE), [SIDE, SIDE])
        scaled = np.arange(crop.scaled[0] * crop.scaled[1]).reshape(crop.scaled)
        view = scaled[crop.top :, crop.left :][:SIDE, :SIDE]
        if crop.mirrored:
            scaled, view = scaled[:, ::-1], view[:, ::-1]
        assert np.array_equal(scaled[top:, left:][:SIDE, :SIDE], view)
        seen.add((crop.mirrored, left != crop.left))
    assert seen == {(True, True), (False, False)}
