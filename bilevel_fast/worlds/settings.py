"""Settings of the drawn worlds: how much is drawn, sampled and judged."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from bilevel_fast.base.errors import check_finite, in_range
from bilevel_fast.base.limits import MEMBERS


@dataclass(frozen=True)
class Drawn:
    """A built-in world: its data, its concept bank and how the result is judged."""

    NAME: ClassVar[str]

    images: int = 4096
    """Drawn training images; the erased styles are not among them."""
    bank: int = 48
    """Concept images sampled from the teacher, per erased style."""
    judge_erased: int = 36
    """Samples judged per erased style."""
    judge_kept: int = 36
    """Samples judged per style that should stay."""
    guidance: float = 3.0
    """Classifier-free guidance of all sampling."""
    bank_steps: int = 25
    """PNDM steps of the concept bank."""
    judge_steps: int = 12
    """DDIM steps of the judged samples."""

    def check(self) -> None:
        """Refuse values out of range, with a UserError."""
        check_finite(self, f"--{self.NAME}.")
        for name in ("images", "bank", "judge_erased", "judge_kept", "bank_steps", "judge_steps"):
            value, flag = getattr(self, name), f"--{self.NAME}.{name.replace('_', '-')}"
            in_range(flag, value, f">= 1 and <= {MEMBERS}", 1 <= value <= MEMBERS)

    def walks(self) -> dict[str, tuple[int, Literal["pndm", "ddim"]]]:
        """What is sampled, by flag: steps and method."""
        return {
            f"--{self.NAME}.bank-steps": (self.bank_steps, "pndm"),
            f"--{self.NAME}.judge-steps": (self.judge_steps, "ddim"),
        }
