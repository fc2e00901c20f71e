"""The rows per block, and the threads, under a memory bound."""

import psutil
import pytest

from gklx._scoring.memory import Needs, rows_and_threads
from gklx._scoring.sizes import parse_size

pytestmark = pytest.mark.library_independent


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2e9), ("1.5G", 1.5e9), ("500 MiB", 500 * 2**20), ("500mb", 5e8), ("4096", 4096), ("1KiB", 1024)],
)
def test_sizes_are_parsed(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "2 apples", "0", "1e9", "2GBB", "nan", "0.5", pytest.param("9" * 400, id="400 nines")]
)
def test_invalid_sizes_are_refused(text):
    with pytest.raises(ValueError, match=r"^memory must be a size such as 2GB or 500MiB"):
        parse_size(text)


def used():
    return psutil.Process().memory_info().rss


def test_block_is_no_larger_than_the_librarys_block_size():
    assert rows_and_threads(1000, 4, 2**20, 2, None, Needs()) == (262, 2)


def test_results_of_samples_count_where_classes_are_few():
    rows, threads = rows_and_threads(2, 4, 2**23, 2, used() + 24_000_000, Needs())
    assert threads == 2
    assert 10_000 < rows < 20_000


def test_memory_bound_reduces_blocks_first_and_then_threads():
    row = 100_000 * 4
    room = 24 * row
    assert rows_and_threads(100_000, 4, 2**20, 4, used() + 50 * room, Needs()) == (2, 4)
    assert rows_and_threads(100_000, 4, 2**20, 4, used() + int(5.5 * room), Needs()) == (1, 4)
    assert rows_and_threads(100_000, 4, 2**20, 4, used() + int(2.5 * room), Needs()) == (1, 2)
    with pytest.raises(ValueError, match=r"^memory must be at least [\d,]+ MB for 100,000 classes here"):
        rows_and_threads(100_000, 4, 2**20, 4, used() + room // 2, Needs())
    with pytest.raises(ValueError, match=r"^memory must be at least .* MB of it for a prior; got [\d,]+ MB$"):
        rows_and_threads(100_000, 4, 2**20, 4, used() + 2 * room, Needs(2 * room, 0, "a prior"))
