import sysconfig
import time
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxref.train.data import (
    load_corpus,
    train_batches,
    validation_batches,
    validation_text,
    validation_tokens,
)


def write_files(root, texts):
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def many_files(count=60):
    """Files of 100 to 400 different bytes, each starting with its own name."""
    rng = np.random.default_rng(0)
    return {
        f"part{i % 3}/file{i}.txt": b"<%d>" % i + rng.integers(97, 123, size, np.uint8).tobytes()
        for i, size in enumerate(rng.integers(100, 400, count))
    }


def files_of(tokens):
    return tokens.tobytes().split(b"\0")


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def starts(batch):
    """Which windows a batch of `np.arange(...)` tokens holds, by their first token."""
    return batch["inputs"][:, 0].tolist()


class TestPythonStdlib:
    def test_is_the_source_of_the_standard_library_without_its_tests(self):
        begin = time.perf_counter()
        corpus = load_corpus()
        assert time.perf_counter() - begin < 2
        assert corpus.vocab_size == 256
        assert corpus.is_bytes
        assert "standard library" in corpus.description
        train, validation = len(corpus.train), len(corpus.validation)
        assert 8e6 < train + validation < 20e6
        assert 0.045 < validation / (train + validation) < 0.0501

        stdlib = Path(sysconfig.get_path("stdlib"))
        files = set(files_of(corpus.train)) | set(files_of(corpus.validation))
        for module in ("argparse.py", "json/decoder.py", "unittest/mock.py"):
            assert (stdlib / module).read_bytes() in files
        for left_out in ("test/support/__init__.py", "idlelib/idle_test/htest.py"):
            if (stdlib / left_out).exists():
                assert (stdlib / left_out).read_bytes() not in files
        assert b"" not in files

    def test_does_not_depend_on_where_it_is_installed(self, tmp_path, monkeypatch):
        texts = many_files()
        modules = {name.replace(".txt", ".py"): text for name, text in texts.items()}
        left_out = {
            f"{directory}/left_out.py": b"left out"
            for directory in ("test", "lib/tests", "site-packages/x", "lib/__pycache__")
        }
        corpora = []
        for root in (tmp_path / "usr" / "lib", tmp_path / "test" / "other"):
            write_files(root, modules | left_out | {"readme.txt": b"left out", "empty.py": b""})
            monkeypatch.setattr(sysconfig, "get_path", lambda name, root=root: str(root))
            corpora.append(load_corpus("python_stdlib"))
        here, there = corpora
        np.testing.assert_array_equal(here.train, there.train)
        np.testing.assert_array_equal(here.validation, there.validation)
        assert sorted(files_of(here.train) + files_of(here.validation)) == sorted(texts.values())


class TestText:
    def test_splits_by_file_and_is_sorted(self, tmp_path):
        texts = many_files()
        write_files(tmp_path, texts | {"part0/other.md": b"no match", "part1/empty.txt": b""})
        corpus = load_corpus(f"text:{tmp_path}/**/*.txt", validation_fraction=0.2)
        train, validation = files_of(corpus.train), files_of(corpus.validation)
        assert not set(train) & set(validation)
        assert sorted(train + validation) == sorted(texts.values())
        in_order = [texts[name] for name in sorted(texts)]
        assert train == [text for text in in_order if text in train]
        assert validation == [text for text in in_order if text in validation]
        fraction = len(corpus.validation) / sum(map(len, texts.values()))
        assert 0.17 < fraction < 0.21
        assert (corpus.vocab_size, corpus.is_bytes) == (256, True)
        assert "60 files" in corpus.description

    def test_split_is_by_the_relative_path_alone(self, tmp_path):
        """Neither the directory nor the contents nor, by and large, other files matter."""
        texts = many_files()
        reversed_texts = {name: text[::-1] for name, text in texts.items()}
        fewer = {name: text for name, text in texts.items() if not name.endswith("9.txt")}
        held_out = []
        for root, files in (("a", texts), ("b/c", reversed_texts), ("d", fewer)):
            write_files(tmp_path / root, files)
            corpus = load_corpus(f"text:{tmp_path / root}/*/*.txt", validation_fraction=0.2)
            validation = files_of(corpus.validation)
            held_out.append({name for name, text in files.items() if text in validation})
        assert held_out[0] == held_out[1]
        assert len(held_out[0]) >= 8
        assert len(held_out[0] & held_out[2]) >= 0.7 * len(held_out[2])

    def test_no_file_is_held_out_at_fraction_zero(self, tmp_path):
        write_files(tmp_path, many_files() | {"part0/empty.txt": b""})
        corpus = load_corpus(f"text:{tmp_path}/**/*.txt", validation_fraction=0)
        assert len(corpus.validation) == 0
        assert len(files_of(corpus.train)) == 60

    def test_a_single_file_is_mapped_and_its_tail_held_out(self, tmp_path, monkeypatch):
        text = bytes(range(200))
        write_files(tmp_path, {"one.txt": text})
        monkeypatch.setenv("HOME", str(tmp_path))
        corpus = load_corpus("text:~/one.txt", validation_fraction=0.1)
        assert isinstance(corpus.train, np.memmap)
        assert corpus.train.tobytes() == text[:180]
        assert corpus.validation.tobytes() == text[180:]

    def test_a_few_large_files_hold_out_the_tail_of_all(self, tmp_path):
        write_files(tmp_path, {"a.txt": b"a" * 500, "b.txt": b"b" * 499, "c.txt": b"c"})
        corpus = load_corpus(f"text:{tmp_path}/*.txt", validation_fraction=0.1)
        text = b"a" * 500 + b"\0" + b"b" * 499 + b"\0" + b"c"
        assert corpus.train.tobytes() == text[:902]
        assert corpus.validation.tobytes() == text[902:]

    def test_bad_globs_name_the_pattern(self, tmp_path):
        write_files(tmp_path, {"empty/a.txt": b"", "empty/b.txt": b""})
        with pytest.raises(FileNotFoundError, match=r"text:.*/\*\.md matches no file"):
            load_corpus(f"text:{tmp_path}/*.md")
        with pytest.raises(FileNotFoundError, match="matches no file"):
            load_corpus(f"text:{tmp_path}/*")  # a directory alone
        with pytest.raises(ValueError, match=r"text:.*\*\.txt matches only empty files"):
            load_corpus(f"text:{tmp_path}/empty/*.txt")


