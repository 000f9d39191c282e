import gzip
import math
import struct
import sys

import numpy as np
import pytest

from jaxref.train.config import load_config
from jaxref.train.images import load_images

TRAIN, TEST = 10, 4


def idx(array):
    """The bytes of an idx file: zeros, the code of unsigned bytes, axes, sizes, entries."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def pixels():
    """Images of 3 x 5 pixels, and labels in [0, 4) such that every class occurs."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (TRAIN + TEST, 3, 5))
    return images, (np.arange(TRAIN + TEST) * 3) % 4


@pytest.fixture
def directory(pixels, tmp_path):
    """`directory(gzipped, test, **others)`: a directory with the files, some of them others."""

    def make(gzipped=False, test=True, **others):
        images, labels = pixels
        parts = {"train": slice(TRAIN), "t10k": slice(TRAIN, None)}
        for prefix in ("train", "t10k") if test else ("train",):
            contents = {
                f"{prefix}-images-idx3-ubyte": idx(images[parts[prefix]]),
                f"{prefix}-labels-idx1-ubyte": idx(labels[parts[prefix]]),
            }
            for name, content in contents.items():
                content = others.get(name.rpartition("-idx")[0].replace("-", "_"), content)
                if gzipped:
                    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
                else:
                    (tmp_path / name).write_bytes(content)
        return tmp_path

    return make


def standardised(images, train):
    return ((images - train.mean()) / train.std())[..., None]


class TestIdxFiles:
    @pytest.mark.parametrize("gzipped", [False, True])
    def test_files_for_validation_are_used(self, directory, pixels, gzipped):
        images, labels = pixels
        data = load_images(f"images:{directory(gzipped)}", validation_fraction=0.5)
        train = images[:TRAIN]  # whose pixels alone say how to standardise
        np.testing.assert_allclose(data.train_images, standardised(train, train), atol=1e-6)
        np.testing.assert_allclose(
            data.validation_images, standardised(images[TRAIN:], train), atol=1e-6
        )
        np.testing.assert_array_equal(data.train_labels, labels[:TRAIN])
        np.testing.assert_array_equal(data.validation_labels, labels[TRAIN:])
        assert data.num_classes == 4
        assert data.train_images.dtype == data.validation_images.dtype == np.float32
        assert data.train_labels.dtype == data.validation_labels.dtype == np.int32
        assert data.train_images.shape == (TRAIN, 3, 5, 1)
        assert data.summary() == (
            f"{data.description}; 10 images of 3 x 5 x 1 to train on, 4 held out"
        )

    @pytest.mark.parametrize("fraction", [0.1, 0.25, 0.37, 0.5, 0.99])
    def test_without_them_a_share_of_each_class_is_held_out(self, directory, fraction):
        """Image i is all i: labels of two classes, whose order repeats itself."""
        images = np.broadcast_to(np.arange(TRAIN)[:, None, None], (TRAIN, 2, 2))
        others = {"train_images": idx(images), "train_labels": idx(np.arange(TRAIN) % 2)}
        path = directory(test=False, **others)
        data = load_images(f"images:{path}", validation_fraction=fraction)
        values = np.concatenate([data.train_images, data.validation_images])[:, 0, 0, 0]
        ids = np.round((values - values.min()) / np.ptp(values) * (TRAIN - 1)).astype(int)
        train, validation = np.split(ids, [len(data.train_images)])
        assert sorted(ids) == list(range(TRAIN))
        np.testing.assert_array_equal(data.train_labels, train % 2)
        np.testing.assert_array_equal(data.validation_labels, validation % 2)
        assert len(validation) == int(fraction * TRAIN)
        for label in (0, 1):
            assert abs(np.sum(validation % 2 == label) - fraction * TRAIN / 2) < 1

    def test_colours_are_standardised_one_by_one(self, directory):
        rng = np.random.default_rng(1)
        colours = rng.integers(0, 256, (TRAIN, 2, 2, 3)) // np.array([1, 2, 4])
        colours[..., 2] = 7  # nothing to divide by
        data = load_images(
            f"images:{directory(test=False, train_images=idx(colours))}", validation_fraction=0.2
        )
        assert data.train_images.shape == (8, 2, 2, 3)
        mean, spread = (f(data.train_images, axis=(0, 1, 2)) for f in (np.mean, np.std))
        np.testing.assert_allclose(mean, 0, atol=1e-6)
        np.testing.assert_allclose(spread, [1, 1, 0], atol=1e-6)

    def test_plain_files_come_before_gzipped_ones(self, directory, pixels):
        directory(gzipped=True, train_labels=idx(np.full(TRAIN, 9)))
        data = load_images(f"images:{directory()}")
        np.testing.assert_array_equal(data.train_labels, pixels[1][:TRAIN])

    def test_home_directory(self, directory, monkeypatch):
        monkeypatch.setenv("HOME", str(directory()))
        assert load_images("images:~").num_classes == 4

    @pytest.mark.parametrize(
        ("others", "message"),
        [
            (
                {"train_images": b""},
                r"train-images-idx3-ubyte(.gz)? is not an idx file of unsigned byt",
            ),
            ({"train_images": b"\0\0\x0d\x01\0\0\0\0"}, "is not an idx file of unsigned bytes"),
            ({"train_images": b"\0\0\x08\x03\0\0"}, "is not an idx file of unsigned bytes"),
            ({"train_images": b"\0\0\x08\x02" + b"\xff" * 8}, "must hold .* entries .* got 0"),
            (
                {"t10k_labels": idx(np.zeros(TEST))[:-1]},
                r"must hold 4 entries of shape \(4,\), got 3",
            ),
            (
                {"train_labels": idx(np.zeros(9))},
                r"train files must hold images .* got shapes \(10, 3, 5\) and \(9,\)",
            ),
            ({"train_images": idx(np.zeros((10, 9)))}, r"got shapes \(10, 9\) and \(10,\)"),
            (
                {"train_images": idx(np.zeros((0, 3, 5))), "train_labels": idx(np.zeros(0))},
                r"got shapes \(0, 3, 5\) and \(0,\)",
            ),
            (
                {"t10k_images": idx(np.zeros((TEST, 5, 3)))},
                r"t10k images must have the shape of the train images, \(3, 5, 1\), got \(5, 3, 1",
            ),
        ],
    )
    @pytest.mark.parametrize("gzipped", [False, True])
    def test_damaged_files_are_named(self, directory, others, message, gzipped):
        path = directory(gzipped, **others)
        with pytest.raises(ValueError, match=message) as error:
            load_images(f"images:{path}")
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        "damage", [lambda b: b[:-9], lambda b: b"no", lambda b: b[:40] + b[50:]]
    )
    def test_damaged_gzip(self, directory, damage):
        path = directory(gzipped=True) / "t10k-images-idx3-ubyte.gz"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz is not a whole gzip"):
            load_images(f"images:{path.parent}")

    @pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
    def test_missing_files_are_named(self, directory, name):
        path = directory()
        (path / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"no file .*/{name} \(nor {name}.gz\)"):
            load_images(f"images:{path}")


