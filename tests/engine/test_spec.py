import json

import pytest
import torch

from stepvideo_serve.engine.spec import TORCH_DTYPES, Dim, EngineSpec, TensorSpec
from stepvideo_serve.errors import EngineError
from tests.engine.toy import SPEC, toy_inputs


def spec_of(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...] = (), dims: dict[str, Dim] | None = None
) -> EngineSpec:
    return EngineSpec("small", inputs, outputs, {} if dims is None else dims)


def test_check_inputs_gives_the_size_of_each_symbol() -> None:
    assert SPEC.check_inputs(toy_inputs(rows=7, columns=4)) == {"rows": 7, "columns": 4}


def test_shapes_in_numbers() -> None:
    dims = {"rows": 7, "columns": 4}
    assert SPEC.input_shapes(dims) == {"values": (7, 8), "ids": (7,), "patches": (1, 8, 3), "gain": (8,)}
    assert SPEC.output_shapes(dims) == {"mixed": (7, 8), "doubled": (14,), "halves": (4, 6), "gain_out": (8,)}
    with pytest.raises(EngineError, match=r"A size is needed for 'columns', got sizes for \['rows'\] only"):
        SPEC.output_shapes({"rows": 7})


def test_profile() -> None:
    assert SPEC.profile()["patches"] == ((1, 4, 3), (1, 6, 3), (1, 18, 3))
    assert SPEC.profile()["gain"] == ((8,), (8,), (8,))


def test_dynamic_shapes() -> None:
    shapes = SPEC.dynamic_shapes()
    assert list(shapes) == ["values", "ids", "patches", "gain"]
    assert shapes["values"][0] is shapes["ids"][0]
    assert (shapes["values"][0].min, shapes["values"][0].max) == (2, 16)
    assert shapes["patches"][1].__name__ == "2*columns"
    assert shapes["gain"] == {}


def test_a_symbol_of_one_size_is_not_dynamic() -> None:
    spec = spec_of((TensorSpec("x", "float32", ("n", "m")),), dims={"n": Dim(3, 3, 3), "m": Dim(1, 2, 3)})
    assert list(spec.dynamic_shapes()["x"]) == [1]


@pytest.mark.parametrize("dtype", list(TORCH_DTYPES))
def test_every_dtype(dtype: str) -> None:
    spec = spec_of((TensorSpec("x", dtype, (2,)),))
    assert spec.check_inputs({"x": torch.zeros(2).to(getattr(torch, dtype))}) == {}
    other = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(EngineError, match=rf'"x" must be {dtype} \[2\], got float64 \[2\]'):
        spec.check_inputs({"x": other})


def test_scalar() -> None:
    spec = spec_of((TensorSpec("x", "float32", ()),))
    assert spec.check_inputs({"x": torch.tensor(1.0)}) == {}
    with pytest.raises(EngineError, match=r'"x" must be float32 \[\], got float32 \[1\]'):
        spec.check_inputs({"x": torch.tensor([1.0])})


def test_json_round_trip() -> None:
    text = json.dumps(SPEC.to_json())
    assert EngineSpec.from_json(json.loads(text)) == SPEC


@pytest.mark.parametrize(
    "data",
    [
        {},
        SPEC.to_json() | {"dims": {"rows": [1, 2]}},
        SPEC.to_json() | {"dims": None},
        SPEC.to_json() | {"inputs": [{"name": "x"}]},
        SPEC.to_json() | {"inputs": [{"name": "x", "dtype": "float32", "shape": None}]},
    ],
)
def test_json_of_another_form(data: dict[str, object]) -> None:
    with pytest.raises(EngineError, match="An engine spec in JSON needs name, inputs, outputs and dims"):
        EngineSpec.from_json(data)


@pytest.mark.parametrize("bounds", [(0, 1, 2), (2, 1, 3), (1, 4, 3)])
def test_dim_upside_down(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(EngineError, match="1 <= min <= opt <= max"):
        Dim(*bounds)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        ("", "float32", (1,), "needs a name"),
        ("x", "float64", (1,), "must have a dtype of .*, got 'float64'"),
        ("x", "float32", (-1,), "must have integer sizes >= 0, got -1"),
        ("x", "float32", (1.5,), r"must have integer sizes >= 0, got 1\.5"),
        ("x", "float32", ("n+1",), r"must be a name or \"<int>\*<name>\", got 'n\+1'"),
        ("x", "float32", ("0*n",), r"got '0\*n'"),
        ("x", "float32", ("n*2",), r"got 'n\*2'"),
    ],
)
def test_tensor_spec_that_makes_no_sense(name: str, dtype: str, shape: tuple[int | str, ...], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        TensorSpec(name, dtype, shape)


X = TensorSpec("x", "float32", ("n",))


@pytest.mark.parametrize(
    ("inputs", "outputs", "dims", "message"),
    [
        ((X,), (), {}, r'"x" uses \[\'n\'\] without a range'),
        ((X, X), (), {"n": Dim(1, 1, 1)}, '"x" is there twice'),
        ((X,), (X,), {"n": Dim(1, 1, 1)}, '"x" is there twice'),
        (
            (X,),
            (TensorSpec("y", "float32", ("2*m",)),),
            {"n": Dim(1, 1, 1), "m": Dim(1, 1, 1)},
            r'output "y" uses \[\'m\'\], which no input has',
        ),
    ],
)
def test_engine_spec_that_makes_no_sense(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], dims: dict[str, Dim], message: str
) -> None:
    with pytest.raises(EngineError, match=f"Engine small: .*{message}"):
        spec_of(inputs, outputs, dims)


def test_a_spec_keeps_its_own_dims() -> None:
    dims = {"n": Dim(1, 2, 3)}
    spec = spec_of((X,), dims=dims)
    dims.clear()
    assert spec.check_inputs({"x": torch.zeros(2)}) == {"n": 2}
    assert hash(spec) == hash(spec_of((X,), dims={"n": Dim(1, 2, 3)}))
