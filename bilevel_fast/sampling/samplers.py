"""Sampling: PNDM (PLMS) and DDIM on the model's timestep grid, with classifier-free guidance.

Both walk the grid t_0 > t_1 > ..., s being the timestep after t, and move with the deterministic update

    x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps

where x_0 and eps are what a network output m says about x_t. For DDIM, m is the output at x_t. PNDM first
combines the last four *raw* outputs into m, as Adams-Bashforth does, and starts with an improved Euler step
that visits t_1 twice: hence steps + 1 network calls.

Shape legend: B batch, C H W latent, L text tokens, D text width. Arithmetic is fp32 and stays on the device.

Sources: DDIM, arXiv:2010.02502, eq. 12 at eta = 0; PNDM, arXiv:2202.09778, section 3, whose transfer step is
the update above; classifier-free guidance, arXiv:2207.12598, eq. 6.
"""

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.models.diffusion import Schedule, convert

Method = Literal["pndm", "ddim"]
Predict = Callable[[Tensor, Tensor], Tensor]
"""predict(x (B, C, H, W) fp32, t (B,) int64) -> network output (B, C, H, W)"""
Move = Callable[[Tensor, Tensor, int], Tensor]
"""move(x, m, t) -> x at the next timestep of the grid"""

# Adams-Bashforth weights of the newest output first, by the number of outputs known.
_MULTISTEP = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class Output(Protocol):
    """What a network returns."""

    @property
    def out(self) -> Tensor: ...


def timesteps(schedule: Schedule, steps: int) -> tuple[int, ...]:
    """The sampling grid of the schedule's spacing, descending, as diffusers' DDIM and PNDM have it.

        leading   multiples of T // steps, plus the steps_offset: 961, 921, ..., 1 for 25 steps of Stable Diffusion
        trailing  from the last timestep down: 999, 959, ..., 39
        linspace  from the last one to the first: 999, 957, ..., 0

    Raises:
        UserError: The schedule has no such grid. As many steps as timesteps only fit a steps_offset of 0.
    """
    count, spacing = schedule.num_train_timesteps, schedule.timestep_spacing
    if not 1 <= steps <= count:
        raise UserError(f"steps is {steps}; a schedule of {count} timesteps takes 1 to {count}")
    if spacing == "trailing":
        return tuple(round(count - k * (count / steps)) - 1 for k in range(steps))
    if spacing == "linspace":
        if steps < 2:
            raise UserError("steps is 1; the model's timestep_spacing 'linspace' takes 2 or more")
        return tuple(round(k * ((count - 1) / (steps - 1))) for k in reversed(range(steps)))
    stride, offset = count // steps, schedule.steps_offset
    grid = range(offset, offset + steps * stride, stride)
    if grid[-1] >= count:
        raise UserError(f"steps is {steps}; its grid would start at timestep {grid[-1]}, the last is {count - 1}")
    return tuple(reversed(grid))


def checked_grid(schedule: Schedule, steps: int, method: Method) -> tuple[int, ...]:
    """The grid that `sample` walks.

    Raises:
        UserError: The method does not exist, or has no such number of steps.
    """
    if method not in (known := get_args(Method)):
        raise UserError(f"sampling method {method!r} does not exist{nearest(method, known)}")
    grid = timesteps(schedule, steps)
    if method == "pndm" and steps < 2:
        raise UserError("steps is 1; pndm is a multistep method and takes 2 or more")
    return grid


def check_walks(schedule: Schedule, walks: Mapping[str, tuple[int, Method]]) -> None:
    """Refuse numbers of sampling steps now that would be refused when an hour of training is over.

    Args:
        schedule: Of the model that will be sampled.
        walks: Steps and method by flag.

    Raises:
        UserError: Names the flag.
    """
    for flag, (steps, method) in walks.items():
        try:
            checked_grid(schedule, steps, method)
        except UserError as error:
            raise UserError(f"{flag}: {error}") from error


