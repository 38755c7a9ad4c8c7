"""The door to `bilevel_fast._C`: argument checks, pointers, and a clear word when it is not built.

Code for CUDA is in `bilevel_fast.native.cuda`, which this does not import.
"""

try:
    from bilevel_fast import _C
except ImportError as error:
    raise ImportError("bilevel_fast._C is not built; run: pip install -e .") from error

from bilevel_fast.native.adamw_ema import AdamW, Trained
from bilevel_fast.native.feature_kd import feature_kd
from bilevel_fast.native.group_norm import GroupNorm
from bilevel_fast.native.planner import Plan, plan
from bilevel_fast.native.pointers import pointer

__all__ = ["_C", "AdamW", "GroupNorm", "Plan", "Trained", "feature_kd", "plan", "pointer"]
