"""The declaration: what is refused and with which words, what the registry gives, and that every op's record is consistent."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from leadline.golden.draw import DRAWS, INTEGERS, draw_case
from leadline.golden.precision import PRECISIONS
from leadline.ref import OPS, Op, op_named
from leadline.ref.op import Tensor, bind, check_attr, declare, extent, parse

NAMES = list(OPS)
FLOAT = np.float32


def example(name: str, holds: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The smallest declared case of an op, of those that give an optional input: inputs and attributes"""
    op = OPS[name]
    case = min((c for c in op.cases if not holds or holds in c.draw), key=lambda c: np.prod(list(c.dims.values())))
    return draw_case(op, case, "forward", PRECISIONS["fp32"]), dict(case.attrs)


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def assert_says(text: str, *parts: str) -> None:
    """The message names the argument, its value and what was expected."""
    assert all(part in text for part in (*parts, "expected")), text


INPUTS = [(name, tensor) for name in NAMES for tensor in OPS[name].inputs]
CLASHES = [
    (name, tensor)
    for name, tensor in INPUTS
    if tensor.dims and any(other is not tensor and tensor.dims[-1] in other.dims for other in OPS[name].inputs if not other.optional)
]


def ids(pairs: list[tuple[str, Tensor]]) -> list[str]:
    return [f"{name}-{tensor.name}" for name, tensor in pairs]


@pytest.mark.parametrize(("name", "tensor"), INPUTS, ids=ids(INPUTS))
def test_wrong_rank_is_refused(name: str, tensor: Tensor) -> None:
    """An array of another rank: its name, its shape and the declared letters."""
    inputs, attrs = example(name, tensor.name)
    inputs[tensor.name] = inputs[tensor.name][..., None]
    assert_says(
        message(lambda: OPS[name].run("forward", inputs, attrs)), tensor.name, str(inputs[tensor.name].shape), f"[{','.join(tensor.dims)}]"
    )


@pytest.mark.parametrize(("name", "tensor"), CLASHES, ids=ids(CLASHES))
def test_letters_that_disagree_are_refused(name: str, tensor: Tensor) -> None:
    """A size that another array's letter contradicts: the shape, the letter and its value."""
    inputs, attrs = example(name, tensor.name)
    inputs[tensor.name] = np.concatenate([inputs[tensor.name]] * 2, axis=-1)
    text = message(lambda: OPS[name].run("forward", inputs, attrs))
    assert_says(text, "has shape", f"{tensor.dims[-1]} = ")


@pytest.mark.parametrize(("name", "tensor"), INPUTS, ids=ids(INPUTS))
def test_wrong_dtype_is_refused(name: str, tensor: Tensor) -> None:
    """Integers for numbers, numbers for codes: the array's name and its dtype."""
    inputs, attrs = example(name, tensor.name)
    wrong = np.int32 if inputs[tensor.name].dtype.kind == "f" else FLOAT
    inputs[tensor.name] = np.zeros(inputs[tensor.name].shape, wrong)
    assert_says(message(lambda: OPS[name].run("forward", inputs, attrs)), tensor.name, np.dtype(wrong).name)


CODES = [(name, tensor) for name, tensor in INPUTS if tensor.kind == "code"]


@pytest.mark.parametrize(("name", "tensor"), CODES, ids=ids(CODES))
def test_codes_of_another_width_are_refused(name: str, tensor: Tensor) -> None:
    """uint16 for codes of 8 bits and the reverse."""
    inputs, attrs = example(name)
    codes = inputs[tensor.name]
    other = np.uint8 if codes.dtype == np.uint16 else np.uint16
    wrong = {**inputs, tensor.name: codes.astype(other)}
    assert_says(message(lambda: OPS[name].run("forward", wrong, attrs)), tensor.name, np.dtype(other).name)


@pytest.mark.parametrize(("name", "tensor"), INPUTS, ids=ids(INPUTS))
def test_lists_and_missing_arrays_are_refused(name: str, tensor: Tensor) -> None:
    """A list instead of an array, and no array at all: the name, what came, and the shape that was expected."""
    inputs, attrs = example(name, tensor.name)
    plain = inputs[tensor.name].tolist()
    listed = {**inputs, tensor.name: plain}
    assert_says(message(lambda: OPS[name].fwd(**listed, **attrs)), tensor.name, type(plain).__name__, f"[{','.join(tensor.dims)}]")
    if tensor.optional:
        return
    rest = {k: x for k, x in inputs.items() if k != tensor.name}
    assert_says(message(lambda: OPS[name].fwd(**rest, **attrs)), f"{tensor.name} is missing", f"[{','.join(tensor.dims)}]")


ATTRIBUTES = [(name, attr) for name in NAMES for attr in OPS[name].attrs]