class TestTokens:
    @pytest.mark.parametrize("dtype", ["uint16", "uint32"])
    def test_maps_the_file_and_holds_out_the_tail(self, dtype, tmp_path):
        ids = np.random.default_rng(0).integers(50_000, size=1001)
        path = tmp_path / "tokens.bin"
        path.write_bytes(ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
        corpus = load_corpus(
            f"tokens:{path}", vocab_size=50_000, token_dtype=dtype, validation_fraction=0.1
        )
        assert isinstance(corpus.train, np.memmap)
        assert isinstance(corpus.validation, np.memmap)
        assert corpus.train.dtype == corpus.validation.dtype == dtype
        np.testing.assert_array_equal(corpus.train, ids[:901])
        np.testing.assert_array_equal(corpus.validation, ids[901:])
        assert (corpus.vocab_size, corpus.is_bytes) == (50_000, False)
        batch = next(iter(train_batches(corpus.train, batch_size=2, length=9, seed=0)))
        assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
        assert type(batch["inputs"]) is np.ndarray
        (row,) = np.flatnonzero(ids == batch["inputs"][0, 0])[:1]
        np.testing.assert_array_equal(batch["targets"][0], ids[row + 1 : row + 10])

    def test_ids_outside_of_the_vocabulary_are_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr("jaxref.train.data._CHECKED_AT_ONCE", 16)
        ids = np.arange(100, dtype="<u2")
        ids[37], ids[41], ids[77], ids[99] = 500, 700, 700, 900
        path = tmp_path / "tokens.bin"
        path.write_bytes(ids.tobytes())
        load = lambda vocab_size: load_corpus(f"tokens:{path}", vocab_size=vocab_size)
        with pytest.raises(ValueError, match=r"training .* 600, got 700 at position 41"):
            load(600)
        with pytest.raises(ValueError, match=r"validation .* 900, got 900 at position 4"):
            load(900)
        assert load(901).vocab_size == 901

    def test_bytes_respect_a_vocabulary_too(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"caf\xc3\xa9 au lait")
        name = f"text:{tmp_path}/a.txt"
        with pytest.raises(ValueError, match=r"128, got 195 at position 3"):
            load_corpus(name, vocab_size=128)
        assert load_corpus(name, vocab_size=196).vocab_size == 196

    def test_bad_files_and_arguments(self, tmp_path):
        path = tmp_path / "tokens.bin"
        path.write_bytes(bytes(1001))
        with pytest.raises(ValueError, match="odd size 1001: not a multiple of 2 bytes"):
            load_corpus(f"tokens:{path}", vocab_size=10)
        path.write_bytes(bytes(1002))
        with pytest.raises(ValueError, match="odd size 1002: not a multiple of 4 bytes"):
            load_corpus(f"tokens:{path}", vocab_size=10, token_dtype="uint32")
        with pytest.raises(ValueError, match=r"token_dtype must be .* got 'int64'"):
            load_corpus(f"tokens:{path}", vocab_size=10, token_dtype="int64")
        with pytest.raises(ValueError, match="needs vocab_size"):
            load_corpus(f"tokens:{path}")
        with pytest.raises(ValueError, match="vocab_size must be in"):
            load_corpus(f"tokens:{path}", vocab_size=0)
        with pytest.raises(ValueError, match="validation_fraction must be in"):
            load_corpus(f"tokens:{path}", vocab_size=10, validation_fraction=1.0)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="is empty"):
            load_corpus(f"tokens:{path}", vocab_size=10)
        with pytest.raises(FileNotFoundError, match=r"absent\.bin"):
            load_corpus(f"tokens:{tmp_path}/absent.bin", vocab_size=10)


