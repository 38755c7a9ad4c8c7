"""Every reader of files from outside, on damaged and hostile ones: what comes out is a UserError of one line.

No file outside the folder is opened, nothing is started, no code of a pickle runs, and no memory is made room for that
a header merely claims. `make fuzz` tries 10,000 files per reader.
"""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bilevel_fast.base.files import write_json
from bilevel_fast.base.tensors import read_tensors
from bilevel_fast.data.cache import INDEX, Cache, Index
from bilevel_fast.data.listing import coco, metadata_folder
from bilevel_fast.data.pictures import Unusable, upright_size
from bilevel_fast.data.stream import ImageIndex, read_list
from bilevel_fast.data.tars import Tars
from bilevel_fast.data.writer import CacheWriter
from bilevel_fast.erasing.pairs import read_pairs
from bilevel_fast.exporting.card import licence_of
from bilevel_fast.metrics.checkpoints import read_checkpoint, tensors_of
from bilevel_fast.metrics.fid import _read_npz
from bilevel_fast.metrics.frechet import FrechetStatistics
from bilevel_fast.metrics.images import open_rgb
from bilevel_fast.metrics.prompt_sets import read_prompt_set
from bilevel_fast.models.architecture import UNetConfig, sites
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.family import FAMILIES, MINI_INDEX, family_of
from bilevel_fast.models.kinds import refuse_file
from bilevel_fast.models.mini import MiniTextEncoder, PixelUnshuffleVAE
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.vector import layout
from bilevel_fast.models.weights import read_weights
from bilevel_fast.pruning.aptp.encoders import _check_modules
from bilevel_fast.pruning.aptp.experts import read_codebook
from bilevel_fast.pruning.latency import read_latencies
from bilevel_fast.runs import history
from bilevel_fast.runs.config import preset
from bilevel_fast.runs.export_facts import measured, read_run
from bilevel_fast.runs.page.record import read_samples
from bilevel_fast.runs.paper.run import read as read_measured
from bilevel_fast.sampling.image_folder import ImageFolder
from bilevel_fast.sampling.prompts import read_rows
from bilevel_fast.training import checkpoint
from bilevel_fast.training.stats import JsonLines
from coco_folder import encoded, picture
from fuzzing import fuzz
from mini_folder import TINY, make_mini_folder

pytestmark = pytest.mark.situation


def text(name: str, content: str):
    """What writes one text file."""

    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    return make


def mini(name: str):
    """What writes a mini model folder and mutates one file of it."""
    return lambda folder: make_mini_folder(folder / "model") / name


def tar(folder: Path) -> Path:
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as made:
        for name, data in (("猫.jpg", b"1"), ("猫.json", b'{"caption": ["a cat"]}'), ("b.jpg", b"2"), ("b.txt", b"b")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return folder / "a.tar"


def read_tar(path: Path) -> None:
    tars = Tars([path], "caption")
    tars.read(range(len(tars)))


def captions(folder: Path) -> Path:
    for part in ("annotations", "val2017"):
        (folder / part).mkdir()
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)]
    rows = [{"image_id": n, "id": n, "caption": f"a star {n}"} for n in (1, 2)]
    return text("annotations/captions_val2017.json", json.dumps({"images": images, "annotations": rows}))(folder)


def cache(name: str):
    def make(folder: Path) -> Path:
        writer = CacheWriter(folder, Index("images", (4, 2, 2), "vae", sizes=True), 2)
        for n in range(3):
            moments = torch.full((1, 8, 2, 2), float(n))
            writer.add(moments, [f"a star {n}", "b"], file=f"{n}.jpg", sizes=[[n, 9, 0, 1, 2, 2]])
        writer.finish()
        return folder / name

    return make


def read_cache(folder: Path) -> None:
    opened = Cache.open(folder)
    for n in range(len(opened)):
        opened.captions(n)


_IMAGES = {
    "format": "bilevel_fast.images", "version": 1, "root": "images", "latent_shape": [4, 8, 8], "vae": "v",
    "framing": {"resolution": 64, "seed": 0, "flip": True, "crop": "random"}, "backend": "auto", "samples": 2,
    "sha256": "0", "dropped": {"pairs": 0, "captions": 0, "sha256": ""},
}  # fmt: skip
_ROWS = [{"key": n, "file": f"a/{n}.jpg", "bytes": 9, "captions": ["a star"]} for n in (1, 2)]
_DRAWN = [{"id": str(n), "prompt": "a star", "seed": n, "file": f"{n}.png"} for n in (1, 2)]


