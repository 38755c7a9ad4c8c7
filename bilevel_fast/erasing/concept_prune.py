"""ConceptPrune (arXiv:2405.19237): zero the weights of the feed-forward layers that work for a concept more than not.

    n_j   = sqrt(sum over rows of A_ij^2 / |A_i|^2)   of a layer's hidden activations A (rows, F), for one timestep
    S_ij  = |W_ij| n_j                                W (C, F) the layer's second matrix
    mask  = for each i the floor(ratio F) largest of S_concept, where S_concept > S_base

Rows are the tokens of all images while they are sampled with classifier-free guidance, with and without the prompt;
once for prompts with the concept, once for the same without it, from the same noise. A weight is zeroed if it is masked
at more than `select` of the timesteps, by default at any, and if it is so for any of several concepts.

What is kept of the activations is one row of F sums for each layer and timestep, on the device of the UNet. No number
is read back while sampling. Layers go by name, so that a student may have dropped some.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.limits import LATENTS
from bilevel_fast.erasing.edit import Job, Outcome, Record, transformers
from bilevel_fast.erasing.pairs import Frame, Pair, framed
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_fast.sampling.samplers import Predict, guided, sample

FIRST = 1 << 45
"""Sample index of the first image sampled here, far from those that are trained on or judged."""
_TRIED = 8  # prompts of each kind looked at for the table

_THINGS = (
    *("cat", "dog", "mouse", "bear", "car", "chair", "bag", "door", "rabbit", "ball"),
    *("bat", "horse", "bird", "flower", "bowl", "bottle", "wall", "building", "chicken", "duck"),
)
_PEOPLE = (
    *("man", "woman", "girl", "boy", "child", "couple", "guy", "doctor", "nurse", "teacher"),
    *("lawyer", "mother", "father", "kid", "professor", "student", "group of friends", "celebrity"),
)
FRAMES = {
    "things": tuple(Frame(f"a {thing} {{}}", f"a photo of a {thing} {{}}") for thing in _THINGS),
    "people": tuple(Frame.of(f"a photo of a {{}} {person}") for person in _PEOPLE),
}
"""The paper's subjects: `a cat in the style of X` against `a photo of a cat`, `a photo of a naked man` against the same
without the word."""

Norms = dict[str, Tensor]
"""For each layer, by the name of its second matrix: n_j^2, (timesteps, F) fp64."""


@dataclass(frozen=True)
class ConceptPrune:
    """Zero the feed-forward weights that a concept makes work."""

    ratio: float = 0.01
    """Share of each row's weights that may go, for each timestep."""
    select: float = 0.0
    """A weight goes if it was chosen at more than this share of the timesteps."""
    steps: int = 50
    """DDIM steps sampled; each is a timestep."""
    guidance: float | None = None
    """Classifier-free guidance scale. Default: 3 for the mini world, 7.5 otherwise."""
    size: int | None = None
    """Height and width of the latents. Default: what the model was made for."""
    batch: int = 8
    """Prompts sampled together."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise UserError(f"--ratio is {self.ratio}; wanted 0 < ratio <= 1")
        if not 0 <= self.select < 1:
            raise UserError(f"--select is {self.select}; wanted 0 <= select < 1")
        for name, value in (("batch", self.batch), ("steps", self.steps), ("size", self.size)):
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; wanted 1 or more")

    def edit(self, unet: UNet, job: Job) -> Outcome:
        """Change the weights of a UNet in place.

        Raises:
            UserError: The UNet has no feed-forward layer left, the ratio takes none of any, or the latents have a size
                that the UNet cannot halve often enough.
        """
        _, skipped = transformers(unet.structure)
        layers = second_matrices(unet)
        check_ratio(self.ratio, layers)
        folder = job.folder
        size = folder.config.sample_size if self.size is None else self.size
        stride = 2 ** (len(folder.config.block_out_channels) - 1)
        if size % stride or size > LATENTS:
            raise UserError(f"--size is {size}; wanted a multiple of the UNet's stride {stride}, {LATENTS} at most")
        frames = job.frames or FRAMES["things"]
        guidance = folder.family.guidance if self.guidance is None else self.guidance
        prompts = {pair: framed([pair], frames) for pair in job.pairs}
        masks = find_masks(
            unet, folder.schedule, folder.text_encoder, list(prompts.values()), ratio=self.ratio, select=self.select,
            seed=self.seed, size=size, guidance=guidance, steps=self.steps, batch=self.batch, progress=job.progress,
        )  # fmt: skip
        tried = [[getattr(row, side) for rows in prompts.values() for row in rows] for side in ("erase", "guide")]
        before = [self._answers(unet, job, some, size) for some in tried]
        table = {"ff.net.2": _apply(layers, masks)}
        after = [self._answers(unet, job, some, size) for some in tried]
        for column, old, new in zip(("erased moved", "guides moved"), before, after, strict=True):
            table["ff.net.2"][column] = ((new - old).norm() / old.norm()).item()
        resolved = {"guidance": guidance, "size": size}
        settings = {field.name: getattr(self, field.name) for field in fields(ConceptPrune)} | resolved
        record = Record("concept-prune", job.pairs, tuple(frames), (), settings, skipped)
        note = "erased, guides moved: the UNet's outputs at the noisiest timestep, for up to 8 prompts each"
        return Outcome(record, table, (note,))

    @torch.no_grad()
    def _answers(self, unet: UNet, job: Job, prompts: Sequence[str], size: int) -> Tensor:
        stride = -(-len(prompts) // _TRIED)
        some = list(prompts[::stride])
        device = unet.conv_in.weight.device
        shape = (unet.config.in_channels, size, size)
        x = normal(self.seed, Stream.INITIAL, range(FIRST, FIRST + len(some)), shape).to(device)
        t = torch.full((len(some),), job.folder.schedule.num_train_timesteps - 1, device=device)
        return unet(x, t, job.folder.text_encoder.encode(some).to(device)).out.double()


def second_matrices(unet: UNet) -> dict[str, nn.Parameter]:
    """The matrices (C, F) that come after the GEGLU, of the Transformers that are left, by parameter name."""
    names = [f"{site.name}.transformer_blocks.0.ff.net.2.weight" for site in transformers(unet.structure)[0]]
    return {name: unet.get_parameter(name) for name in names}


def check_ratio(ratio: float, layers: dict[str, nn.Parameter], flag: str = "--ratio") -> None:
    """Refuse a share that takes no weight of any row.

    Raises:
        UserError: It does.
    """
    widest = max(w.shape[1] for w in layers.values())
    if not int(ratio * widest):
        raise UserError(f"{flag} {ratio:g} of {widest} weights, the widest row here, is none; wanted more")


def find_masks(
    unet: UNet,
    schedule: Schedule,
    encoder: TextEncoder,
    concepts: Sequence[Sequence[Pair]],
    *,
    ratio: float,
    select: float,
    seed: int,
    size: int,
    guidance: float,
    steps: int,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Which weights of each second matrix go, (C, F) bool by parameter name: the union over concepts.

    Args:
        concepts: For each, prompts with it and, as their guides, the same prompts without.
        progress: Called with the prompts sampled and to sample; see `collect` for the rest.
    """
    layers = second_matrices(unet)
    done, total = 0, 2 * sum(map(len, concepts))

    def norms(texts: Sequence[str]) -> Norms:
        nonlocal done
        before = done

        def tell(count: int) -> None:
            if progress:
                progress(before + count, total)

        found = collect(
            unet, schedule, encoder, texts,
            seed=seed, size=size, guidance=guidance, steps=steps, batch=batch, progress=tell,
        )  # fmt: skip
        done += len(texts)
        return found

    masks = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in layers.items()}
    bases: dict[tuple[str, ...], Norms] = {}
    for rows in concepts:
        concept = norms([row.erase for row in rows])
        plain = tuple(row.guide for row in rows)
        if plain in bases:  # several concepts with the same guide share it
            done += len(plain)
        else:
            bases[plain] = norms(plain)
        for name, w in layers.items():
            masks[name] |= mask(w, concept[name], bases[plain][name], ratio, select)
    return masks


