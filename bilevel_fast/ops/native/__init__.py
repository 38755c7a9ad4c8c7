"""Calls of `bilevel_fast.ops.native._C`: argument checks, pointers, and a clear message when it is not built.

Code for CUDA is in `bilevel_fast.ops.native.cuda`, which this does not import.
"""

try:
    from bilevel_fast.ops.native import _C
except ImportError as error:
    raise ImportError("bilevel_fast.ops.native._C is not built; run: pip install -e .") from error

from bilevel_fast.ops.native.adamw_ema import AdamW, Trained
from bilevel_fast.ops.native.feature_kd import feature_kd
from bilevel_fast.ops.native.group_norm import GroupNorm
from bilevel_fast.ops.native.planner import Plan, plan
from bilevel_fast.ops.native.pointers import pointer

__all__ = ["_C", "AdamW", "GroupNorm", "Plan", "Trained", "feature_kd", "plan", "pointer"]
