"""A mixture on disk: one router and the experts it chooses from, each a model folder of its own.

    mixture.json            format, version, UNet config, K, prompt encoder, budget, teacher, settings of the training
    router.safetensors      predictor.linear.weight (V, D), predictor.linear.bias (V,), codes (K, V), balance (K,),
                            centre (D,)
    experts/0 ... K-1/      as `folder.save_student` writes them

Every part is written aside and renamed, and `mixture.json` comes last: a folder that has one is whole.

Legend: K experts, D width of the prompt embedding, V entries of the architecture vector, B prompts.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import open_safetensors, read_json, sha256, write_atomic, write_json
from bilevel_fast.base.tensors import read_tensors
from bilevel_fast.models.architecture import UNetConfig
from bilevel_fast.models.folder import ModelFolder, load_folder, save_student
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.vector import layout
from bilevel_fast.models.weights import check_names, fingerprint, same_component
from bilevel_fast.pruning.aptp.encoders import PromptEncoder, encode_all, open_encoder
from bilevel_fast.pruning.aptp.router import Router
from bilevel_fast.pruning.budget import MacBudget

FORMAT, VERSION = "bilevel_fast.mixture", 1
INDEX, ROUTER, EXPERTS = "mixture.json", "router.safetensors", "experts"

_CENTRE = "centre"


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture that was read; `Mixture.load` makes one."""

    path: Path
    config: UNetConfig
    """Of the dense UNet."""
    router: Router
    """On the CPU, without gradients."""
    encoder: PromptEncoder
    structures: tuple[Structure, ...]
    """K."""
    budget: MacBudget
    """That the experts were cut to."""
    teacher: Mapping[str, str]
    """Of the dense model: the `folder` that it lay in, and the fingerprint of its `unet`."""
    settings: Mapping[str, Any]
    """Of the training."""
    device: torch.device | str = "cpu"

    @classmethod
    def load(
        cls, path: Path | str, *, prompt_encoder: Path | None = None, device: torch.device | str = "cpu"
    ) -> "Mixture":
        """Read a mixture folder; of the experts only what they keep.

        Args:
            path: The folder.
            prompt_encoder: Where the sentence encoder is, if it is not where it was.
            device: Of the encoder of prompts.

        Raises:
            UserError: A file is missing, damaged, or of another mixture, or the prompt encoder is another one.
        """
        path = Path(path)
        fields = _read_index(path)
        file = path / INDEX
        try:
            config = UNetConfig.from_dict(fields["config"], f"{file}: config")
            count, described, digest = fields["experts"], fields["prompt_encoder"], fields["router_sha256"]
            budget = MacBudget(**fields["budget"])
            teacher = {name: str(fields["teacher"][name]) for name in ("folder", "unet")}
            settings = dict(fields["settings"])
        except KeyError as error:
            raise UserError(f"{file}: field {error} is missing") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{file}: a field is not what a mixture holds ({error})") from error
        if type(count) is not int or count < 1:
            raise UserError(f"{file}: experts is {count!r}, wanted a number of at least 1")
        router, centre = _read_router(path / ROUTER, config, count, teacher["unet"], digest)
        structures = tuple(_read_structure(path / EXPERTS / str(k), config, k) for k in range(count))
        own = described.get("kind") == "text" if isinstance(described, dict) else False
        source = load_folder(path / EXPERTS / "0", device) if own else None
        encoder = open_encoder(described, centre, source.text_encoder if source else None, prompt_encoder, device)
        if encoder.width != len(centre):
            raise UserError(f"{path}: the prompt encoder is {encoder.width} wide, the router reads {len(centre)}")
        mixture = cls(path, config, router, encoder, structures, budget, teacher, settings, device)
        if source is not None:
            mixture.__dict__["parts"] = source  # read already
        return mixture

    @cached_property
    def parts(self) -> ModelFolder:
        """Text encoder, VAE and schedule, which all experts share with the teacher; as the first expert has them."""
        return load_folder(self.expert_folder(0), self.device)

    def expert_folder(self, expert: int) -> Path:
        """The model folder of an expert, 0 ... K - 1.

        Raises:
            UserError: There is none of that number.
        """
        if not 0 <= expert < len(self.structures):
            raise UserError(f"{self.path} has experts 0 to {len(self.structures) - 1}, not {expert}")
        return self.path / EXPERTS / str(expert)

    def route(self, captions: Sequence[str]) -> Tensor:
        """The expert of each caption: (B,) int64 on the CPU. Other captions of the batch do not matter."""
        return self.router.route(encode_all(self.encoder, captions)) if captions else torch.zeros(0, dtype=torch.int64)

    def check_teacher(self, folder: ModelFolder) -> None:
        """Refuse a dense model that the experts were not cut from.

        Raises:
            UserError: It is pruned, or its UNet has another config or other weights.
        """
        if folder.structure is not None:
            raise UserError(f"{folder.path} is pruned; wanted the dense model of {self.path}")
        if folder.config != self.config:
            raise UserError(f"{folder.path} is another base model than that of {self.path}: the UNets' configs differ")
        came = fingerprint(folder.path / "unet")
        if not same_component(came, self.teacher["unet"]):
            wanted = self.teacher["unet"]
            raise UserError(
                f"{folder.path} is another base model than that of {self.path}: its UNet is {came}, not {wanted}"
            )


