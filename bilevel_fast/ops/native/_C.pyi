"""Native parts (csrc/). Tensors are addresses of CPU memory that the caller has checked."""

from collections.abc import Sequence

from numpy.typing import ArrayLike

def instruction_sets() -> list[str]:
    """Those that arithmetic is compiled for and this CPU has, the best first; that one is used."""

def use_instruction_set(name: str) -> None:
    """Use another one, in the whole process. For tests."""

def philox_block(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 of four counter words under two key words."""

def philox_words(out: int, elements: int, seed: int, stream: int, indices: int, samples: int) -> None:
    """Fill out (samples, elements) uint32 with raw words; indices (samples,) int64."""

def philox_uniform(out: int, elements: int, seed: int, stream: int, indices: int, samples: int) -> None:
    """Fill out (samples, elements) fp32 with numbers in [0, 1)."""

def philox_normal(out: int, elements: int, seed: int, stream: int, indices: int, samples: int) -> None:
    """Fill out (samples, elements) fp32 with standard normals."""

def philox_integers(out: int, high: int, seed: int, stream: int, indices: int, samples: int) -> None:
    """Fill out (samples,) int64 with integers in [0, high)."""

def plan(
    costs: Sequence[ArrayLike], values: Sequence[ArrayLike], budget: int, lengths: Sequence[int]
) -> tuple[list[int], float, int, float]:
    """Multiple-choice knapsack: (option per group, total value, total cost, how much more another may be worth).

    lengths: of the lists of states, one try after the other, until one proves its plan.
    """

def group_norm_forward(
    out: int,
    mean: int,
    rstd: int,
    x: int,
    weight: int,
    bias: int,
    shape: tuple[int, int, int, int, int],
    eps: float,
    silu: bool,
    threads: int,
) -> None:
    """Fill out, shaped like x, and mean and rstd (samples, groups); weight and bias (channels,). All fp32.

    shape: (samples, pixels, channels, padding, groups), of x (samples, pixels, channels + padding) in memory order.
    """

def group_norm_backward(
    dx: int,
    dweight: int,
    dbias: int,
    dout: int,
    x: int,
    mean: int,
    rstd: int,
    weight: int,
    bias: int,
    shape: tuple[int, int, int, int, int],
    silu: bool,
    threads: int,
) -> None:
    """Fill dx, shaped like x, and dweight and dbias (channels,) from dout, shaped like out. All fp32."""

def feature_kd(
    losses: int,
    gradients: Sequence[int],
    students: Sequence[int],
    teachers: Sequence[int],
    counts: Sequence[int],
    coefficients: Sequence[float],
    threads: int,
) -> None:
    """Fill losses (K,) and K gradients from K pairs of counts[k] elements. All fp32."""

def adamw_ema(
    parameters: Sequence[int],
    gradients: Sequence[int],
    exp_avgs: Sequence[int],
    exp_avg_sqs: Sequence[int],
    emas: Sequence[int],
    copies: Sequence[int],
    counts: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float,
    ema_decay: float,
    number: int,
    threads: int,
) -> None:
    """Step number `number`, in place, of tensors of counts[i] elements. All fp32 but the copies, which are bf16.

    emas and copies may be empty.
    """