@torch.no_grad()
def sample(
    predict: Predict,
    x_T: Tensor,
    schedule: Schedule,
    steps: int = 25,
    method: Method = "pndm",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Integrate from noise to latents.

    Args:
        predict: Returns v or eps, whichever the schedule's prediction type says; see `guided`.
        x_T: (B, C, H, W) standard normal noise.
        schedule: Moved to the device of x_T if it lies elsewhere.
        steps: Length of the timestep grid.
        method: `pndm` calls predict steps + 1 times, `ddim` steps times.
        progress: Called after every network call with the calls done and the calls in all.

    Returns:
        (B, C, H, W) fp32 latents, scaled as the network sees them.

    Raises:
        UserError: The method does not exist, or has no such number of steps.
    """
    grid = checked_grid(schedule, steps, method)
    schedule = schedule.to(x_T.device)
    calls, end = 0, grid[-1] - schedule.num_train_timesteps // steps
    after = dict(zip(grid, (*grid[1:], end), strict=True))

    def ask(x: Tensor, t: int) -> Tensor:
        nonlocal calls
        out = predict(x, torch.full(x.shape[:1], t, device=x.device)).float()
        calls += 1
        if progress:
            progress(calls, steps + (method == "pndm"))
        return out

    def move(x: Tensor, m: Tensor, t: int) -> Tensor:
        return ddim_step(schedule, x, m, t, after[t])

    walk = _pndm if method == "pndm" else _ddim
    return walk(ask, move, x_T.float(), grid)


def ddim_step(schedule: Schedule, x: Tensor, m: Tensor, t: int, t_next: int) -> Tensor:
    """One deterministic update of x (B, C, H, W) from t to t_next by a network output m; below 0 lies the end."""
    abar = schedule.alphas_cumprod
    final = torch.ones_like(abar[0]) if schedule.set_alpha_to_one else abar[0]
    abar_next = abar[t_next] if t_next >= 0 else final
    now = torch.full(x.shape[:1], t, device=x.device)
    x0, eps = convert(schedule, m, x, now, "sample"), convert(schedule, m, x, now, "epsilon")
    return abar_next.sqrt() * x0 + (1.0 - abar_next).sqrt() * eps


def _ddim(ask: Callable[[Tensor, int], Tensor], move: Move, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    for t in grid:
        x = move(x, ask(x, t), t)
    return x


def _pndm(ask: Callable[[Tensor, int], Tensor], move: Move, x_T: Tensor, grid: tuple[int, ...]) -> Tensor:
    first = ask(x_T, grid[0])
    ahead = ask(move(x_T, first, grid[0]), grid[1])
    x = move(x_T, (first + ahead) / 2, grid[0])
    outputs = [first]  # `ahead` was evaluated off the final path and stays out of the history
    for t in grid[1:]:
        outputs = [ask(x, t), *outputs[:3]]
        m = torch.zeros_like(x)
        for weight, out in zip(_MULTISTEP[len(outputs)], outputs, strict=True):
            m += weight * out
        x = move(x, m, t)
    return x


def guided(model: Callable[[Tensor, Tensor, Tensor], Output], text: Tensor, uncond: Tensor, guidance: float) -> Predict:
    """A predictor with classifier-free guidance: v_u + guidance (v_c - v_u).

    One call of twice the batch, [unconditional, conditional]; with a guidance of 1 only the conditional half.

    Args:
        model: model(x (B, C, H, W), t (B,), text (B, L, D)) -> an object with `.out`, such as a UNet.
        text: (B, L, D) encoded prompts.
        uncond: (B, L, D), or (1, L, D) for all, the encoded empty (or negative) prompt.
        guidance: 1 follows the prompt as trained, 7.5 is the usual choice for Stable Diffusion.

    Raises:
        ValueError: uncond does not fit text.
    """
    if guidance == 1:
        return lambda x, t: model(x, t, text).out
    if uncond.shape[1:] != text.shape[1:] or uncond.shape[0] not in (1, text.shape[0]):
        raise ValueError(f"uncond {tuple(uncond.shape)} does not fit text {tuple(text.shape)}")
    both = torch.cat([uncond.expand_as(text), text])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        v_u, v_c = model(torch.cat([x, x]), torch.cat([t, t]), both).out.float().chunk(2)
        return v_u + guidance * (v_c - v_u)

    return predict
