"""Labelled images named by a string, and the batches that are read from them."""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from jaxref.core.checks import check_interval
from jaxref.train.baselines import unigram_entropy
from jaxref.train.data import Batch, example_batches

_IDX_UNSIGNED_BYTE = 0x08


class ImageSet(NamedTuple):
    """Labelled images to train on and to validate on, standardised by the training images.

    Attributes:
      train_images: `[n, height, width, channels]` float32.
      train_labels: int32 `[n]`, in [0, num_classes).
      validation_images, validation_labels: the held-out ones, likewise.
      num_classes: number of classes.
      description: where the images come from, in a few words.
      as_series: whether a model is given each image as a series `[height, width * channels]`, the
        rows of pixels one after the other.

    The methods are those of `jaxref.train.data.Corpus`.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    num_classes: int
    description: str
    as_series: bool = False

    @property
    def measure(self) -> str:
        """What a validation loss is."""
        return "nats per image"

    def sizes(self, config: ConfigDict) -> dict[str, Any]:
        """What the program has to know of the data."""
        del config
        return {
            "series_shape" if self.as_series else "image_shape": self.inputs(slice(1)).shape[1:],
            "num_classes": self.num_classes,
            "num_examples": len(self.train_labels),
        }

    def inputs(self, ids: np.ndarray | slice, *, held_out: bool = False) -> np.ndarray:
        """What a model reads of these images."""
        images = (self.validation_images if held_out else self.train_images)[ids]
        return images.reshape(*images.shape[:2], -1) if self.as_series else images

    def summary(self) -> str:
        """The data in a line."""
        height, width, channels = self.train_images.shape[1:]
        return (
            f"{self.description}; {len(self.train_labels):,} images of {height} x {width} x "
            f"{channels} to train on, {len(self.validation_labels):,} held out"
            + ", read row by row"
            * self.as_series
        )

    def per_step(self, config: ConfigDict) -> tuple[int, str]:
        """How many images a step reads, and a name for their rate."""
        return config.batch_size, "images_per_second"

    def batches(
        self, config: ConfigDict, rows: np.ndarray | None = None
    ) -> grain.IterDataset[Batch]:
        """The endless training batches, or of each only these rows."""

        def gather(ids: np.ndarray) -> Batch:
            return {"inputs": self.inputs(ids), "targets": self.train_labels[ids]}

        return example_batches(
            len(self.train_labels),
            gather,
            batch_size=config.batch_size,
            seed=config.seed,
            rows=rows,
        )

    def held_out(self, config: ConfigDict) -> tuple[list[Batch], dict[str, float]]:
        """The validation batches, and the entropy of the labels: the loss of the best guess that
        sees no image."""
        rows, count = config.batch_size, len(self.validation_labels)
        batches = []
        for start in range(0, count, rows):
            ids = np.minimum(np.arange(start, start + rows), count - 1)
            batches.append(
                {
                    "inputs": self.inputs(ids, held_out=True),
                    "targets": self.validation_labels[ids],
                    "where": np.arange(start, start + rows) < count,
                }
            )
        return batches, {"class frequencies": unigram_entropy(self.validation_labels)}


def load_images(
    name: str,
    *,
    validation_fraction: float = 0.2,
    positive_classes: Sequence[int] = (),
    as_series: bool = False,
    **text: Any,
) -> ImageSet:
    """The images that a name stands for, split into training and validation images.

    Nothing is downloaded, and nothing is written. `name` is one of

    - `digits`: scikit-learn's 1797 handwritten digits of 8 x 8 pixels, in ten classes.
    - `images:DIR`: a directory with the idx files of MNIST, Fashion-MNIST and their kind, gzipped
      or not: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, and the same with `t10k` for
      validation. Without those, a share of the training images is held out.

    Pixels are standardised with the mean and the standard deviation of all training pixels of a
    channel.

    Args:
      name: the source of the images, as above.
      validation_fraction: in (0, 1), the share of images to hold out where they come unsplit: every
        1 / fraction-th one of each class, so that both parts see the whole of the order.
      positive_classes: the classes that become class 1 of two, and all others class 0, for losses
        of binary decisions; images are held out by their classes of before. Default: every class
        stays.
      as_series: whether models read an image as a series, a row of pixels at each step.
      **text: what belongs to text; ignored.

    Returns:
      The `ImageSet`.

    Raises:
      ValueError: a name of neither form, a fraction out of range, positive classes that are not
        among those of the images or are all of them, a file that is damaged or not in
        idx format, or numbers of images and labels, or shapes of images, that differ.
      FileNotFoundError: a file of the directory is missing.
      ImportError: `digits` without scikit-learn.

    Example:
      >>> load_images("digits").train_images.shape[1:]
      (8, 8, 1)
    """
    del text
    check_interval(0, 1, closed="neither", validation_fraction=validation_fraction)
    source, _, where = name.partition(":")
    if name == "digits":
        images, labels = _digits()
        parts = _split(images, labels, validation_fraction)
        description = "scikit-learn's handwritten digits"
    elif source == "images" and where:
        directory = Path(where).expanduser()
        images, labels = _idx_pair(directory, "train")
        if _idx_file(directory, "t10k-images-idx3-ubyte").is_file():
            parts = (images, labels, *_idx_pair(directory, "t10k"))
            if parts[2].shape[1:] != images.shape[1:]:
                raise ValueError(
                    f"{directory}: the t10k images must have the shape of the train images, "
                    f"{images.shape[1:]}, got {parts[2].shape[1:]}"
                )
        else:
            parts = _split(images, labels, validation_fraction)
        description = f"images of {where}"
    else:
        raise ValueError(f"the images must be 'digits' or 'images:DIR', got {name!r}")
    train_images, train_labels, validation_images, validation_labels = parts
    if positive_classes:
        train_labels, validation_labels = (
            _two_classes(labels, positive_classes) for labels in (train_labels, validation_labels)
        )
    mean = train_images.mean(axis=(0, 1, 2), dtype=np.float64)
    spread = train_images.std(axis=(0, 1, 2), dtype=np.float64)
    spread = np.where(spread > 0, spread, 1.0)

    def standardised(images: np.ndarray) -> np.ndarray:
        return ((images - mean) / spread).astype(np.float32)

    return ImageSet(
        standardised(train_images),
        train_labels.astype(np.int32),
        standardised(validation_images),
        validation_labels.astype(np.int32),
        int(max(train_labels.max(), validation_labels.max())) + 1,
        description,
        as_series,
    )


def _two_classes(labels: np.ndarray, positive_classes: Sequence[int]) -> np.ndarray:
    classes, positive = np.unique(labels), np.unique(positive_classes)
    if not np.isin(positive, classes).all() or len(positive) == len(classes):
        raise ValueError(
            f"positive_classes must be some of the images' classes {classes}, got "
            f"{tuple(positive_classes)}"
        )
    return np.isin(labels, positive).astype(labels.dtype)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "data.name=digits needs scikit-learn: pip install 'jaxref[examples]'"
        ) from error
    digits = load_digits()
    return digits.images[..., None], digits.target


def _split(images: np.ndarray, labels: np.ndarray, fraction: float) -> tuple[np.ndarray, ...]:
    quota = np.floor(np.arange(len(labels) + 1) * fraction)
    held_out = np.zeros(len(labels), bool)
    held_out[np.argsort(labels, kind="stable")] = quota[1:] > quota[:-1]
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"validation_fraction must leave images on both sides of {len(labels)}, got {fraction}"
        )
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def _idx_pair(directory: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    images = _read_idx(_idx_file(directory, f"{prefix}-images-idx3-ubyte"))
    labels = _read_idx(_idx_file(directory, f"{prefix}-labels-idx1-ubyte"))
    if images.ndim not in (3, 4) or labels.shape != images.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"{directory}: the {prefix} files must hold images [n, height, width] and labels [n], "
            f"got shapes {images.shape} and {labels.shape}"
        )
    return images.reshape(*images.shape[:3], -1), labels


def _idx_file(directory: Path, name: str) -> Path:
    """The file, or its gzipped form where only that exists."""
    plain, gzipped = directory / name, directory / f"{name}.gz"
    return gzipped if gzipped.is_file() and not plain.is_file() else plain


def _read_idx(path: Path) -> np.ndarray:
    """An array in the idx format: two zero bytes, type, number of axes, sizes, entries."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} (nor {path.name}.gz)")
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    header = 4 + 4 * content[3] if len(content) > 3 else 4
    if content[:3] != bytes([0, 0, _IDX_UNSIGNED_BYTE]) or len(content) < header:
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"{path} must hold {math.prod(shape)} entries of shape {shape}, got "
            f"{len(content) - header}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