@pytest.mark.parametrize(("name", "attr"), ATTRIBUTES, ids=[f"{n}-{a}" for n, a in ATTRIBUTES])
def test_wrong_attributes_are_refused(name: str, attr: str) -> None:
    """A value of another type, or one that is not among the options: the attribute's name, the value, and what may stand there."""
    inputs, attrs = example(name)
    expected = OPS[name].attrs[attr].annotation
    wrong = {bool: (1, "yes", None), int: (1.0, "1", True, None), float: (True, "1e-6", None), (float | None): (True, "1e-6")}.get(
        expected, ("nonsense", None, True, 7)
    )
    for value in wrong:
        assert_says(message(lambda value=value: OPS[name].fwd(**inputs, **{**attrs, attr: value})), attr, repr(value))


def test_integers_pass_for_floats() -> None:
    """eps=1 is a float to a reader; eps=True is not."""
    inputs, _ = example("rmsnorm")
    whole, real = (OPS["rmsnorm"].fwd(**inputs, eps=eps)[0] for eps in (1, 1.0))
    np.testing.assert_array_equal(whole, real)


@pytest.mark.parametrize(
    ("attrs", "parts"),
    [
        ({"n_group": 3}, ("n_group is 3", "16 experts")),
        ({"n_group": 0}, ("n_group is 0",)),
        ({"topk_group": 5}, ("topk_group is 5", "n_group = 4")),
        ({"topk_group": 0}, ("topk_group is 0",)),
        ({"n_group": 16, "topk_group": 8}, ("n_group is 16", "two experts")),
        ({"k": 9}, ("k is 9", "1 to 8")),
        ({"k": 0}, ("k is 0",)),
        ({"k": 17, "n_group": 1, "topk_group": 1}, ("k is 17", "1 to 16")),
    ],
)
def test_router_refuses_impossible_groups(attrs: dict[str, int], parts: tuple[str, ...]) -> None:
    """Groups that do not divide the experts, more groups or experts than there are: the attribute, its value, the range."""
    logits, bias = np.zeros((2, 16), FLOAT), np.zeros(16, FLOAT)
    assert_says(message(lambda: OPS["router.noaux_tc"].fwd(logits, bias, **{"k": 4, "n_group": 4, "topk_group": 2, **attrs})), *parts)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_router_refuses_what_is_not_finite(value: float) -> None:
    """NaN and infinities in logits or bias: the array and the first index."""
    logits, bias = np.zeros((3, 16), FLOAT), np.zeros(16, FLOAT)
    logits[1, 5] = logits[2, 0] = value
    op = OPS["router.noaux_tc"]
    assert_says(message(lambda: op.fwd(logits, bias, k=2)), "logits[1, 5]")
    bias[[7, 9]] = value
    assert_says(message(lambda: op.fwd(np.zeros((3, 16), FLOAT), bias, k=2)), "bias[7]")


def test_quantize_refuses_nan_and_empty_tiles() -> None:
    """NaN in x: the first index; tile < 1: its value."""
    x = np.zeros((3, 8), FLOAT)
    assert_says(message(lambda: OPS["fp8.quantize_tile"].fwd(x, tile=0)), "tile is 0")
    x[1, 2] = x[2, 1] = np.nan
    for axis in (0, 1):
        assert_says(message(lambda axis=axis: OPS["fp8.quantize_tile"].fwd(x, axis=axis)), "x[1, 2]")


def test_dequantize_refuses_scales_of_another_shape() -> None:
    """A scale that does not belong to the codes' tiles: its shape and the one that was expected."""
    codes, scale = np.zeros((3, 300), np.uint8), np.ones((3, 2), FLOAT)
    assert_says(message(lambda: OPS["fp8.dequantize_tile"].fwd(codes, scale)), "(3, 2)", "(3, 3)")


def test_rmsnorm_refuses_negative_eps() -> None:
    """eps < 0: its value."""
    inputs, _ = example("rmsnorm")
    assert_says(message(lambda: OPS["rmsnorm"].fwd(**inputs, eps=-1e-6)), "eps is -1e-06")


def test_a_missing_backward_is_named() -> None:
    """run("backward") of an op that has none."""
    inputs, attrs = example("cast.bf16")
    assert_says(message(lambda: OPS["cast.bf16"].run("backward", inputs, attrs)), "cast.bf16", "no backward")


@pytest.mark.parametrize("name", NAMES)
def test_near_names_are_offered(name: str) -> None:
    """A name that is nearly right gets the right one among the suggestions; one that is right gets its op."""
    assert op_named(name) is OPS[name]
    wrong = name[:-1] + ("y" if name.endswith("x") else "x")
    text = message(lambda: op_named(wrong))
    assert wrong in text
    assert "did you mean" in text
    assert name in text or name.rsplit(".", 1)[-1] in text


def test_hopeless_names_get_the_list() -> None:
    """A name like no other is sent to the list of ops."""
    assert "leadline ops" in message(lambda: op_named("qqqqqqqq"))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_declared_once(name: str) -> None:
    """Declaring an op again is refused, and changes nothing."""
    before = OPS[name]
    assert f"{name} is declared twice" in message(lambda: declare(OPS[name]))
    assert OPS[name] is before