def write_mixture(
    path: Path,
    teacher: ModelFolder,
    unet: UNet,
    router: Router,
    encoder: PromptEncoder,
    structures: Sequence[Structure],
    budget: MacBudget,
    settings: Mapping[str, Any],
) -> None:
    """Write a mixture folder, or the parts of one into the run folder that is there. Again, after a kill, is no harm.

    Args:
        path: The folder; made if missing. No file of it but those of a mixture is touched.
        teacher: The dense model's folder.
        unet: Its UNet.
        router: Trained.
        encoder: That it was trained with.
        structures: K, what each expert keeps.
        budget: That they were cut to.
        settings: JSON values, kept as they are.

    Raises:
        UserError: The teacher is pruned, or there are not as many structures as codes, or a folder stands in the way.
    """
    if teacher.structure is not None:
        raise UserError(f"{teacher.path} is pruned; wanted the dense model that the router was trained on")
    if len(structures) != len(router.codes):
        raise UserError(f"{len(structures)} structures came for {len(router.codes)} codes")
    path.mkdir(parents=True, exist_ok=True)
    for k, structure in enumerate(structures):
        save_student(path / EXPERTS / str(k), teacher, unet.cut(structure), overwrite=True)
    base = fingerprint(teacher.path / "unet")
    tensors = {name: x.detach().cpu().contiguous() for name, x in router.state_dict().items()}
    # a single field: several come in any order, and the same router should be the same file
    data = save({**tensors, _CENTRE: encoder.centre.contiguous()}, metadata={"unet": base})
    write_atomic(path / ROUTER, data)
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "experts": len(structures),
        "budget": {"ratio": budget.ratio, "latent": budget.latent, "text": budget.text},
        "prompt_encoder": encoder.describe(),
        "teacher": {"folder": str(teacher.path.resolve()), "unet": base},
        "router_sha256": hashlib.sha256(data).hexdigest(),
        "config": teacher.config.to_dict(),
        "settings": dict(settings),
    }
    write_json(path / INDEX, fields)


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"mixture folder {path} does not exist")
    if not (path / INDEX).is_file():
        hint = "; its run is not finished, go on with --resume" if (path / "config.json").is_file() else ""
        raise UserError(f"{path} is not a mixture: {INDEX} is missing{hint}")
    fields = read_json(path / INDEX)
    if fields.get("format") != FORMAT:
        raise UserError(f"{path / INDEX} is not a mixture; wanted format {FORMAT!r}")
    if fields.get("version") != VERSION:
        raise UserError(f"{path / INDEX} has version {fields.get('version')!r}, this release reads {VERSION}")
    return fields


def _read_router(file: Path, config: UNetConfig, experts: int, base: str, digest: str) -> tuple[Router, Tensor]:
    """The router, and the centre of its prompts (D,)."""
    handle = open_safetensors(file)
    came = (handle.metadata() or {}).get("unet")
    if came != base:
        raise UserError(f"{file} is a router for another base model: its UNet is {came}, the mixture's {base}")
    tensors = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
    entries, centre = layout(config).size, tensors.get(_CENTRE, torch.empty(0))
    width = centre.numel()
    wanted = {
        "predictor.linear.weight": (entries, width),
        "predictor.linear.bias": (entries,),
        "codes": (experts, entries),
        "balance": (experts,),
        _CENTRE: (width,),
    }
    check_names(str(file), tensors, wanted)
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise UserError(f"{file}: {name} has shape {list(tensors[name].shape)}, this UNet wants {list(shape)}")
    if sha256(file) != digest:
        raise UserError(f"{file} was changed after it was written: its SHA-256 is not the one in {INDEX}")
    del tensors[_CENTRE]
    router = Router(config, width, experts, seed=0)  # its initial values and its noise are not needed any more
    router.load_state_dict(tensors)
    return router.requires_grad_(False), centre


def _read_structure(folder: Path, config: UNetConfig, expert: int) -> Structure:
    if not folder.is_dir():
        raise UserError(f"expert {expert} is missing: {folder} does not exist")
    structure = Structure.load(folder / "unet" / "structure.json")
    if structure.config != config:
        raise UserError(f"expert {expert} in {folder} was cut from another base model than the router's")
    return structure