def collect(
    unet: UNet,
    schedule: Schedule,
    encoder: TextEncoder,
    prompts: Sequence[str],
    *,
    seed: int,
    size: int,
    guidance: float,
    steps: int,
    batch: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Norms:
    """Sample prompts with DDIM and sum up the hidden activations.

    Prompt i starts from the noise of sample `FIRST` + i, so that prompts with and without a concept can be compared.
    """
    weights = second_matrices(unet)
    device, shape = unet.conv_in.weight.device, (unet.config.in_channels, size, size)
    sums = {name: torch.zeros(steps, w.shape[1], dtype=torch.float64, device=device) for name, w in weights.items()}
    null = encoder.encode([""]).to(device)
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        text = encoder.encode(some).to(device)
        noise = normal(seed, Stream.INITIAL, range(FIRST + start, FIRST + start + len(some)), shape).to(device)
        with _listening(unet, sums) as turn:
            sample(_counting(guided(unet, text, null, guidance), turn), noise, schedule, steps, "ddim")
        if progress:
            progress(start + len(some))
    return sums


class _Turn:
    """Which of the sampler's steps is on."""

    step = -1


def _counting(predict: Predict, turn: _Turn) -> Predict:
    def counted(x: Tensor, t: Tensor) -> Tensor:
        turn.step += 1
        return predict(x, t)

    return counted


@contextmanager
def _listening(unet: UNet, sums: Norms) -> Iterator[_Turn]:
    """Within, what goes into each second matrix is added to the sums of the step that is on."""
    turn = _Turn()

    def listener(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].detach().float().flatten(0, -2).square()
            total[turn.step] += squares.sum(1).clamp(min=1e-24).reciprocal() @ squares

        return add

    hooks = [
        unet.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(listener(total))
        for name, total in sums.items()
    ]
    try:
        yield turn
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def mask(weight: Tensor, concept: Tensor, base: Tensor, ratio: float, select: float = 0.0) -> Tensor:
    """Which weights of one matrix go.

    Args:
        weight: (C, F).
        concept, base: (timesteps, F): n_j^2 of the prompts with the concept, and of those without.
        ratio: Share of a row chosen at a timestep.
        select: A weight goes if it is chosen at more than this share of the timesteps.

    Returns:
        (C, F) bool.
    """
    size = weight.abs().double()
    chosen = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
    for with_it, without in zip(concept.sqrt(), base.sqrt(), strict=True):
        scores, top = (size * with_it).topk(int(ratio * weight.shape[1]), dim=1)
        chosen.scatter_add_(1, top, (scores > (size * without).gather(1, top)).int())
    return chosen > select * len(concept)


@torch.no_grad()
def _apply(layers: dict[str, nn.Parameter], masks: dict[str, Tensor]) -> dict[str, float]:
    """Zero what is masked, and say how much of all weights that is: by their number, and by their norm."""
    gone = count = total = lost = 0.0
    for name, w in layers.items():
        squares = w.double().square()
        gone, count = gone + masks[name].sum().item(), count + w.numel()
        total, lost = total + squares.sum().item(), lost + squares[masks[name]].sum().item()
        w.masked_fill_(masks[name], 0.0)
    return {"matrices": len(layers), "zeroed": gone / count, "weights": (lost / total) ** 0.5}
