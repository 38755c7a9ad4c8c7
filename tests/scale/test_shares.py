"""Samples and pictures that ranks share: what all of them get is what one process makes, to the bit."""

import json

import pytest
import torch

from bilevel_fast.metrics.images import Batching
from bilevel_fast.models.folder import load_folder
from bilevel_fast.sampling.generate import generate
from bilevel_fast.scale import shares
from bilevel_fast.scale.shares import joined
from bilevel_fast.scale.team import ALONE
from bilevel_fast.worlds.mini.materials import WORLD
from measuring import doodle, image_folder
from mini_folder import make_mini_folder
from mutants import mutated
from ranked import Crew
from thread_team import together

WORLDS = (1, 2, 3, 5)


def numbers(team, sizes, dtype=torch.float32, joined=joined):
    """Portions that say who they are: row n of portion p is [10 p + n, rank]; what came without the rank, and who."""

    def portion(p):
        return torch.tensor([[10 * p + n, team.rank] for n in range(sizes[p])], dtype=dtype)

    return torch.cat(list(joined(team, sizes, map(portion, team.ranks.share(range(len(sizes))))))).tolist()


@pytest.mark.parametrize("sizes", [[3], [3, 3], [3, 3, 1], [2] * 7, [1, 4, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_all_ranks_have_all_portions_in_order(sizes, dtype):
    wanted = [10 * p + n for p, size in enumerate(sizes) for n in range(size)]
    for world in WORLDS:
        found = together(world, lambda team: numbers(team, sizes, dtype))
        assert all(rows == found[0] for rows in found)
        assert [row[0] for row in found[0]] == wanted
        assert [row[1] for row in found[0]] == [p % world for p, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize(
    ("old", "new"),
    [("range(0, len(sizes), team.world)", "range(0, team.world, team.world)"), ("rows[:size]", "rows")],
)
def test_a_bug_in_the_order_is_seen(old, new, tmp_path):
    broken = mutated(shares.__file__, old, new, tmp_path).joined
    found = together(2, lambda team: numbers(team, [3, 1, 2], joined=broken))
    assert found[0] != together(2, lambda team: numbers(team, [3, 1, 2]))[0]


def test_samples_are_drawn_by_all(tmp_path):
    """`generate`: 5 prompts in batches of 2."""
    folder, rows = load_folder(make_mini_folder(tmp_path)), dict[tuple[int, int], int]()

    def call(team):
        unet = folder.unet()
        unet.register_forward_hook(
            lambda module, inputs, out: rows.__setitem__(
                (team.world, team.rank), rows.get((team.world, team.rank), 0) + len(out.out)
            )
        )
        prompts = [scene.caption for scene in WORLD.scenes[:5]]
        return generate(
            unet, folder.schedule, folder.text_encoder, prompts, range(5), seed=3, size=(8, 8), guidance=2.0, steps=2,
            method="ddim", batch=2, team=team,
        )  # fmt: skip

    wanted = call(ALONE)
    for found in together(2, call):
        assert torch.equal(found, wanted)
    assert rows == {(1, 0): 20, (2, 0): 12, (2, 1): 8}


def test_pictures_are_read_by_all(tmp_path):
    files = [tmp_path / str(n) for n in range(7)]

    def call(team):
        read = []
        found = Batching(2, team).measured(
            files, lambda file: read.append(file) or int(file.name), lambda numbers: torch.tensor(numbers), "numbers"
        )
        return torch.cat(list(found)).tolist(), sorted(int(file.name) for file in read)

    assert together(2, call) == [(list(range(7)), [0, 1, 4, 5]), (list(range(7)), [2, 3, 6])]


def evaluate(tmp_path, world, *flags):
    """Exit codes, and what all ranks have said: JSON of the first where all is well."""
    log = tmp_path / f"{len(list(tmp_path.glob('*.log')))}.log"
    crew = Crew(world, "evaluate", *flags, "--json", log=log)
    return crew.wait(), log.read_text()


def refusals(said):
    """Without the lines of torch's C++, which loads in the tests' server before `together` can say what it logs."""
    return [line for line in said.splitlines() if line.startswith("error: ")]


def drawn(folder, count, first=0):
    """A folder of pictures 0, 1, ... of prompts p0, p1, ..."""
    names = [str(n) for n in range(count)]
    pictures = {name: doodle(first + int(name)) for name in names}
    return image_folder(folder, pictures, {name: f"p{name}" for name in names})


@pytest.mark.slow
def test_models_are_judged_by_ranks(tmp_path):
    """`evaluate` of the teacher by 1 and 3 processes: what they say is the same text, once."""
    flags = ["--mini.judge-erased", "30", "--mini.judge-kept", "10", "--mini.judge-steps", "2"]
    said = {world: evaluate(tmp_path, world, *flags) for world in (1, 3)}
    assert {world: codes for world, (codes, _) in said.items()} == {world: [0] * world for world in said}
    (found,) = json.loads(said[1][1]).values()
    assert found.keys() >= {"concept_hit", "fid"}
    assert said[3][1] == said[1][1]


@pytest.mark.slow
@pytest.mark.situation
def test_folders_are_measured_by_ranks(tmp_path):
    """`evaluate` by two ranks finds what one finds, and rank 0 writes it. A result that is there already, a picture
    of rank 1 that is cut short: one line with its name, and nothing is written."""
    prompts = tmp_path / "i2p.csv"
    prompts.write_text("prompt,case_number\n" + "".join(f"p{n},{n}\n" for n in range(12)))
    folder, out = drawn(tmp_path / "ours", 12), [tmp_path / f"{world}.json" for world in range(3)]
    flags = ["--suite", "nsfw", "--images", folder, "--prompts", prompts, "--out"]
    for world in (1, 2):
        codes, said = evaluate(tmp_path, world, *flags, out[world])
        assert codes == [0] * world, said
    for suffix in (".json", ".md"):
        assert out[1].with_suffix(suffix).read_text() == out[2].with_suffix(suffix).read_text()
    codes, said = evaluate(tmp_path, 2, *flags, out[1])
    assert codes == [2, 2]
    assert refusals(said) == [f"error: {out[1]} exists already; delete it or choose another name"]
    broken = folder / "9.png"
    broken.write_bytes(broken.read_bytes()[:100])
    codes, said = evaluate(tmp_path, 2, *flags, out[0])
    assert codes == [2, 2]
    (refusal,) = refusals(said)
    assert refusal.startswith(f"error: rank 1: {broken} is no whole picture")
    assert not out[0].exists()
