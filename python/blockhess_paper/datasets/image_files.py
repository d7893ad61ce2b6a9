"""Labeled images from files of the user: one folder per class (ImageNet), binary CIFAR-10, idx files (MNIST).

Images are float32, normalized by the usual mean and standard deviation of the data set, or of the split for idx files.
Which images are drawn depends only on the names of the files and the seed.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Per channel, of pixels in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

SUFFIXES = (".jpeg", ".jpg", ".png")

# A record of CIFAR-10's binary version: the label, then red, green and blue of 32 x 32 pixels.
CIFAR10_RECORD = 1 + 3 * 32 * 32


class ImageFolder:
    """Images in one folder per class, read on demand.

    Every image is resized so that its shorter side is 8/7 of the requested side, and its center is cropped, as for
    testing on ImageNet.

    Args:
        folder: FOLDER/CLASS/IMAGE, with images ending in one of SUFFIXES; classes are numbered by name. Hidden folders
            and files are ignored.

    Raises:
        ValueError: the folder has another layout, or a class has no image.
        ImportError: Pillow is missing.

    Source: the layout and preprocessing of PyTorch's ImageNet example; ImageNet: https://image-net.org (registration).

    Example:
        >>> images, labels = ImageFolder("imagenet/train").read([0, 7], side=224)
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        _pillow()
        classes = [path for path in _shown(Path(folder)) if path.is_dir()]
        images = [[path for path in _shown(kind) if path.suffix.lower() in SUFFIXES] for kind in classes]
        self._found = [(path, label) for label, paths in enumerate(images) for path in paths]
        self.num_classes = len(classes)
        if not self._found:
            raise ValueError(
                f"image_folder: {folder} must hold a folder of images for every class, as ImageNet's train folder does "
                f"(https://image-net.org; FOLDER/n01440764/*.JPEG), got {len(classes)} folders and no image in them"
            )

        empty = [kind.name for kind, paths in zip(classes, images) if not paths]
        if empty:
            raise ValueError(
                f"image_folder: every folder of {folder} must hold images ({', '.join(SUFFIXES)}), got none in "
                f"{empty[0]!r}" + (f" and {len(empty) - 1} more" if len(empty) > 1 else "")
            )

    def __len__(self) -> int:
        return len(self._found)

    def read(self, indices: Sequence[int], *, side: int = 224) -> tuple[Tensor, Tensor]:
        """Return images (n, 3, side, side) float32, contiguous, and labels (n,) int64, decoded in parallel.

        Raises:
            ValueError: a file is not an image.
        """
        pixels = np.empty((len(indices), side, side, 3), np.uint8)

        def decode(row: int) -> None:
            pixels[row] = _middle(self._found[indices[row]][0], side)

        with ThreadPoolExecutor() as pool:
            list(pool.map(decode, range(len(indices))))
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        labels = torch.tensor([self._found[index][1] for index in indices])
        return _normalized(images, IMAGENET_MEAN, IMAGENET_STD), labels


def _shown(folder: Path) -> list[Path]:
    """Return the entries of a folder that are not hidden, by name."""
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError:
        raise ImportError('image_folder: needs Pillow; type: pip install "blockhess[data]"') from None
    return PIL


