"""Tables, pictures and the page."""

import json

import torch

from bilevel_fast.base.tables import table
from bilevel_fast.runs import page
from bilevel_fast.sampling.pictures import picture, to_pixels


def test_picture_shows_each_image_at_its_place():
    red, blue = torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), -1.0)
    red[0], blue[2] = 1.0, 1.0
    sheet = picture({"a": torch.stack([red, blue]), "b": torch.stack([blue, red])}, ["one", "two words"], zoom=8)
    tiles = [color for _, color in sheet.getcolors(1 << 20) if color in ((255, 0, 0), (0, 0, 255))]
    assert len(tiles) == 2
    pixels = torch.tensor(sheet.get_flattened_data()).reshape(sheet.height, sheet.width, 3)
    is_red = (pixels == torch.tensor([255, 0, 0])).all(-1)
    assert int(is_red.sum()) == 2 * 32 * 32
    ys, xs = is_red.nonzero(as_tuple=True)
    assert xs[ys.argmin()] < xs[ys.argmax()], "red: first row left, second row right"


def test_pixels_are_rounded_and_clamped():
    values = torch.tensor([-2.0, -1.0, -0.001, 0.999, 1.0, 3.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_pixels(values)[0, 0, :, 0].tolist() == [0, 0, 127, 255, 255, 255]


def test_table_is_aligned():
    text = table({"teacher": {"fid": 1.25, "object": 0.5}, "a/long/path/to/a/student": {"fid": 10, "object": 1}})
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["teacher", "1.250", "0.500"]


def test_page_is_self_contained_and_escapes(tmp_path):
    stats = tmp_path / "stats.jsonl"
    record = {"step": 1, "images": 16, "lower/diffusion": 0.5, "lower/output": 0.1, "lower/feature": None}
    stats.write_text(json.dumps(record) + "\n")
    drawn = page.curves({"student": stats})
    text = page.page("<run>", {"quality": {"student": {"fid": 2.0}}, "macs": {"ratio": 0.8}}, {"losses": drawn})
    assert "&lt;run&gt;" in text
    assert "<td>2.000</td>" in text
    assert "http" not in text.replace("<!doctype html>", "")
    assert text.count("data:image/png;base64,") == 1