def drawn(name: str):
    def make(folder: Path) -> Path:
        fields = {"format": "bilevel_fast.images", "version": 1, "model": "m", "recipe": {"seed": 0}, "runs": []}
        write_json(folder / "settings.json", fields)
        text("index.jsonl", lines(_DRAWN))(folder)
        for row in _DRAWN:
            (folder / row["file"]).touch()
        return folder / name

    return make


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def latencies() -> str:
    rows = []
    for site in sites(TINY):
        kept = {width.name: width.units for width in site.widths}
        config = {"sites": [site.name], "kept": kept, "batch": 1, "latent": 8, "text": 4, "align": 1}
        rows.append({"suite": "unet_sites", "value": 1.5, "config": config, "device": "none"})
    return lines(rows)


def erased(folder: Path) -> Path:
    (folder / "student").mkdir()
    for name in ("config.json", "summary.json"):
        (folder / name).write_text("{}")
    concepts = [{"name": "waves", "bank": "concepts", "weight": 1.0}, {"name": "b", "bank": "c", "weight": 2.0}]
    record = {"format": "bilevel_fast.concepts", "version": 1, "teacher": "t", "concepts": concepts}
    return text("concepts.json", json.dumps(record))(folder)


def trained(name: str):
    """A run as the card of an exported student reads it."""

    def make(folder: Path) -> Path:
        (folder / "student").mkdir()
        write_json(folder / "config.json", preset("smoke").to_dict())
        write_json(folder / "summary.json", {"quality": {"student": {"fid": 3.5}, "teacher": {"fid": 3}}})
        return folder / name

    return make


def samples(folder: Path) -> Path:
    found = [{"prompt": "a star", "files": ["a.png", "b.png"]}] * 2
    made = text("samples/index.json", json.dumps({"models": ["teacher", "student"], "samples": found}))(folder)
    for name in ("a.png", "b.png"):
        (made.parent / name).write_bytes(b"png")
    return made


def sentence_encoder(folder: Path) -> Path:
    write_json(text("1_Pooling/config.json", "")(folder), {"pooling_mode": "mean"})
    modules = [{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "1_Pooling"}]
    return text("modules.json", json.dumps(modules))(folder)


_XL = {part: ["", classes[0]] for part, classes in FAMILIES["stable-diffusion-xl"].components.items()}
READERS = {
    "structure": (text("s.json", json.dumps(Structure.uniform(TINY, 0.5).to_dict())), Structure.load),
    "unet config": (text("config.json", json.dumps(TINY.to_dict())), lambda p: UNetConfig.load(p.parent)),
    "scheduler": (
        text("scheduler/scheduler_config.json", json.dumps(Schedule.sd().to_dict())),
        lambda p: Schedule.load(p.parents[1]),
    ),
    "model index": (text("model_index.json", json.dumps(MINI_INDEX)), lambda p: family_of(p.parent)),
    "xl index": (text("model_index.json", json.dumps(_XL)), lambda p: family_of(p.parent)),
    "mini text config": (mini("text_encoder/config.json"), lambda p: MiniTextEncoder.load(p.parents[1])),
    "mini words": (mini("tokenizer/vocab.json"), lambda p: MiniTextEncoder.load(p.parents[1])),
    "mini vae": (mini("vae/config.json"), lambda p: PixelUnshuffleVAE.load(p.parent)),
    "coco listing": (captions, lambda p: coco(p.parents[1], "val2017")),
    "coco prompts": (captions, read_rows),
    "metadata": (
        text("metadata.jsonl", lines({"file_name": f"{n}.jpg", "text": ["a", "b"]} for n in (1, 2))),
        lambda p: metadata_folder(p.parent),
    ),
    "tar": (tar, read_tar),
    "prompts": (text("p.csv", 'id,prompt,evaluation_seed\n1,a star,3\n2,"a, b",4\n'), read_rows),
    "prompt lines": (text("p.txt", "a star\na ring\n"), read_rows),
    "prompt set": (text("p.csv", "case_number,prompt,evaluation_seed,artist\n1,a,3,x\n2,b,4,y\n"), read_prompt_set),
    "pairs": (text("p.csv", "erase,guide,weight\nwaves,,2\nring,star,1\n"), read_pairs),
    "cache index": (cache(INDEX), lambda p: read_cache(p.parent)),
    "cache captions": (cache("shard-00000.jsonl"), lambda p: read_cache(p.parent)),
    "cache shard": (cache("shard-00001.safetensors"), lambda p: read_cache(p.parent)),
    "image index": (text("index.json", json.dumps(_IMAGES)), ImageIndex.load),
    "image list": (text("images.jsonl", lines(_ROWS)), read_list),
    "drawn settings": (drawn("settings.json"), lambda p: ImageFolder.open(p.parent)),
    "drawn index": (drawn("index.jsonl"), lambda p: ImageFolder.open(p.parent)),
    "history": (erased, lambda p: history.read(p.parent)),
    "samples": (samples, lambda p: read_samples(p.parents[1])),
    "latency rows": (text("rows.jsonl", latencies()), lambda p: read_latencies(p, TINY).settings),
    "measured rows": (
        text("rows.jsonl", lines([dict.fromkeys(("row", "label", "concepts", "seed", "step", "numbers"), 1)] * 2)),
        read_measured,
    ),
    "licence": (text("README.md", "---\nlicense: other\nlicense_name: x\n---\n# a\n"), lambda p: licence_of(p.parent)),
    "run of a student": (trained("config.json"), lambda p: measured(read_run(p.parent / "student"))),
    "numbers of a run": (trained("summary.json"), lambda p: measured(read_run(p.parent / "student"))),
    "modules": (sentence_encoder, lambda p: _check_modules(p.parent)),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_tables_and_json(name):
    """A config, an index, captions or a table is damaged, or made to mislead: read, or refused in one line."""
    fuzz(*READERS[name], refuses=name not in ("metadata", "licence"))  # bad lines are dropped, and said; no card


def tensors(folder: Path) -> Path:
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int8)}, folder / "w.safetensors")
    return folder / "w.safetensors"


