"""How many multiply-accumulates (MACs) a structure costs, in closed form, at any latent size.

A site costs a fixed part plus a constant for each kept unit of each of its width vectors; `site_costs` is
that table and `count` sums it up. All numbers are exact integers for one sample.

    products   convolutions, linear layers, q k^T and p v of attention: half of torch's FlopCounterMode
    true       products, plus one per output element of a convolution, output feature of a linear layer with
               bias, element of a LayerNorm and entry of an attention matrix, plus two per element of a
               GroupNorm; SiLU, GELU, interpolation and sums are free
    official   what the hook counter of APTP's authors says (arXiv:2406.12042), to compare with published
               numbers: `true`, except that cross-attention counts as T x T instead of T x L, and SiLU as two
               per element. Their UNet has a single SiLU module, and the total of all its calls is added once
               per parent: each ResNet, the time embedding and the output, 24 times for SD 2.1. Their ratios
               come from a sum over modules in which two of these remain, and which a pruned structure only leaves
               by what its gates save (`Macs.official_modules`): nothing of SiLU, but biases in proportion.

Dense SD 2.1, latents 64x64, 77 tokens: 402.784 GMAC true, 464.327 GMAC official, 865,910,724 parameters.

Legend: T image tokens (pixels of a site), L text tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import Site, UNetConfig, sites
from bilevel_fast.models.structure import Structure


@dataclass(frozen=True)
class ModuleMacs:
    """MACs and parameters of a module, for one sample."""

    products: int = 0
    other: int = 0
    """MACs of `true` that are not products."""
    params: int = 0
    silu: int = 0
    """Two per element that goes through SiLU: `official` only."""
    excess: int = 0
    """What cross-attention would cost more if it were T x T: `official` only."""

    @property
    def true(self) -> int:
        return self.products + self.other

    def __add__(self, that: "ModuleMacs") -> "ModuleMacs":
        return ModuleMacs(
            self.products + that.products,
            self.other + that.other,
            self.params + that.params,
            self.silu + that.silu,
            self.excess + that.excess,
        )

    def __mul__(self, n: int) -> "ModuleMacs":
        return ModuleMacs(n * self.products, n * self.other, n * self.params, n * self.silu, n * self.excess)


@dataclass(frozen=True)
class SiteMacs:
    """`fixed` is what a site costs while it stands; `units`, by width vector, what each kept unit adds."""

    fixed: ModuleMacs
    units: Mapping[str, ModuleMacs]

    def total(self, kept: Mapping[str, int]) -> ModuleMacs:
        """The whole site with `kept` units of each width vector."""
        return sum((self.units[width] * n for width, n in kept.items()), self.fixed)


@dataclass(frozen=True)
class MacsRow:
    """A site or an unprunable module, named as in the state dict. A dropped site is all zeros."""

    name: str
    true: int
    official: int
    """SiLUs have a row of their own, `conv_act`: diffusers' name of the module they share."""
    products: int
    params: int


@dataclass(frozen=True)
class Macs:
    """What a structure costs for one sample, and its rows, block by block."""

    rows: tuple[MacsRow, ...]
    true: int
    official: int
    official_modules: int
    """The sum over modules with which APTP forms its ratios."""
    products: int
    params: int
    ratio: float
    """`true`, divided by that of the dense UNet."""


def count(structure: Structure, latent: int, text: int) -> Macs:
    """Count what a structure costs at latents of `latent` x `latent` and `text` text tokens.

    Raises:
        UserError: `latent` or `text` is not positive.
    """
    config, members = structure.config, sites(structure.config)
    table = site_costs(config, latent, text)
    costs = fixed_costs(config, latent)
    for site in members:
        if site.name in structure.dropped:
            costs[site.name] = ModuleMacs()
        else:
            costs[site.name] = table[site.name].total({w.name: structure.count(site, w) for w in site.widths})

    names = ["conv_in", "time_embedding"]
    for block in config.blocks:
        names += [site.name for site in members if site.block == block]
        names += [name for name in (f"{block}.downsamplers.0", f"{block}.upsamplers.0") if name in costs]
    names += ["conv_norm_out", "conv_out"]
    assert sorted(names) == sorted(costs)

    rows = [
        MacsRow(n, costs[n].true, costs[n].true + costs[n].excess, costs[n].products, costs[n].params) for n in names
    ]
    silu = sum(c.silu for c in costs.values())
    parents = 2 + sum(site.kind == "resnet" and site.name not in structure.dropped for site in members)
    rows.append(MacsRow("conv_act", true=0, official=parents * silu, products=0, params=0))
    true, official = sum(r.true for r in rows), sum(r.official for r in rows)
    return Macs(
        rows=tuple(rows),
        true=true,
        official=official,
        official_modules=dense_modules(config, latent, text) - gated_savings(structure, latent, text),
        products=sum(r.products for r in rows),
        params=sum(r.params for r in rows),
        ratio=true / dense_true(config, latent, text),
    )


def dense_modules(config: UNetConfig, latent: int, text: int) -> int:
    """The sum over modules with which APTP forms its ratios, of the dense UNet: `official`, SiLU counted twice."""
    table = site_costs(config, latent, text)
    whole = [table[site.name].total({w.name: w.units for w in site.widths}) for site in sites(config)]
    costs = sum(fixed_costs(config, latent).values(), sum(whole, ModuleMacs()))
    return costs.true + costs.excess + 2 * costs.silu


