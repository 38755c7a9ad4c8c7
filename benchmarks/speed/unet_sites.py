"""The latency of every distinct site of a UNet alone, at several kept widths: what a latency budget is planned with.

`benchmarks.speed.unet --sites --out sites.jsonl`, and `python -m bilevel_fast.prune METHOD --latency sites.jsonl`.
A row says which sites have that shape, so that a sum over sites can be formed.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import interleaved, interleaved_cuda, recorded
from benchmarks.structures import Model
from bilevel_fast.models.architecture import Site, UNetConfig, sites
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.providers import ops
from bilevel_fast.ops.randomness import Stream, normal

KEEPS = (1.0, 0.75, 0.5, 0.25)


def shapes(config: UNetConfig) -> list[list[Site]]:
    """The sites that differ in name only, together: 18 groups of the 38 sites of SD 2.1."""
    found: dict[Site, list[Site]] = {}
    for site in sites(config):
        found.setdefault(dataclasses.replace(site, name="", depth_bit=False), []).append(site)
    return list(found.values())


def call_of(module: nn.Module, site: Site, size: Model, batch: int, like: Tensor) -> Callable[[], Tensor]:
    """One site on the implementations that the table names, with inputs as in the UNet.

    Args:
        like: Has the dtype and device.
    """

    def tensor(stream: Stream, *shape: int) -> Tensor:
        if like.is_meta:
            return like.new_empty(batch, *shape)
        return normal(0, stream, torch.arange(batch), shape).to(like.device, like.dtype)

    config, pixels = size.config, -(-size.latent // site.stride)
    x = tensor(Stream.WORLD, site.in_channels - site.skip_channels, pixels, pixels)
    x = x.contiguous(memory_format=torch.channels_last)
    states = tensor(Stream.CAPTION, size.text, config.cross_attention_dim)
    if site.kind == "transformer_block":
        inputs: tuple[Any, ...] = (x.permute(0, 2, 3, 1).flatten(1, 2), states)
    elif site.kind == "transformer":
        inputs = (x, states) if site.widths else (x, states, lambda _, block, h, text: h)  # its blocks are sites
    else:
        skip = tensor(Stream.NOISE, site.skip_channels, pixels, pixels) if site.skip_channels else None
        skip = None if skip is None else skip.contiguous(memory_format=torch.channels_last)
        inputs = (x, skip, tensor(Stream.INITIAL, config.time_embed_dim))

    def call() -> Tensor:
        with torch.no_grad(), ops(None):
            return module(*inputs)

    return call


def site_rows(size: Model, batch: int, rounds: int, align: int, like: Tensor) -> Iterator[list[dict[str, Any]]]:
    """`ms` at each of `KEEPS`, timed together; one distinct site after the other. On CUDA from graphs."""
    cuda = like.is_cuda
    unets = {}
    for keep in KEEPS:
        torch.manual_seed(0)
        with like.device:
            unet = UNet(size.config, Structure.uniform(size.config, keep), align)
        unets[keep] = unet.to(like.dtype).eval().requires_grad_(False)
    for same in shapes(size.config):
        site = same[0]
        calls = {}
        for keep, unet in unets.items():
            call = call_of(unet.get_submodule(site.name), site, size, batch, like)
            calls[str(keep)] = recorded(lambda call=call: call, like.device)[0]
        pixels = -(-size.latent // site.stride)
        channels = f"{site.in_channels}->{site.out_channels}"
        rows = []
        for keep, timing in (interleaved_cuda if cuda else interleaved)(calls, rounds).items():
            structure = unets[float(keep)].structure
            kept = {width.name: structure.count(site, width) for width in site.widths}
            config = {
                "model": size.name, "sites": [s.name for s in same], "batch": batch, "latent": size.latent,
                "text": size.text, "keep": float(keep), "kept": kept, "align": align,
            }  # fmt: skip
            rows.append({
                "suite": "unet_sites", "case": f"{size.name} {site.kind} {channels} {pixels}x{pixels} b{batch} {keep}",
                "provider": "ours", "metric": "ms", "unit": "ms", "value": timing.p50 * 1e3, "p20": timing.p20 * 1e3,
                "p80": timing.p80 * 1e3, "config": config,
            })  # fmt: skip
        yield rows