def test_signatures_are_read_as_written() -> None:
    """Names, dimensions and kinds, in order; an unknown kind is refused."""
    inputs, outputs = parse("logits[n,e] bias[e]:const -> topk_idx[n,k]:index scale[n,d/tile]:exact")
    assert inputs == (Tensor("logits", ("n", "e"), "real"), Tensor("bias", ("e",), "const"))
    assert outputs == (Tensor("topk_idx", ("n", "k"), "index"), Tensor("scale", ("n", "d/tile"), "exact"))
    assert outputs[1].shape({"n": 3, "d": 257, "tile": 128}) == (3, 3)
    assert [extent(dim, {"d": 256, "tile": 128}) for dim in ("d", "d/tile", "d/3", "7")] == [256, 2, 86, 7]
    assert_says(message(lambda: parse("x[n]:sharp -> y[n]")), "x", "exact")


def test_bind_gives_the_letters() -> None:
    """Arrays in, the value of every letter out."""
    tensors = OPS["rmsnorm"].inputs
    assert bind("rmsnorm", tensors, {"x": np.zeros((3, 5)), "weight": np.zeros(5)}) == {"n": 3, "d": 5}


def test_attributes_are_checked_by_their_annotation() -> None:
    """An annotation that is none of Literal, bool, int and float lets everything pass."""
    parameter = inspect.Parameter("scale", inspect.Parameter.KEYWORD_ONLY, annotation=Any)
    check_attr("op", parameter, object())


@pytest.mark.parametrize("name", NAMES)
def test_signature_of_backward(name: str) -> None:
    """Backward takes the forward's inputs, its decision if it makes one, and d<output> of each real output; it returns d<input> of each
    real input, in their order and shape."""
    op = OPS[name]
    assert op.signature_of("forward") == (op.inputs, op.outputs)
    inputs, outputs = op.signature_of("backward")
    assert inputs[: len(op.inputs)] == op.inputs
    chosen = [t.name for t in op.outputs if op.choice and t.name == op.choice[0]]
    assert [t.name for t in inputs[len(op.inputs) :]] == chosen + [f"d{t.name}" for t in op.outputs if t.kind == "real"]
    assert [(t.name, t.dims) for t in outputs] == [(f"d{t.name}", t.dims) for t in op.inputs if t.kind == "real"]


def directions(op: Op) -> tuple[str, ...]:
    return ("forward", "backward") if op.bwd else ("forward",)


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_begin_with_the_equation(name: str) -> None:
    """Forward and backward have docstrings whose first line is an equation, and the record names its source."""
    op = OPS[name]
    for function in filter(None, (op.fwd, op.bwd)):
        text = inspect.getdoc(function)
        assert text, function
        assert "=" in text.splitlines()[0]
    assert op.source
    assert op.flops


@pytest.mark.parametrize("name", NAMES)
def test_cases_fit_the_signature(name: str) -> None:
    """Every case has a name of its own, knows every array that has to be drawn by a known draw, gives a value to every letter, overrides
    attributes that exist, and runs: outputs have the declared shapes."""
    op = OPS[name]
    assert len({case.name for case in op.cases}) == len(op.cases) > 0
    given = {t.name for t in op.outputs}
    for case in op.cases:
        for direction in directions(op):
            inputs, outputs = op.signature_of(direction, case.draw)
            letters = {**op.defaults, **case.attrs, **case.dims}
            drawn = [t.name for t in inputs if t.name not in given]
            assert set(drawn) <= set(case.draw)
            arrays = draw_case(op, case, direction, PRECISIONS["fp32"])
            assert {n: x.shape for n, x in arrays.items()} == {t.name: t.shape(letters) for t in inputs}
            with np.errstate(all="ignore"):
                results = op.run(direction, arrays, case.attrs)
            if case.attrs.get("axis", 1) == 1:  # the signature writes axis=1's shapes
                known = [t for t in outputs if "x" not in t.dims]  # x: as long as the values make it
                assert {t.name: results[t.name].shape for t in known} == {t.name: t.shape(letters) for t in known}
        assert set(case.attrs) <= set(op.attrs)
        assert set(case.draw) <= {t.name for d in directions(op) for t in op.signature_of(d)[0]}
        assert {spec[0] for spec in case.draw.values()} <= {*DRAWS, *INTEGERS, "codes", "words", "every_bf16", "boundary"}
        tensors = (*op.signature_of("forward", case.draw)[0], *op.outputs)
        assert {d for t in tensors for dim in t.dims for d in dim.split("/") if not d.isdigit()} <= {*case.dims, *op.attrs, "x"}
        assert set(op.vary) <= set(case.dims)
    assert isinstance(eval(op.flops, {}, {**op.defaults, **op.cases[0].dims}), int | float)  # in the letters and the attributes


@pytest.mark.parametrize("name", NAMES)
def test_attributes_have_defaults_of_their_own_kind(name: str) -> None:
    """Every attribute is annotated, has a default, and the default passes the check."""
    for parameter in OPS[name].attrs.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert parameter.default is not inspect.Parameter.empty
        check_attr(name, parameter, parameter.default)
