import json

import pytest

from jaxref.kernels import block_sizes


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXREF_CACHE_DIR", str(tmp_path))
    return tmp_path


def forget():
    """What a new process knows."""
    block_sizes._table.cache_clear()


def test_sizes_serve_shapes_up_to_the_next_power_of_two():
    block_sizes.record_block("softmax", (1000, 32000), (8, 4096))
    assert block_sizes.tuned_block("softmax", (1024, 20000)) == (8, 4096)
    assert block_sizes.tuned_block("softmax", (1025, 32000)) is None
    assert block_sizes.tuned_block("log_softmax", (1000, 32000)) is None


def test_another_process_finds_them(folder):
    block_sizes.record_block("softmax", (8, 8), (8, 128))
    path = block_sizes.record_block("softmax", (16, 8), (16, 128))
    assert path.parent == folder
    forget()
    assert block_sizes.tuned_block("softmax", (8, 8)) == (8, 128)
    assert block_sizes.tuned_block("softmax", (16, 8)) == (16, 128)
    assert [file.name for file in folder.iterdir()] == ["block_sizes.json"]


def test_a_broken_file_holds_nothing_and_is_replaced(folder):
    (folder / "block_sizes.json").write_text('{"cut')
    forget()
    assert block_sizes.tuned_block("softmax", (8, 8)) is None
    block_sizes.record_block("softmax", (8, 8), (8, 128))
    assert list(json.loads((folder / "block_sizes.json").read_text()).values()) == [[8, 128]]