def _middle(path: Path, side: int) -> np.ndarray[Any, Any]:
    """Return the center of an image, (side, side, 3) pixels."""
    pil = _pillow()
    try:
        with pil.Image.open(path) as opened:
            image = opened.convert("RGB")
    except (pil.UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image_folder: {path} must be an image, got {error}") from None
    scale = side * 8 / 7 / min(image.size)
    width, height = (max(side, round(scale * length)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), pil.Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def image_folder(
    folder: str | PathLike[str], num_images: int, *, side: int = 224, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw images at random from a folder with one folder per class: see ImageFolder.

    Args:
        folder: see ImageFolder.
        num_images: number of images, drawn without replacement.
        side: side of the images in pixels.
        seed: random seed.

    Returns:
        Images (num_images, 3, side, side) float32 and labels (num_images,) int64.

    Raises:
        ValueError: the folder has another layout or too few images, a file is not an image, or a size is below 1.
        ImportError: Pillow is missing.

    Example:
        >>> images, labels = image_folder("imagenet/train", 1024)
    """
    for name, value in (("num_images", num_images), ("side", side)):
        if value < 1:
            raise ValueError(f"image_folder: {name} must be at least 1, got {value}")
    found = ImageFolder(folder)
    if num_images > len(found):
        raise ValueError(f"image_folder: num_images must be at most {len(found)}, got {num_images}")
    drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:num_images].tolist()
    return found.read(drawn, side=side)


def cifar10(folder: str | PathLike[str], *, split: str = "train") -> tuple[Tensor, Tensor]:
    """Read the binary version of CIFAR-10. The Python version is not read: it is a pickle, which can run any code.

    Args:
        folder: holds data_batch_1.bin ... data_batch_5.bin ("train") and test_batch.bin ("test").
        split: "train" or "test".

    Returns:
        Images (n, 3, 32, 32) float32 and labels (n,) int64 in 0 ... 9.

    Raises:
        ValueError: split is unknown, or a file is missing or has another layout.

    Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html (cifar-10-binary.tar.gz).

    Example:
        >>> images, labels = cifar10("cifar-10-batches-bin")
    """
    _check_split("cifar10", split)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    records = []
    for name in names:
        path = Path(folder) / name
        if not path.is_file():
            raise ValueError(
                f"cifar10: {folder} must hold {', '.join(names)} of the binary version, cifar-10-binary.tar.gz at "
                f"https://www.cs.toronto.edu/~kriz/cifar.html, got no {name}"
            )
        content = np.fromfile(path, np.uint8)
        if len(content) == 0 or len(content) % CIFAR10_RECORD or content[::CIFAR10_RECORD].max() > 9:
            raise ValueError(
                f"cifar10: {path} must hold records of a label and {CIFAR10_RECORD - 1} pixels, got "
                f"{len(content)} bytes"
            )
        records.append(content.reshape(-1, CIFAR10_RECORD))
    whole = torch.from_numpy(np.concatenate(records))
    images = whole[:, 1:].reshape(-1, 3, 32, 32)
    return _normalized(images, CIFAR10_MEAN, CIFAR10_STD), whole[:, 0].long()


def _normalized(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    # Pixels as they are decoded lie channels last; in that layout torch 2.13's gradient of a strided 1x1 convolution of
    # fewer than 8 channels (seen with 2, 4 and 6) writes outside its memory on a CPU without AVX-512.
    return (pixels.float().contiguous() / 255 - shift) / scale


def idx_images(folder: str | PathLike[str], *, split: str = "train") -> tuple[Tensor, Tensor]:
    """Read the images and labels of MNIST, Fashion-MNIST or another data set in their file format.

    Args:
        folder: contains train-images-idx3-ubyte and train-labels-idx1-ubyte (t10k-... for "test"), plain or as .gz.
        split: "train" or "test".

    Returns:
        Images (n, 1, height, width) float32, standardized to mean 0 and standard deviation 1 over the split, and labels
        (n,) int64.

    Raises:
        ValueError: split has another value, a file is missing or broken, or the files differ in length.

    Source: the idx format, http://yann.lecun.com/exdb/mnist.

    Example:
        >>> images, labels = idx_images("MNIST/raw")
    """
    _check_split("idx_images", split)
    stem = "train" if split == "train" else "t10k"
    pixels = _idx(Path(folder) / f"{stem}-images-idx3-ubyte", 3)
    labels = _idx(Path(folder) / f"{stem}-labels-idx1-ubyte", 1)
    if len(pixels) != len(labels) or len(pixels) == 0:
        raise ValueError(
            f"idx_images: {folder} must hold as many images as labels, got {len(pixels)} and {len(labels)}"
        )
    images = torch.from_numpy(pixels.astype(np.float32)).unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.from_numpy(labels.astype(np.int64))


def _check_split(op: str, split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f'{op}: split must be "train" or "test", got {split!r}')


def _idx(path: Path, ndim: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read an idx file of bytes: magic number 0x0000 08 ndim, sizes as big-endian int32, then the entries."""
    packed = path.with_name(f"{path.name}.gz")
    try:
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"idx_images: cannot read {path} or {packed.name}: {error}") from None
    header = 4 * (1 + ndim)
    known = len(content) >= header and content[:4] == bytes([0, 0, 8, ndim])
    shape = struct.unpack(f">{ndim}i", content[4:header]) if known else ()
    if not known or np.prod(shape) != len(content) - header:
        raise ValueError(f"idx_images: {path} must be an idx file of bytes with {ndim} dimensions")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
