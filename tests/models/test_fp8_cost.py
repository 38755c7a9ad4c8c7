"""What a teacher in fp8 costs, which is why it is off."""

import torch

from benchmarks import ROOT
from bilevel_fast.models.fp8 import QUANTISE_BYTES, quantise
from bilevel_fast.profiling.cost import Counter


def test_quantising_moves_what_a_run_and_the_docs_say():
    """Besides the scales. With a fused kernel it is 3 or so: then both want another sentence."""
    rows = torch.zeros(64, 4096, dtype=torch.bfloat16, device="meta")
    with Counter() as counter:
        quantise(rows)
    moved = sum(cost.bytes for cost in counter.costs) / rows.numel()
    assert QUANTISE_BYTES <= moved < QUANTISE_BYTES + 0.1
    assert f"move {QUANTISE_BYTES} bytes an element" in (ROOT / "docs/performance.md").read_text().replace("\n", " ")
