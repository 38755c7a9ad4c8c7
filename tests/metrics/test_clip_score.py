"""CLIP scores against open_clip by hand, from files in the formats of OpenAI and of open_clip."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from bilevel_fast.base.errors import UserError
from bilevel_fast.metrics.clip_score import ClipScorer, clip_scores
from bilevel_fast.metrics.cp_score import cp_scores
from bilevel_fast.metrics.images import Batching
from measuring import SIDE, doodle, openai_archive, small_clip

PROMPTS = ["a red star", "The Starry Night by Vincent van Gogh", "caf\u00e9 \u2603", "word " * 200, "a"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # as OpenAI published them


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return openai_archive(tmp_path_factory.mktemp("clip") / "ViT-tiny-8.pt", small_clip())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Wider than high, higher than wide, square and of the network's own size."""
    folder = tmp_path_factory.mktemp("pictures")
    sizes = [(80, 50), (50, 80), (64, 64), (SIDE, SIDE), (31, 200)]
    for n, size in enumerate(sizes):
        doodle(n).resize(size).save(folder / f"{n}.png")
    return [folder / f"{n}.png" for n in range(len(sizes))]


def by_hand(model, files, prompts):
    """Preprocessing and projections written out; one image at a time."""
    scores = []
    for file, prompt in zip(files, prompts, strict=True):
        image = Image.open(file)
        scale = SIDE / min(image.size)
        width, height = (max(SIDE, int(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
        image = image.crop((left, top, left + SIDE, top + SIDE))
        pixels = (torch.from_numpy(np.array(image)).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        with torch.no_grad():
            seen = model.encode_image(pixels.permute(2, 0, 1)[None])
            read = model.encode_text(open_clip.tokenize([prompt]))
        scores.append(100 * torch.cosine_similarity(seen, read).item())
    return scores


def test_an_archive_of_openai_against_open_clip_by_hand(archive, files):
    """Half precision in the file, fp32 in the sums; batches of two do not change a score."""
    model = small_clip().half().float()
    scorer = ClipScorer.load(archive, batching=Batching(2))
    scores = clip_scores(scorer.texts(PROMPTS), scorer.images(files))
    assert scores == pytest.approx(by_hand(model, files, PROMPTS), abs=2e-3)
    assert np.ptp(scores) > 5


def test_the_published_loader_gives_the_same_vectors(archive, files):
    theirs = open_clip.load_openai_model(str(archive), precision="fp32", device="cpu").eval()
    scorer = ClipScorer.load(archive)
    pixels = torch.stack([scorer.transform(Image.open(file)) for file in files])
    with torch.no_grad():
        torch.testing.assert_close(scorer.images(files), normalize(theirs.encode_image(pixels), dim=1))
        torch.testing.assert_close(
            scorer.texts(PROMPTS), normalize(theirs.encode_text(open_clip.tokenize(PROMPTS)), dim=1)
        )


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An architecture of a name, with plain GELU, as open_clip's own models have."""
    vision = {"image_size": SIDE, "layers": 2, "width": 128, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    (tmp_path / "ViT-Tiny-8.json").write_text(json.dumps({"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}))
    factory = open_clip.factory
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "ViT-Tiny-8.json")
    return "ViT-Tiny-8"


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_an_architecture_by_name(tmp_path, tiny, files, suffix):
    model = open_clip.create_model(tiny)
    model.load_state_dict(small_clip().state_dict())
    path = tmp_path / f"open_clip.{suffix}"
    if suffix == "pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, path)
    else:
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path)
    scorer = ClipScorer.load(path, tiny)
    scores = clip_scores(scorer.texts(PROMPTS), scorer.images(files))
    assert scores == pytest.approx(by_hand(model.eval(), files, PROMPTS), abs=2e-3)
    quick = by_hand(small_clip(), files, PROMPTS)
    assert np.abs(scores - quick).max() > 0.1, "GELU and QuickGELU agree here, and the test is blind"


def test_refusals(tmp_path, archive, tiny):
    with pytest.raises(UserError, match=r"no architecture 'ViT-B-23'; did you mean 'ViT-B-32'"):
        ClipScorer.load(archive, "ViT-B-23")
    torch.save(small_clip().state_dict(), tmp_path / "laion.pt")
    with pytest.raises(UserError, match="name their architecture with --clip-model"):
        ClipScorer.load(tmp_path / "laion.pt")
    with pytest.raises(UserError, match=r"are not of ViT-B-32: tensors: .* lack"):
        ClipScorer.load(tmp_path / "laion.pt", "ViT-B-32")
    with pytest.raises(UserError, match="takes its text tower from the network"):
        ClipScorer.load(archive, "roberta-ViT-B-32")
    state = small_clip().state_dict() | {"context_length": torch.tensor(77)}
    del state["visual.ln_post.weight"]
    torch.save(state, tmp_path / "half.pt")
    with pytest.raises(UserError, match=r"not of a CLIP of OpenAI's: .*visual.ln_post.weight") as refusal:
        ClipScorer.load(tmp_path / "half.pt")
    assert "\n" not in str(refusal.value)


def test_cp_score_is_strict_and_pairwise():
    """A tie keeps the artist; only the own reference counts."""
    texts = normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), dim=1)
    images = normalize(torch.tensor([[1.0, 1], [1, 0], [0, 1]]), dim=1)
    references = normalize(torch.tensor([[1.0, 0.5], [1, 0], [1, 0.5]]), dim=1)
    assert cp_scores(texts, images, references).tolist() == [100, 0, 0]
    assert cp_scores(texts, references, images).tolist() == [0, 0, 100]
    assert cp_scores(texts, images, images).tolist() == [0, 0, 0]
