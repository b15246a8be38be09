"""Tensors through shared memory: exact, aligned, never outside."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.parallel.shared_memory import ALIGNMENT_BYTES, DTYPES, Arena, Array


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    arena = Arena.create("test-arena", 1 << 16)
    yield arena
    arena.close()


shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
arrays = st.sampled_from(sorted(DTYPES)).flatmap(lambda dtype: hnp.arrays(dtype, shapes))


@given(tensors=st.dictionaries(st.text(max_size=5), arrays, max_size=5))
def test_what_is_read_is_what_was_written(arena: Arena, tensors: dict[str, Array]) -> None:
    entries = arena.write(tensors)
    assert all(entry["offset"] % ALIGNMENT_BYTES == 0 for entry in entries)
    read = arena.read(entries)
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert read[name].tobytes() == tensor.tobytes()


def test_strided_and_foreign_byte_order_arrays_arrive_as_plain_ones(arena: Arena) -> None:
    strided = np.arange(24, dtype=np.int16).reshape(4, 6).T[::2]
    swapped = np.array([1.5, -2.0], dtype=">f4")
    read = arena.read(arena.write({"strided": strided, "swapped": swapped}))
    np.testing.assert_array_equal(read["strided"], strided)
    np.testing.assert_array_equal(read["swapped"], swapped)
    assert read["swapped"].dtype.isnative


def test_what_was_read_survives_the_next_write(arena: Arena) -> None:
    first = arena.read(arena.write({"x": np.ones(8)}))["x"]
    arena.write({"x": np.zeros(8)})
    assert first.flags.owndata
    assert first.sum() == 8


def test_tensors_that_do_not_fit_are_refused_before_anything_is_overwritten() -> None:
    arena = Arena.create("test-small", 128)
    entries = arena.write({"x": np.ones(16)})
    with pytest.raises(InvalidRequest, match="need 192 bytes of shared memory and 128 are available"):
        arena.write({"a": np.zeros(1), "b": np.zeros(16)})
    assert arena.read(entries)["x"].sum() == 16
    arena.close()


@pytest.mark.parametrize("tensor", [np.array([object()]), np.array(["text"]), np.array([1j])])
def test_other_types_are_refused(arena: Arena, tensor: Array) -> None:
    with pytest.raises(InvalidRequest, match="must have one of the types"):
        arena.write({"x": tensor})


@pytest.mark.parametrize(
    "wrong", [{"offset": 1 << 16}, {"offset": -8}, {"dtype": "object"}, {"shape": [1 << 20]}, {"shape": [-1]}]
)
def test_an_entry_outside_the_arena_is_an_error(arena: Arena, wrong: dict[str, object]) -> None:
    entry = {"name": "x", "dtype": "float64", "shape": [2], "offset": 0, **wrong}
    with pytest.raises(ValueError, match="A tensor entry must"):
        arena.read([entry])  # type: ignore[list-item]