@pytest.mark.parametrize("name", ["wikipedia", "", "text:", "tokens:", "python_stdlib:3"])
def test_unknown_names_list_the_forms(name):
    with pytest.raises(ValueError, match="'python_stdlib', 'text:GLOB' or 'tokens:FILE', got"):
        load_corpus(name)


class TestTrainBatches:
    # 80 windows of 8 + 1 tokens, each known by its first token: 0, 8, 16, ...
    tokens = np.arange(80 * 8 + 1, dtype=np.uint16)

    def batches(self, **options):
        return train_batches(self.tokens, **({"batch_size": 8, "length": 8, "seed": 3} | options))

    def test_targets_are_the_inputs_shifted_by_one(self):
        for batch in take(iter(self.batches()), 3):
            assert batch.keys() == {"inputs", "targets", "ids"}
            for name, value in batch.items():
                assert value.shape == ((8,) if name == "ids" else (8, 8))
                assert value.dtype == np.int32
                assert value.flags.c_contiguous
            first = 8 * batch["ids"][:, None]
            np.testing.assert_array_equal(batch["inputs"], first + np.arange(8))
            np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)

    def test_the_remainder_of_the_last_window_is_left_out(self):
        iterator = iter(train_batches(self.tokens[:-1], batch_size=79, length=8, seed=0))
        assert sorted(starts(next(iterator))) == list(range(0, 632, 8))

    def test_same_seed_same_batches_other_seed_others(self):
        ours = take(iter(self.batches()), 30)
        assert_same_batches(ours, take(iter(self.batches()), 30))
        order = [start for batch in ours for start in starts(batch)]
        for seed in (4, 2):  # and no seed's epoch is its neighbour's one after
            other = [s for b in take(iter(self.batches(seed=seed)), 30) for s in starts(b)]
            assert all(
                other[a : a + 80] != order[b : b + 80] for a in (0, 80, 160) for b in (0, 80, 160)
            )

    def test_an_epoch_has_every_window_once_in_an_order_of_its_own(self):
        iterator = iter(self.batches())
        epochs = [[s for b in take(iterator, 10) for s in starts(b)] for _ in range(3)]
        assert all(sorted(epoch) == list(range(0, 640, 8)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert epochs[0] != sorted(epochs[0])

    def test_an_epoch_that_ends_inside_a_batch_loses_nothing(self):
        rows = [
            start
            for batch in take(iter(self.batches(batch_size=12)), 20)
            for start in starts(batch)
        ]
        assert sorted(rows) == sorted(3 * list(range(0, 640, 8)))

    @pytest.mark.parametrize(
        "shares",
        [
            [[0, 1, 2, 3], [4, 5, 6, 7]],
            [[0, 4], [1, 5], [2, 6], [3, 7]],
            [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [5, 6, 7]],  # two of one tensor group, a third
            [[7, 0, 3]],
        ],
    )
    def test_rows_are_those_of_the_whole_batch(self, shares):
        """Also where an epoch ends inside a batch: 80 windows, 9.09 batches of 8 + 1 row unread."""
        whole = take(iter(self.batches(batch_size=9)), 20)
        for rows in map(np.array, shares):
            iterator = iter(self.batches(batch_size=9, rows=rows))
            expected = [{name: value[rows] for name, value in b.items()} for b in whole]
            assert_same_batches(take(iterator, 20), expected)
            assert iterator.get_state() == {"next_index": 20}

    def test_a_corpus_of_fewer_windows_than_rows_repeats_them(self):
        batch = next(iter(train_batches(self.tokens[:17], batch_size=8, length=8, seed=0)))
        assert sorted(starts(batch)) == [0] * 4 + [8] * 4

    @pytest.mark.parametrize("taken", [0, 1, 7, 10, 26])
    def test_state_continues_exactly(self, taken):
        """From the start, inside an epoch, at its end, and inside the third."""
        options = {"rows": np.array([1, 2, 6])}
        iterator = iter(self.batches(**options))
        take(iterator, taken)
        state = iterator.get_state()
        expected = take(iterator, 15)
        fresh = iter(self.batches(**options))
        take(fresh, 4)  # what it has prefetched must not leak through
        fresh.set_state(state)
        assert_same_batches(take(fresh, 15), expected)
        iterator.set_state(state)
        assert_same_batches(take(iterator, 15), expected)

    def test_orbax_saves_and_restores_the_iterator(self, tmp_path):
        iterator = iter(self.batches())
        take(iterator, 13)
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            data = grain.checkpoint.CheckpointSave(iterator)
            manager.save(13, args=ocp.args.Composite(data=data))
            expected = take(iterator, 12)
        fresh = iter(self.batches())
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            data = grain.checkpoint.CheckpointRestore(fresh)
            manager.restore(13, args=ocp.args.Composite(data=data))
        assert_same_batches(take(fresh, 12), expected)

    def test_a_batch_costs_little_processor_time(self):
        tokens = np.zeros(1_000_000, np.uint8)
        iterator = iter(train_batches(tokens, batch_size=16, length=128, seed=0))
        take(iterator, 10)
        begin = time.process_time()
        take(iterator, 200)
        assert (time.process_time() - begin) / 200 < 2e-3  # about 2e-4 on an idle machine

    def test_bad_arguments(self):
        for rows in ([0, 8], [-1], [0.5]):
            with pytest.raises(ValueError, match=r"rows must be in \[0, 7\], got \["):
                self.batches(rows=np.array(rows))
        with pytest.raises(ValueError, match=r"length \+ 1 = 642, got 641"):
            self.batches(length=641)
        for name in ("batch_size", "length"):
            with pytest.raises(ValueError, match=f"{name} must be in"):
                self.batches(**{name: 0})
        with pytest.raises(ValueError, match="seed must be in"):
            self.batches(seed=-1)


class TestValidationBatches:
    tokens = np.arange(1000, dtype=np.uint16)

    def evaluated(self, **options):
        batches = list(validation_batches(self.tokens, **options))
        rows = np.concatenate([b["targets"][b["where"].all(-1)] for b in batches])
        return batches, rows

    def test_covers_everything_when_it_may(self):
        batches, rows = self.evaluated(batch_size=4, length=10, max_tokens=10**9)
        assert len(batches) == 25  # 99 windows
        for batch in batches:
            assert batch.keys() == {"inputs", "targets", "where"}
            assert {value.shape for value in batch.values()} == {(4, 10)}
            assert [v.dtype.name for v in batch.values()] == ["int32", "int32", "bool"]
            where = batch["where"]
            np.testing.assert_array_equal(batch["targets"][where], batch["inputs"][where] + 1)
            assert not batch["inputs"][~where].any()
            assert not batch["targets"][~where].any()
        np.testing.assert_array_equal(rows.ravel(), np.arange(1, 991))
        assert batches[-1]["where"].sum(-1).tolist() == [10, 10, 10, 0]

    def test_spreads_evenly_within_max_tokens(self):
        batches, rows = self.evaluated(batch_size=4, length=10, max_tokens=79)
        assert sum(batch["where"].sum() for batch in batches) == 70
        first = rows[:, 0] - 1
        assert first[0] == 0
        assert set(np.diff(first)) <= {140, 150}
        assert first[-1] >= 840
        again, _ = self.evaluated(batch_size=4, length=10, max_tokens=79)
        assert_same_batches(batches, again)

    @pytest.mark.parametrize("max_tokens", [10, 79, 500, 10**9])
    def test_text_is_what_is_evaluated(self, max_tokens):
        _, rows = self.evaluated(batch_size=3, length=10, max_tokens=max_tokens)
        tokens = validation_tokens(self.tokens, length=10, max_tokens=max_tokens)
        assert tokens.dtype == np.uint16
        np.testing.assert_array_equal(tokens, rows.ravel())
        text = self.tokens.astype(np.uint8)
        expected = rows.astype(np.uint8).tobytes()
        assert validation_text(text, length=10, max_tokens=max_tokens) == expected

    def test_bad_arguments_raise_before_the_first_batch(self):
        options = {"batch_size": 4, "length": 10, "max_tokens": 100}
        for change, message in (
            ({"max_tokens": 9}, "max_tokens must be at least length = 10, got 9"),
            ({"length": 1000}, r"length \+ 1 = 1001, got 1000"),
            ({"batch_size": 0}, "batch_size must be in"),
            ({"length": 0}, "length must be in"),
        ):
            with pytest.raises(ValueError, match=message):
                validation_batches(self.tokens, **(options | change))
