"""What a run reads is known by its content: where it lies, and what it is called, does not matter."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, write_json
from bilevel_fast.runs.inputs import inputs
from bilevel_fast.training.run_folder import RunFolder
from mini_folder import make_mini_folder

pytestmark = pytest.mark.situation

UNET = "unet/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Deep:
    preserve: Path | None = None


@dataclass(frozen=True)
class Settings:
    out: Path
    teacher: Path | None
    concepts: tuple[Path, ...] = ()
    deep: Deep = Deep()
    steps: int = 3

    def to_dict(self) -> dict:
        return {
            "out": str(self.out), "teacher": str(self.teacher), "steps": self.steps,
            "concepts": [str(path) for path in self.concepts], "deep": {"preserve": str(self.deep.preserve)},
        }  # fmt: skip


@pytest.fixture
def place(tmp_path) -> Path:
    make_mini_folder(tmp_path / "teacher")
    for name in ("bank", "list"):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "bank" / "index.json", {"format": "bilevel_fast.cache", "shards": [{"sha256": "1"}]})
    write_json(tmp_path / "list" / "index.json", {"format": "bilevel_fast.images", "root": "/a", "sha256": "1"})
    (tmp_path / "keep.txt").write_text("a star\n")
    return tmp_path


def settings(place: Path, **others) -> Settings:
    return Settings(
        place / "run", place / "teacher", (place / "bank", place / "list"), Deep(place / "keep.txt"), **others
    )


def begin(asked: Settings, resume: bool) -> None:
    with RunFolder.open(asked.out, asked.to_dict(), resume=resume, volatile=("out",), inputs=inputs(asked, {})):
        pass


def test_another_name_is_the_same_input(place, monkeypatch):
    """Inputs given by a relative or absolute path, by a link, or after a move: the run goes on."""
    begin(settings(place), resume=False)
    monkeypatch.chdir(place.parent)
    begin(settings(Path(place.name)), resume=True)
    link = place.with_name("link")
    link.symlink_to(place)
    begin(settings(link), resume=True)
    index = read_json(place / "list" / "index.json")
    write_json(place / "list" / "index.json", index | {"root": "/b"})  # the pictures have moved
    begin(settings(place.rename(place.with_name("moved"))), resume=True)


def more(path: Path) -> None:
    weights = load_file(path)
    weights["conv_in.bias"] += 1
    save_file(weights, path, metadata={"format": "pt"})


CHANGES = {
    "teacher": ("teacher", lambda place: more(place / "teacher" / UNET)),
    "its scheduler": (
        "teacher",
        lambda place: write_json(place / "teacher/scheduler/scheduler_config.json", {"beta_start": 0.1}),
    ),
    "its words": ("teacher", lambda place: (place / "teacher/tokenizer/merges.txt").write_text("a b")),
    "bank": (
        "concepts",
        lambda place: write_json(place / "bank/index.json", {"format": "bilevel_fast.cache", "shards": []}),
    ),
    "prompts": ("deep.preserve", lambda place: (place / "keep.txt").write_text("a ring\n")),
}


@pytest.mark.parametrize(("key", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_another_content_is_another_input(place, key, change):
    """A teacher's weights, a bank or a file changed in place between two sessions: `--resume` is refused."""
    begin(settings(place), resume=False)
    before = (place / "run" / "inputs.json").read_bytes()
    change(place)
    with pytest.raises(UserError, match=rf"was begun with another {key}: its fingerprint was .* that of .* is "):
        begin(settings(place), resume=True)
    assert (place / "run" / "inputs.json").read_bytes() == before


def test_a_run_of_the_past(place):
    """A run folder of before inputs were recorded: it goes on by the names that it has, and has inputs from then on."""
    begin(settings(place), resume=False)
    (place / "run" / "inputs.json").unlink()
    shutil.copytree(place / "teacher", place / "copy")
    with pytest.raises(UserError, match="holds a run with other settings: teacher was"):
        begin(Settings(place / "run", place / "copy", (place / "bank", place / "list"), Deep(place / "keep.txt")), True)
    begin(settings(place), resume=True)
    begin(Settings(place / "run", place / "copy", (place / "bank", place / "list"), Deep(place / "keep.txt")), True)
    with pytest.raises(UserError, match="steps was 3, is 4"):
        begin(settings(place, steps=4), resume=True)