def gated_savings(structure: Structure, latent: int, text: int) -> int:
    """What APTP says that a structure's gates save: of each width vector its share of the modules that it narrows, with
    their biases and without SiLU; of a dropped site all but SiLU."""
    table, saved = site_costs(structure.config, latent, text), 0
    for site in sites(structure.config):
        cost = table[site.name]
        if site.name in structure.dropped:
            whole = cost.total({w.name: w.units for w in site.widths})
            saved += whole.true + whole.excess
            continue
        # the bias of the convolution, or of the linear layer, that ends what a width vector narrows
        bias = site.out_channels * (_pixels(latent, site.stride) if site.kind == "resnet" else 1)
        for width in site.widths:
            unit, gone = cost.units[width.name], width.units - structure.count(site, width)
            saved += gone * (unit.true + unit.excess + bias // width.units)
    return saved


def dense_true(config: UNetConfig, latent: int, text: int) -> int:
    """MACs of the dense UNet, counted as `true`."""
    table = site_costs(config, latent, text)
    dense = sum(table[site.name].total({w.name: w.units for w in site.widths}).true for site in sites(config))
    return dense + sum(cost.true for cost in fixed_costs(config, latent).values())


def site_costs(config: UNetConfig, latent: int, text: int) -> dict[str, SiteMacs]:
    """What each site costs, by name.

    Raises:
        UserError: `latent` or `text` is not positive.
    """
    if text < 1:
        raise UserError(f"text length is {text}, wanted at least 1 token")
    return {
        site.name: _resnet(site, _pixels(latent, site.stride), config)
        if site.kind == "resnet"
        else _transformer(site, _pixels(latent, site.stride), text, config)
        for site in sites(config)
    }


def fixed_costs(config: UNetConfig, latent: int) -> dict[str, ModuleMacs]:
    """What the modules outside the sites cost, by name."""
    channels, time, full = config.block_out_channels, config.time_embed_dim, _pixels(latent, 1)
    costs = {
        "conv_in": _conv(config.in_channels, channels[0], full),
        "time_embedding": _linear(channels[0], time) + _linear(time, time) + _silu(time),
        "conv_norm_out": _group_norm(channels[0], full) + _silu(channels[0] * full),
        "conv_out": _conv(channels[0], config.out_channels, full),
    }
    last = len(channels) - 1
    for i in range(last):
        down, up = channels[i], channels[last - i]
        costs[f"down_blocks.{i}.downsamplers.0"] = _conv(down, down, _pixels(latent, 2 ** (i + 1)))
        # the convolution follows the enlargement, and so works at the size of the next block
        costs[f"up_blocks.{i}.upsamplers.0"] = _conv(up, up, _pixels(latent, 2 ** (last - i - 1)))
    return costs


def _resnet(site: Site, pixels: int, config: UNetConfig) -> SiteMacs:
    cin, cout, unit = site.in_channels, site.out_channels, site.widths[0].unit_size
    group = (
        _conv(cin, unit, pixels)
        + _linear(config.time_embed_dim, unit)
        + _group_norm(unit, pixels)
        + _silu(unit * pixels)
        + _conv(unit, cout, pixels, bias=False)
    )
    conv2_bias = ModuleMacs(other=cout * pixels, params=cout)
    fixed = _group_norm(cin, pixels) + _silu(cin * pixels) + _silu(config.time_embed_dim) + conv2_bias
    if cin != cout:
        fixed += _conv(cin, cout, pixels, kernel=1)
    return SiteMacs(fixed, {"groups": group})


def _transformer(site: Site, pixels: int, text: int, config: UNetConfig) -> SiteMacs:
    channels, (attn1, attn2, ff) = site.out_channels, site.widths
    project = _linear(channels, channels, pixels)
    if not config.use_linear_projection:
        project = _conv(channels, channels, pixels, kernel=1)
    layer_norm = ModuleMacs(other=channels * pixels, params=2 * channels)
    out_bias = ModuleMacs(other=channels, params=channels)  # of attn1, attn2 and ff
    return SiteMacs(
        _group_norm(channels, pixels) + project * 2 + layer_norm * 3 + out_bias * 3,
        {
            "attn1": _head(channels, channels, attn1.unit_size, pixels, pixels),
            "attn2": _head(channels, config.cross_attention_dim, attn2.unit_size, pixels, text),
            "ff": _linear(channels, 2 * ff.unit_size, pixels) + _linear(ff.unit_size, channels, pixels, bias=False),
        },
    )


def _head(channels: int, context: int, size: int, queries: int, keys: int) -> ModuleMacs:
    def core(keys: int) -> ModuleMacs:
        return ModuleMacs(2 * queries * keys * size, queries * keys)

    projections = (
        _linear(channels, size, queries, bias=False)
        + _linear(context, size, keys, bias=False) * 2
        + _linear(size, channels, queries, bias=False)
    )
    return projections + core(keys) + ModuleMacs(excess=core(queries).true - core(keys).true)


def _conv(cin: int, cout: int, pixels: int, kernel: int = 3, bias: bool = True) -> ModuleMacs:
    weights = kernel**2 * cin * cout
    return ModuleMacs(weights * pixels, cout * pixels * bias, weights + cout * bias)


def _linear(cin: int, cout: int, tokens: int = 1, bias: bool = True) -> ModuleMacs:
    return ModuleMacs(cin * cout * tokens, cout * bias, cin * cout + cout * bias)


def _group_norm(channels: int, pixels: int) -> ModuleMacs:
    return ModuleMacs(other=2 * channels * pixels, params=2 * channels)


def _silu(elements: int) -> ModuleMacs:
    return ModuleMacs(silu=2 * elements)


def _pixels(latent: int, stride: int) -> int:
    if latent < 1:
        raise UserError(f"latent size is {latent}, wanted at least 1")
    return (-(-latent // stride)) ** 2  # a stride-2 convolution with padding 1 rounds up