class TestDigits:
    @pytest.fixture(scope="class")
    def digits(self):
        return load_images("digits")

    def test_both_parts_have_all_classes_alike(self, digits):
        assert digits.train_images.shape == (1438, 8, 8, 1)
        assert digits.validation_images.shape == (359, 8, 8, 1)
        assert digits.num_classes == 10
        train, validation = (
            np.bincount(labels) for labels in (digits.train_labels, digits.validation_labels)
        )
        assert np.all(np.abs(validation - 0.2 * (train + validation)) < 1)

    def test_pixels_are_standardised_by_those_to_train_on(self, digits):
        assert abs(digits.train_images.mean()) < 1e-5
        assert abs(digits.train_images.std() - 1) < 1e-5
        assert 1e-5 < abs(digits.validation_images.mean()) < 0.1

    def test_no_image_is_lost_or_in_both(self, digits):
        from sklearn.datasets import load_digits

        def rows(images, labels):
            ranks = np.unique(images, return_inverse=True)[1]  # of the 17 values of a pixel
            return sorted(zip(map(tuple, ranks.reshape(len(images), -1)), labels.tolist()))

        ours = rows(
            np.concatenate([digits.train_images, digits.validation_images]),
            np.concatenate([digits.train_labels, digits.validation_labels]),
        )
        theirs = load_digits()
        assert ours == rows(theirs.images, theirs.target)

    def test_what_the_program_asks(self, digits):
        config = load_config("configs/digits.py")
        assert digits.sizes(config) == {
            "image_shape": (8, 8, 1),
            "num_classes": 10,
            "num_examples": 1438,
        }
        assert digits.per_step(config) == (128, "images_per_second")
        assert digits.measure == "nats per image"

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, np.nan])
    def test_fractions_that_leave_one_part_empty(self, fraction):
        with pytest.raises(ValueError, match=r"validation_fraction must be in \(0, 1\), got"):
            load_images("digits", validation_fraction=fraction)

    def test_a_fraction_below_one_image(self):
        with pytest.raises(ValueError, match=r"leave images on both sides of 1797, got 0.0005"):
            load_images("digits", validation_fraction=0.0005)

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r"pip install 'jaxref\[examples\]'"):
            load_images("digits")


