"""FID as clean-fid's `legacy_pytorch` defines it, on local Inception weights.

    image (H, W, 3) uint8 -> fp32 -> 299 x 299, bilinear, not antialiased -> clipped to [0, 255], not rounded
    -> x / 127.5 - 1 -> InceptionV3 of 2015, pool3: 2048 features -> Frechet distance of their Gaussians

The network is torch-fidelity's, which torchmetrics uses too; both feed it another resize and (x - 128) / 128, so their
FID of the same images is another number. Weights: pt_inception-2015-12-05-6726825d.pth, as pytorch-fid publishes it
and torch-fidelity under another name, or the same tensors as safetensors.

Statistics of COCO's val2017 in the tables of arXiv:2412.15341 are of images that were first resized to 512 x 512 by
PIL's bicubic filter, sides not kept in proportion: `size`.

Shape legend: N images, D = 2048 features.

Source: FID, arXiv:1706.08500; clean-fid, arXiv:2104.11222.
"""

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import clip, open_safetensors, sha256, write_atomic
from bilevel_fast.metrics.checkpoints import fit, read_checkpoint, tensors_of
from bilevel_fast.metrics.frechet import FrechetStatistics, Moments, frechet_distance, resampled_distances
from bilevel_fast.metrics.images import USUAL, Batching, Pictures, open_rgb
from bilevel_fast.metrics.interval import Estimate, normal

FEATURES = 2048
DEFINITION = "clean-fid legacy_pytorch: bilinear 299, not antialiased, x / 127.5 - 1, InceptionV3 2015 pool3"
_SIDE = 299
_LARGEST = 2 * 8 * FEATURES**2  # bytes of an array of statistics: twice the covariance
_LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)


class Inception:
    """Images to 2048 features. `load` makes one."""

    def __init__(self, network: Any, weights: str, batching: Batching):
        self.network, self.weights, self.batching = network.eval().requires_grad_(False), weights, batching
        self._known: dict[tuple[Path, int | None], FrechetStatistics] = {}

    @classmethod
    def load(cls, path: Path, *, device: str | torch.device = "cpu", batching: Batching = USUAL) -> "Inception":
        """Read weights.

        Raises:
            UserError: torch-fidelity is not installed, the file is missing or damaged, or of another architecture.
        """
        path = Path(path)
        network = architecture()
        fit(network, tensors_of(read_checkpoint(path)), path, "the InceptionV3 of FID (1008 classes)")
        return cls(network.to(device), sha256(path), batching)

    @torch.inference_mode()
    def features(self, files: Sequence[Path], size: int | None = None) -> Iterator[Tensor]:
        """(B, 2048) fp32 on the CPU, for each batch of files in order.

        Args:
            files: Pictures of any sizes.
            size: Resize them to size x size first: PIL, bicubic, rounded to 8 bits.

        Raises:
            UserError: A file is missing or no whole picture.
        """
        yield from self.batching.measured(
            files, lambda file: resized(file, size), lambda pixels: self(torch.stack(pixels)), "Inception"
        )

    def of_folder(self, folder: Path, size: int | None = None) -> FrechetStatistics:
        """Statistics of all pictures of a folder, computed once: rows of a table share their reference.

        Raises:
            UserError: The folder is missing or empty, or a file is no whole picture.
        """
        key = (folder.resolve(), size)
        if key not in self._known:
            self._known[key] = statistics(list(Pictures.open(folder).files.values()), self, size)
        return self._known[key]

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, 299, 299) fp32 in [0, 255] -> (B, 2048) fp32 where the network is."""
        x = pixels.to(next(self.network.parameters()).device) / 127.5 - 1
        for name in _LAYERS:
            x = getattr(self.network, name)(x)
        return x.flatten(1)


def architecture() -> Any:
    """torch-fidelity's InceptionV3 with weights that mean nothing yet."""
    module = require("torch_fidelity.feature_extractor_inceptionv3", "metrics")

    class Blank(module.FeatureExtractorInceptionV3):
        loaded = False

        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            if self.loaded:
                return super().load_state_dict(state_dict, strict, assign)
            self.loaded = True  # the constructor's own, which would download weights or unpickle them
            return None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return Blank("inception", [str(FEATURES)], feature_extractor_weights_path=nothing)