def one_file(folder: Path) -> Path:
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 4, 1, 1)}, folder / "w.safetensors")
    return folder / "w.safetensors"


def shards(folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    return text("w.safetensors.index.json", json.dumps({"weight_map": {"a": "one.safetensors"}, "m": {}}))(folder)


def saved(value, name: str = "w.pt", **how):
    def make(folder: Path) -> Path:
        torch.save(value, folder / name, **how)
        return folder / name

    return make


def script(folder: Path) -> Path:
    torch.jit.trace(nn.Linear(3, 2).eval(), torch.ones(1, 3)).save(str(folder / "w.pt"))
    return folder / "w.pt"


def statistics(folder: Path) -> Path:
    np.savez(folder / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    return folder / "s.npz"


def own_statistics(folder: Path) -> Path:
    FrechetStatistics.of(torch.randn(6, 3)).save(folder / "s.safetensors")
    return folder / "s.safetensors"


_STATE = {"model_state_dict": {"module.a": torch.ones(3)}, "args": [1, (2.0, "x")], "step": 3}
WEIGHTS = {
    "safetensors": (tensors, read_tensors),
    "one file": (one_file, refuse_file),
    "shards": (shards, lambda p: read_weights(p.parent, "w")),
    "torch.save": (saved(_STATE), lambda p: tensors_of(read_checkpoint(p), "model_state_dict")),
    "torch.save of old": (
        saved(_STATE, _use_new_zipfile_serialization=False),
        lambda p: tensors_of(read_checkpoint(p), "model_state_dict"),
    ),
    "TorchScript": (script, read_checkpoint),
    "architecture vectors": (saved(torch.ones(2, layout(TINY).size)), lambda p: read_codebook(p, TINY)),
    "statistics": (statistics, _read_npz),
    "own statistics": (own_statistics, FrechetStatistics.load),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name):
    """A weight file or statistics are damaged, or lie about their sizes: read, or refused; nothing in them runs."""
    fuzz(*WEIGHTS[name])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_pictures(kind):
    """A picture is damaged: it is decoded, or refused by name."""

    def make(folder: Path) -> Path:
        (folder / f"a.{kind.lower()}").write_bytes(encoded(picture(1, 24, 17), kind))
        return folder / f"a.{kind.lower()}"

    fuzz(make, open_rgb)
    fuzz(make, lambda p: upright_size(p.read_bytes(), p.name), Unusable)


CHECKPOINT = ["model.safetensors", "optimizer.safetensors", "optimizer.json", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", CHECKPOINT)
def test_checkpoints(name):
    """A file of a checkpoint is damaged, and its manifest says that it should be so: read, or called damaged."""

    def make(folder: Path) -> Path:
        moments = {"lower": {"first": {"a": torch.ones(2)}, "steps": torch.tensor(3.0), "held": [1, (2, None)]}}
        return checkpoint.save(folder, 1, {"a": torch.arange(3.0)}, moments, {"step": 1, "images": 4}) / name

    def read(path: Path) -> None:
        manifest = path.with_name("manifest.json")
        if path != manifest:
            fields, data = json.loads(manifest.read_text()), path.read_bytes()
            fields["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            manifest.write_text(json.dumps(fields))
        checkpoint.latest(path.parents[1])

    fuzz(make, read)


def test_statistics_of_a_run():
    """The log of a run is damaged: lines that are whole and before the step that it goes on from stay."""
    rows = [{"step": n, "images": 4 * n, "lower/loss": 0.5} for n in range(4)]

    def read(path: Path) -> None:
        JsonLines(path, 2).close()
        assert all(json.loads(line)["step"] <= 2 for line in path.read_bytes().splitlines())

    fuzz(text("stats.jsonl", lines(rows)), read, refuses=False)
