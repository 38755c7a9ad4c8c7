"""Style descriptors from CSD's checkpoint, against the tower written out by hand."""

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from bilevel_fast.base.errors import UserError
from bilevel_fast.metrics.csd import StyleDescriptor, csd_scores
from bilevel_fast.metrics.images import Batching
from measuring import SIDE, csd_checkpoint, doodle, small_clip


@pytest.fixture
def files(tmp_path):
    for n in range(5):
        doodle(n, 40 + 10 * n).save(tmp_path / f"{n}.png")
    return [tmp_path / f"{n}.png" for n in range(5)]


def by_hand(state, pixels):
    """A ViT of CLIP in plain functions: pre-norm blocks, two heads of 64, QuickGELU, the class token, no projection."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.conv2d(pixels, state["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["class_embedding"].expand(len(x), 1, -1), x], 1) + state["positional_embedding"]
    x = norm(x, "ln_pre")
    for n in range(2):
        block = f"transformer.resblocks.{n}"
        y = norm(x, f"{block}.ln_1") @ state[f"{block}.attn.in_proj_weight"].T + state[f"{block}.attn.in_proj_bias"]
        q, k, v = (part.unflatten(2, (2, 64)).transpose(1, 2) for part in y.chunk(3, 2))
        y = ((q @ k.transpose(2, 3) / 8).softmax(3) @ v).transpose(1, 2).flatten(2)
        x = x + y @ state[f"{block}.attn.out_proj.weight"].T + state[f"{block}.attn.out_proj.bias"]
        y = norm(x, f"{block}.ln_2") @ state[f"{block}.mlp.c_fc.weight"].T + state[f"{block}.mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ state[f"{block}.mlp.c_proj.weight"].T + state[f"{block}.mlp.c_proj.bias"]
    return norm(x[:, 0], "ln_post")


@pytest.mark.parametrize("parallel", [True, False])
def test_descriptors_by_hand(tmp_path, files, parallel):
    path = csd_checkpoint(tmp_path / "checkpoint.pth", parallel=parallel)
    found = StyleDescriptor.load(path, batching=Batching(2)).images(files)
    state = {n: t for n, t in small_clip().visual.state_dict().items() if n != "proj"}
    transform = open_clip.image_transform(SIDE, is_train=False)
    pixels = torch.stack([transform(Image.open(file)) for file in files])
    torch.manual_seed(13)
    style, content = torch.randn(128, 64), torch.randn(128, 64)
    expected = F.normalize(by_hand(state, pixels) @ style, dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    other = F.normalize(by_hand(state, pixels) @ content, dim=1)
    assert (found - other).abs().max() > 0.1, "style and content agree here, and the test is blind"


def test_scores_are_cosines_of_pairs():
    a = F.normalize(torch.tensor([[3.0, 4], [1, 0]]), dim=1)
    b = F.normalize(torch.tensor([[4.0, 3], [0, -2]]), dim=1)
    assert csd_scores(a, b) == pytest.approx([96, 0], abs=1e-5)
    assert csd_scores(a, a) == pytest.approx([100, 100], abs=1e-4)


def test_other_checkpoints(tmp_path):
    torch.save(small_clip().state_dict(), tmp_path / "clip.pth")
    with pytest.raises(UserError, match="are no CSD checkpoint"):
        StyleDescriptor.load(tmp_path / "clip.pth")
    path = csd_checkpoint(tmp_path / "csd.pth", parallel=False)
    saved = torch.load(path, weights_only=False)["model_state_dict"]
    for change, message in (
        ({"last_layer_style": torch.zeros(64, 64)}, r"'last_layer_style' is \(64, 64\), its tower has width 128"),
        ({"backbone.ln_post.weight": torch.zeros(3)}, r"'ln_post.weight' is \(3,\) and not \(128,\)"),
        ({"backbone.proj": torch.zeros(128, 64)}, "1 too many, first 'proj'"),
        ({"backbone.conv1.weight": torch.zeros(100, 3, 8, 8)}, "make no ViT of CLIP's"),
    ):
        torch.save({"model_state_dict": saved | change}, tmp_path / "changed.pth")
        with pytest.raises(UserError, match=message):
            StyleDescriptor.load(tmp_path / "changed.pth")