@pytest.mark.parametrize("name", ["mnist", "images:", "images", "digits:2", ""])
def test_unknown_names_list_the_forms(name):
    with pytest.raises(ValueError, match="must be 'digits' or 'images:DIR', got"):
        load_images(name)


class TestBatches:
    @pytest.fixture(scope="class")
    def digits(self):
        return load_images("digits")

    def test_every_epoch_has_every_image_once_in_an_order_of_its_own(self, digits):
        """An epoch ends inside of a batch, and the next one begins there."""
        config = load_config(overrides=["batch_size=100"])
        iterators = [iter(digits.batches(config)) for _ in range(2)]
        ids = []
        for _ in range(29):  # two epochs are 28.76 batches
            batch, same = (next(iterator) for iterator in iterators)
            assert batch.keys() == {"inputs", "targets", "ids"}
            for name, value in batch.items():
                np.testing.assert_array_equal(value, same[name])
            np.testing.assert_array_equal(batch["inputs"], digits.train_images[batch["ids"]])
            np.testing.assert_array_equal(batch["targets"], digits.train_labels[batch["ids"]])
            ids += batch["ids"].tolist()
        first, second = ids[:1438], ids[1438:2876]
        assert sorted(first) == sorted(second) == list(range(1438))
        assert first != second
        other = next(iter(digits.batches(load_config(overrides=["batch_size=100", "seed=1"]))))
        assert other["ids"].tolist() != first[:100]

    def test_rows_of_a_batch(self, digits):
        config = load_config(overrides=["batch_size=16"])
        rows = np.array([3, 4, 11])
        whole, part = iter(digits.batches(config)), iter(digits.batches(config, rows))
        for _ in range(3):
            batch, some = next(whole), next(part)
            assert batch.keys() == some.keys()
            for name, value in batch.items():
                np.testing.assert_array_equal(some[name], value[rows])

    @pytest.mark.parametrize("rows", [64, 359, 512])
    def test_held_out_images_are_padded_to_whole_batches(self, digits, rows):
        batches, baselines = digits.held_out(load_config(overrides=[f"batch_size={rows}"]))
        assert len(batches) == math.ceil(359 / rows)
        where = np.concatenate([batch["where"] for batch in batches])
        assert where.tolist() == [True] * 359 + [False] * (len(batches) * rows - 359)
        for name in ("inputs", "targets"):
            assert {len(batch[name]) for batch in batches} == {rows}
        inputs, targets = (
            np.concatenate([batch[name] for batch in batches])[where]
            for name in ("inputs", "targets")
        )
        np.testing.assert_array_equal(inputs, digits.validation_images)
        np.testing.assert_array_equal(targets, digits.validation_labels)
        frequencies = np.bincount(digits.validation_labels) / 359
        entropy = -np.sum(frequencies * np.log(frequencies))
        np.testing.assert_allclose(baselines["class frequencies"], entropy)


class TestPositiveClasses:
    def test_classes_become_one_and_the_rest_the_other(self):
        whole = load_images("digits")
        two = load_images("digits", positive_classes=(3, 8))
        assert two.num_classes == 2
        np.testing.assert_array_equal(two.train_images, whole.train_images)
        np.testing.assert_array_equal(two.train_labels, np.isin(whole.train_labels, (3, 8)))
        np.testing.assert_array_equal(
            two.validation_labels, np.isin(whole.validation_labels, (3, 8))
        )

    @pytest.mark.parametrize("classes", [(10,), tuple(range(10))])
    def test_classes_that_do_not_exist_or_are_all(self, classes):
        with pytest.raises(
            ValueError, match="positive_classes must be some of the images' classes"
        ):
            load_images("digits", positive_classes=classes)