def resized(file: Path, size: int | None = None) -> Tensor:
    """A picture as clean-fid's `legacy_pytorch` sees it: (3, 299, 299) fp32 in [0, 255].

    Raises:
        UserError: As `open_rgb`.
    """
    from PIL import Image

    image = open_rgb(file)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    return F.interpolate(pixels, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)[0].clamp(0, 255)


def statistics(files: Sequence[Path], inception: Inception, size: int | None = None) -> FrechetStatistics:
    """Mean and covariance of the features of pictures.

    Raises:
        UserError: There are none, or a file is missing or no whole picture.
    """
    return FrechetStatistics.accumulate(inception.features(files, size))


def save_statistics(path: Path, found: FrechetStatistics, inception: Inception) -> None:
    """Write statistics: `.safetensors`, ours, or `.npz` with `mu` and `sigma`, as clean-fid reads them.

    Raises:
        UserError: The suffix is another.
    """
    if path.suffix == ".safetensors":
        found.save(path, {"definition": DEFINITION, "weights": inception.weights})
    elif path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, mu=found.mean.numpy(), sigma=found.covariance.numpy())
        write_atomic(path, buffer.getvalue())
    else:
        raise UserError(f"statistics {path}: wanted a name that ends in .npz or .safetensors")


def load_statistics(path: Path, inception: Inception) -> FrechetStatistics | Moments:
    """Read statistics that `save_statistics` or clean-fid wrote.

    Raises:
        UserError: The file is missing, damaged, of another layout or number of features, or was made with other
            Inception weights than these (only our files say so).
    """
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
        made = (metadata.get("definition"), metadata.get("weights"))
        if made != (DEFINITION, inception.weights):
            raise UserError(f"statistics {path} were made with other Inception weights or another definition: {made}")
        found = FrechetStatistics.load(path)
    elif path.suffix == ".npz":
        found = _read_npz(path)
    else:
        raise UserError(f"statistics {path}: wanted .npz or .safetensors")
    if len(found.mean) != FEATURES:
        raise UserError(f"statistics {path} have {len(found.mean)} features; wanted {FEATURES}")
    return found


def fid(
    files: Sequence[Path], reference: FrechetStatistics | Moments, inception: Inception, *, draws: int, seed: int
) -> Estimate:
    """FID of pictures, with the standard error of `draws` bootstrap draws of them; the reference is held fixed.

    A resample repeats images, which narrows its covariance, so that all draws lie too high alike. Their spread is
    right: the interval is centred on the value. A draw of 5,000 images takes seconds on a CPU.

    Args:
        draws: 2 or more, or 0 for no interval.

    Raises:
        UserError: A file is missing or no whole picture, or there are fewer than two.
    """
    features = torch.cat(list(inception.features(files)))
    value = frechet_distance(FrechetStatistics.of(features), reference)
    if draws < 2:
        return Estimate(value, None, None, len(files), "none: no draws were asked for")
    rng, n = np.random.default_rng(seed), len(features)
    counts = (torch.from_numpy(np.bincount(rng.integers(0, n, n), minlength=n)) for _ in range(draws))
    return normal(value, np.array(list(resampled_distances(features, reference, counts))), n)


def _read_npz(path: Path) -> Moments:
    if not path.is_file():
        raise UserError(f"statistics {path} do not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            large = [each.filename for each in archive.infolist() if each.file_size > _LARGEST]
        if large:
            raise UserError(f"statistics {path}: {clip(large[0])} is larger than {_LARGEST} bytes")
        with np.load(path, allow_pickle=False) as held:
            if not {"mu", "sigma"} <= set(held):
                raise UserError(f"statistics {path} lack 'mu' or 'sigma': wanted clean-fid's layout")
            mean, covariance = (np.asarray(held[name]) for name in ("mu", "sigma"))
    except UserError:
        raise
    except Exception as error:  # a damaged file makes zipfile, zlib and numpy raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise UserError(f"statistics {path} are cut short or no .npz of numbers: {error}") from error
    if mean.ndim != 1 or covariance.shape != mean.shape * 2 or mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise UserError(f"statistics {path}: 'mu' {mean.shape} and 'sigma' {covariance.shape} do not fit")
    return Moments(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double())
