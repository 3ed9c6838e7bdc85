"""Checkpoint files: FP8 weights and their scales read, written and dequantised; damaged and ill-fitting files refused by name."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from leadline.golden.cli import main
from leadline.golden.safetensor_file import DTYPES, Reader, Writer
from leadline.golden.weights import Summary, dequantize_file, pair_entries, read_weight, write_pair
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
NORM = "model.norm.weight"


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file of any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def one(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


def checkpoint(path: Path, shape: tuple[int, int] = (576, 300), scale: Any = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A file of one FP8 weight, a bf16 norm and an integer table; returns codes and scales."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E
    if scale is None:
        scale = np.exp2(rng.uniform(-20, 5, [-(-n // 128) for n in shape])).astype(np.float32)
    kind = "F8_E8M0" if scale.dtype == np.uint8 else "F32"
    with Writer(path, [("table", "I64", (3,)), (NORM, "BF16", (5,)), *pair_entries(KV_A, shape, kind)], {"format": "pt"}) as file:
        write_pair(file, KV_A, codes, scale)
        file.write(NORM, np.arange(5, dtype=np.uint16))
        file.write("table", np.array([1, -2, 3]))
    return codes, scale


def decoded(code: int) -> Fraction:
    """The value of an e4m3fn code, from its definition."""
    exponent, mantissa = code >> 3 & 15, code & 7
    value = Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7) if exponent else Fraction(mantissa, 8) * Fraction(2) ** -6
    return -value if code & 0x80 else value


def rounded(value: Fraction, places: int, lowest: int) -> Fraction:
    """value rounded to `places` mantissa bits (nearest, ties to even), with 2^lowest the smallest normal number."""
    if not value:
        return value
    exponent = max(math.floor(math.log2(abs(value))), lowest)
    exponent += abs(value) >= Fraction(2) ** (exponent + 1)
    unit = Fraction(2) ** (exponent - places)
    return round(value / unit) * unit


def test_kv_a_ragged_grid_comes_back_as_code_times_scale_of_its_block(tmp_path: Path) -> None:
    """[576,7168] with scales [5,56]: the last row of blocks is half a block; every product is float32's."""
    codes, scale = checkpoint(tmp_path / "in", (576, 7168))
    assert scale.shape == (5, 56)
    with Reader(tmp_path / "in") as file:
        values = read_weight(file, KV_A)
    assert values.dtype == np.float32
    for i, j in [
        (0, 0),
        (127, 128),
        (128, 127),
        (511, 7040),
        (512, 7039),
        (575, 7167),
        *np.random.default_rng(1).integers(0, 576, (99, 2)),
    ]:
        exact = decoded(int(codes[i, j])) * Fraction(float(scale[i // 128, j // 128]))
        assert float(values[i, j]) == float(rounded(exact, 23, -126))


def bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@pytest.mark.parametrize("width", [300, 7168])
def test_dequantize_rounds_the_float32_product_to_bf16_once_more_and_passes_all_else_through(tmp_path: Path, width: int) -> None:
    """The whole file, of one piece or of several: weight in bf16, no scales, other tensors and metadata byte for byte."""
    codes, scale = checkpoint(tmp_path / "in", (576, width))
    status = dequantize_file(tmp_path / "in", tmp_path / "out")
    sizes = [(tmp_path / name).stat().st_size for name in ("in", "out")]
    assert status == Summary(1, 2, *sizes)
    with Reader(tmp_path / "in") as before, Reader(tmp_path / "out") as file:
        assert set(file.keys()) == {KV_A, NORM, "table"}
        assert file.metadata == {"format": "pt"}
        assert file.entry(KV_A)[:2] == ("BF16", (576, width))
        for name in (NORM, "table"):
            assert file.entry(name)[:2] == before.entry(name)[:2]
            assert file.raw(name).tobytes() == before.raw(name).tobytes()
        values = bf16(file.array(KV_A))
        assert np.array_equal(read_weight(file, KV_A), values)
    dequantize_file(tmp_path / "in", tmp_path / "wide", dtype="fp32")
    with Reader(tmp_path / "wide") as file:
        wide = file.array(KV_A)
    for i, j in np.random.default_rng(2).integers(0, [576, width], (2000, 2)):
        product = rounded(decoded(int(codes[i, j])) * Fraction(float(scale[i // 128, j // 128])), 23, -126)
        assert float(wide[i, j]) == float(product)
        assert float(values[i, j]) == float(rounded(product, 7, -126))
    with safe_open(tmp_path / "out", framework="numpy") as file:
        assert set(file.keys()) == {KV_A, NORM, "table"}


def test_dequantize_rounds_ties_to_even_and_keeps_nan_infinity_and_the_sign_of_zero(tmp_path: Path) -> None:
    """Hand-made products: 1 + 2^-8 is half way between two bf16 numbers, 1 + 3 * 2^-8 too; 448 * 2^120 is beyond float32."""
    ones, negative_zero, nan = 0x38, 0x80, 0x7F
    codes = np.full((512, 2), ones, np.uint8)
    codes[0, 1], codes[128, 1], codes[384, 1] = negative_zero, nan, 0xFE
    scale = np.array([[1 + 2**-8], [1 + 3 * 2**-8], [1e-45], [2.0**120]], np.float32)
    with Writer(tmp_path / "in", pair_entries("w", codes.shape)) as file:
        write_pair(file, "w", codes, scale)
    dequantize_file(tmp_path / "in", tmp_path / "out")
    dequantize_file(tmp_path / "in", tmp_path / "out32", dtype="fp32")
    with Reader(tmp_path / "out") as file:
        bits = file.array("w")
    assert [hex(v) for v in bits[[0, 128, 256, 384], 0]] == ["0x3f80", "0x3f82", "0x0", "0x7b80"]
    assert [hex(v) for v in bits[[0, 128, 384], 1]] == ["0x8000", "0x7fc0", "0xff80"]
    with Reader(tmp_path / "out32") as file:
        values = file.array("w")
    assert values.dtype == np.float32
    assert values[256, 0] == np.float32(1e-45)
    assert math.isnan(values[128, 1])
    assert values[384, 1] == -math.inf


def test_e8m0_scales_are_powers_of_two(tmp_path: Path) -> None:
    """A byte b is 2^(b-127), the smallest a subnormal of float32; 255 is NaN and refused."""
    codes, _ = checkpoint(tmp_path / "in", (129, 130), np.array([[127, 130], [0, 254]], np.uint8))
    with Reader(tmp_path / "in") as file:
        values = read_weight(file, KV_A)
    for i, j, power in [(0, 0, 0), (127, 128, 3), (128, 0, -127), (128, 129, 127)]:
        exact = float(decoded(int(codes[i, j])) * Fraction(2) ** power)
        assert values[i, j] == np.float32(exact)
    with pytest.raises(ValueError, match=r"_scale_inv' is nan at \[1, 0\]; expected finite scales above zero"):
        checkpoint(tmp_path / "in", (129, 130), np.array([[127, 130], [255, 255]], np.uint8))


@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_scale_that_is_none_is_refused_with_its_tensor_and_first_index(tmp_path: Path, bad: float) -> None:
    """When writing a pair, reading a weight and dequantising a file, of which nothing is written then."""
    codes, scale = checkpoint(tmp_path / "in")
    scale[2, 1] = scale[4, 0] = bad
    with pytest.raises(ValueError, match=r"is .* at \[2, 1\]; expected finite"):
        checkpoint(tmp_path / "other", scale=scale)
    with Writer(tmp_path / "in", pair_entries("w", codes.shape)) as file:
        file.write("w", codes)
        file.write("w_scale_inv", scale)
    with Reader(tmp_path / "in") as file, pytest.raises(ValueError, match=r"'w_scale_inv' is .* at \[2, 1\]; expected finite"):
        read_weight(file, "w")
    with pytest.raises(ValueError, match=r"in: 'w_scale_inv' is .* at \[2, 1\]; expected finite scales above zero"):
        dequantize_file(tmp_path / "in", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def pair(codes: str, shape: tuple[int, ...], scales: str, grid: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [("w", codes, shape), ("w_scale_inv", scales, grid)]


WRONG = {
    "transposed": (pair("F8_E4M3", (576, 256), "F32", (2, 5)), r"'w_scale_inv' has shape \[2, 5\]; expected \[5, 2\].*'w' \[576, 256\]"),
    "one row short": (pair("F8_E4M3", (576, 256), "F32", (4, 2)), r"'w_scale_inv' has shape \[4, 2\]; expected \[5, 2\]"),
    "flat": (pair("F8_E4M3", (576, 256), "F32", (10,)), r"has shape \[10\]; expected \[5, 2\]"),
    "no scale": ([("w", "F8_E4M3", (576, 256))], "'w' has no 'w_scale_inv'"),
    "no weight": ([("w_scale_inv", "F32", (5, 2))], "'w_scale_inv' scales nothing; expected 'w'"),
    "codes e5m2": (pair("F8_E5M2", (9, 9), "F32", (1, 1)), "'w' has dtype F8_E5M2; expected F8_E4M3"),
    "codes bf16": (pair("BF16", (9, 9), "F32", (1, 1)), "'w' has dtype BF16; expected F8_E4M3"),
    "scale bf16": (pair("F8_E4M3", (9, 9), "BF16", (1, 1)), "'w_scale_inv' has dtype BF16; expected F32 or F8_E8M0"),
    "three dimensions": (pair("F8_E4M3", (1, 9, 9), "F32", (1, 1, 1)), r"'w' has shape \[1, 9, 9\]; expected two dimensions"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_pair_that_does_not_fit_is_refused_by_name_and_nothing_is_written(tmp_path: Path, wrong: str) -> None:
    """Also the second of two weights."""
    tensors, message = WRONG[wrong]
    with Writer(tmp_path / "in", [*pair_entries("a", (3, 3)), *tensors]) as file:
        write_pair(file, "a", np.ones((3, 3), np.uint8), np.ones((1, 1), np.float32))
        for name, dtype, shape in tensors:
            file.write(name, np.ones(shape, DTYPES[dtype]))
    with pytest.raises(ValueError, match=message):
        dequantize_file(tmp_path / "in", tmp_path / "out")
    if "no weight" not in wrong:
        with Reader(tmp_path / "in") as file, pytest.raises(ValueError, match=message):
            read_weight(file, tensors[0][0])
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_read_weight_reads_floats_of_any_width_and_refuses_integers(tmp_path: Path) -> None:
    """What a model needs besides FP8."""
    want = np.array([1.5, -0.25], np.float32)
    halves = want.astype(np.float16)
    with Writer(tmp_path / "in", [("f", "F32", (2,)), ("h", "F16", (2,)), ("b", "BF16", (2,)), ("i", "I32", (2,))]) as file:
        for name, values in (
            ("f", want),
            ("h", halves),
            ("b", (want.view(np.uint32) >> 16).astype(np.uint16)),
            ("i", np.ones(2, np.int32)),
        ):
            file.write(name, values)
    with Reader(tmp_path / "in") as file:
        for name in "fhb":
            assert np.array_equal(read_weight(file, name), want)
        with pytest.raises(ValueError, match="'i' has dtype I32"):
            read_weight(file, "i")
        with pytest.raises(ValueError, match="'x' is not in the file"):
            read_weight(file, "x")


def test_files_of_the_safetensors_package_are_read_and_ours_are_read_by_it(tmp_path: Path) -> None:
    """Both ways, with zero-dimensional and empty tensors, odd sizes before wide ones, and names beyond ASCII."""
    kinds = ["bool", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8"]
    arrays = {f"{kind} {shape} é": np.ones(shape, kind) for kind in kinds for shape in ((), (0, 3), (3,), (2, 1, 5))}
    save_file(arrays, tmp_path / "theirs", {"é": "x"})
    with Reader(tmp_path / "theirs") as file:
        assert file.metadata == {"é": "x"}
        assert set(file.keys()) == set(arrays)
        for name, x in arrays.items():
            assert file.array(name).dtype == x.dtype
            assert file.array(name).shape == x.shape
            assert np.array_equal(file.array(name), x)
        entries = [(name, file.entry(name).dtype, file.entry(name).shape) for name in arrays]
    with Writer(tmp_path / "ours", entries) as out:
        for name, x in arrays.items():
            out.write(name, x)
    loaded = load_file(tmp_path / "ours")
    assert set(loaded) == set(arrays)
    assert all(np.array_equal(loaded[n], x) and loaded[n].shape == x.shape for n, x in arrays.items())
    with Reader(tmp_path / "ours") as file:
        assert all(file.array(n).flags.aligned for n in arrays)


@pytest.mark.peers("torch")
def test_torch_reads_our_fp8_and_bf16_and_we_read_torchs(tmp_path: Path) -> None:
    """float8_e4m3fn and bfloat16, bit for bit; and torch's own arithmetic makes the same bf16 weights."""
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    codes, scale = checkpoint(tmp_path / "ours", (1300, 4097))
    theirs = load_torch(tmp_path / "ours")
    assert theirs[KV_A].dtype == torch.float8_e4m3fn
    assert np.array_equal(theirs[KV_A].view(torch.uint8).numpy(), codes)
    assert theirs[NORM].dtype == torch.bfloat16
    save_torch(theirs, tmp_path / "theirs", {"format": "pt"})
    with Reader(tmp_path / "theirs") as file:
        assert np.array_equal(file.array(KV_A), codes)
        assert np.array_equal(file.array(KV_A + "_scale_inv"), scale)
    dequantize_file(tmp_path / "theirs", tmp_path / "out")
    blocks = theirs[KV_A + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:1300, :4097]
    assert torch.equal(load_torch(tmp_path / "out")[KV_A], (theirs[KV_A].float() * blocks).bfloat16())


def test_arrays_outlive_their_file_and_are_not_copies(tmp_path: Path) -> None:
    """A view of the map, read-only; still there after close; a closed file says so."""
    codes, _ = checkpoint(tmp_path / "in")
    with Reader(tmp_path / "in") as file:
        view = file.array(KV_A)
        assert not view.flags.owndata
        assert not view.flags.writeable
        file.release(KV_A)
        assert np.array_equal(view, codes)
    assert np.array_equal(view, codes)
    with pytest.raises(ValueError, match="is closed"):
        file.array(KV_A)


HEADERS = {
    "not JSON": (b"{nonsense", "damaged header"),
    "a list": (b"[]", "starts with '\\['"),
    "a space first": (b' {"a":1}', "starts with ' '"),
    "not UTF-8": (b'{"\xff":1}', "damaged header"),
    "half a surrogate pair": (b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "damaged header"),
    "UTF-16": (json.dumps(one()).encode("utf-16"), "damaged header"),
    "nested too deep": (b'{"a":' + b"[" * 200_000, "damaged header"),
    "duplicate": (json.dumps({**one(), "b": 1}).replace('"b"', '"a"').encode(), "'a' twice"),
    "duplicate field": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', "'dtype' twice"),
    "digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', "beyond 64 bits"),
    "entry no object": ({"a": 3}, "'a' is 3; expected an object"),
    "field missing": ({"a": {"dtype": "U8", "shape": [4]}}, "expected an object of dtype, shape and data_offsets"),
    "field too many": (one(more=1), "expected an object of dtype"),
    "dtype": (one("F8_E4M4"), "has dtype 'F8_E4M4'; expected one of BOOL"),
    "dtype no string": (one(["U8"]), r"has dtype \['U8'\]"),
    "shape no list": (one(shape=4), "has shape 4; expected a list"),
    "shape negative": (one(shape=[-4]), r"has shape \[-4\]"),
    "shape float": (one(shape=[4.0]), r"has shape \[4.0\]"),
    "shape NaN": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', r"has shape \[nan\]"),
    "shape bool": (one(shape=[True, 4]), r"has shape \[True, 4\]"),
    "shape huge": (one(shape=[10**18] * 40), r"has 4 bytes; expected a whole number of bytes, below 2\^63"),
    "size": (one("F32"), r"'a' has 4 bytes; expected 16 bytes for F32 of shape \[4\]"),
    "part of a byte": (one("F4", [3], [0, 4]), "expected a whole number of bytes"),
    "offsets three": (one(offsets=[0, 4, 4]), r"has data_offsets \[0, 4, 4\]; expected two"),
    "offsets negative": (one(offsets=[-4, 0]), "expected two integers of at least 0"),
    "offsets backward": (one(offsets=[4, 0]), r"has data_offsets \[4, 0\]; expected a range within the 4"),
    "offsets beyond": (one(offsets=[4, 8]), r"has data_offsets \[4, 8\]; expected a range within the 4"),
    "metadata": ({"__metadata__": {"a": 1}, **one()}, "'__metadata__' is {'a': 1}; expected a JSON object of strings"),
    "overlap": ({**one(), "b": one()["a"]}, "'b' starts at byte 0 of the data; expected 4"),
    "hole before": (one(shape=[3], offsets=[1, 4]), "'a' starts at byte 1 of the data; expected 0"),
    "hole after": (one(shape=[3], offsets=[0, 3]), "has 4 bytes of data; expected the 3"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", HEADERS)
def test_a_damaged_header_is_refused_with_the_file_what_was_found_and_what_was_expected(tmp_path: Path, wrong: str) -> None:
    """One fault each, in a file that is sound without it."""
    Reader(raw_file(tmp_path / "sound", one(), b"1234"))
    header, message = HEADERS[wrong]
    path = raw_file(tmp_path / "damaged", header, b"1234")
    with pytest.raises(ValueError, match=message) as caught:
        Reader(path)
    assert type(caught.value) is ValueError  # a subclass would come out of the command line as a traceback
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_tensors_that_numpy_cannot_hold_are_refused_by_name_not_by_a_crash(tmp_path: Path) -> None:
    """More dimensions than NumPy has, sizes that overflow although one is zero, elements smaller than a byte."""
    header = {"a": one("U8", [1] * 99, [0, 1])["a"], "b": one("U8", [0, 2**62, 2**62], [1, 1])["a"]}
    header["c"] = one("F4", [2], [1, 2])["a"]
    with Reader(raw_file(tmp_path / "in", header, b"12")) as file:
        for name in "abc":
            with pytest.raises(ValueError, match=f"'{name}' has"):
                file.array(name)
        assert file.raw("c").tobytes() == b"2"
    dequantize_file(tmp_path / "in", tmp_path / "out")
    with Reader(tmp_path / "out") as file:
        assert [file.raw(n).tobytes() for n in "abc"] == [b"1", b"", b"2"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Empty, shorter than its header says, a pipe (which would wait for ever), a directory; a target that is no file."""
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes((100).to_bytes(8, "little") + b"{}")
    (tmp_path / "long").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("empty", "has 0 bytes"), ("short", "header of 100 bytes; expected at most 2"), ("long", "expected at most 2")):
        with pytest.raises(ValueError, match=message):
            Reader(tmp_path / name)
    with pytest.raises(ValueError, match="is no regular file"):
        Reader(tmp_path / "pipe")
    with pytest.raises(OSError, match="directory"):
        Reader(tmp_path)
    checkpoint(tmp_path / "in")
    for target in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="is no regular file; expected a file to replace"):
            dequantize_file(tmp_path / "in", target)
    with pytest.raises(ValueError, match=r"there is no .*nowhere; expected a directory"):
        dequantize_file(tmp_path / "in", tmp_path / "nowhere" / "out")


def write_all(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], values: dict[str, np.ndarray]) -> None:
    with Writer(path, tensors) as file:
        for name, x in values.items():
            file.write(name, x)


def test_a_writer_refuses_what_does_not_fit_and_leaves_nothing(tmp_path: Path) -> None:
    """A tensor missing, of another shape or dtype, too long, too short, unknown; a name twice."""
    path = tmp_path / "out"
    tensors = [("a", "BF16", (2, 3)), ("b", "F32", ())]
    a, b = np.zeros((2, 3), np.uint16), np.array(1, np.float32)
    for values, message in (
        ({"a": a}, "'b' was not written"),
        ({"a": a.T, "b": b}, r"'a' is uint16 of shape \(3, 2\); expected uint16 of shape \(2, 3\) for BF16"),
        ({"a": a.view(np.int16)}, "'a' is int16"),
        ({"c": b}, "'c' cannot be written"),
    ):
        with pytest.raises(ValueError, match=message):
            write_all(path, tensors, values)
    for parts, message in (([a, a[:1]], "gets more than its 12"), ([a[:1]], "lacks 6 of its 12")):
        with pytest.raises(ValueError, match=message), Writer(path, tensors) as file:
            list(file.stream("a", parts))
    for wrong in ([("a", "U8", (1,))] * 2, [("__metadata__", "U8", (1,))], [("a", "F9", ())], [("a", "U8", (-1,))], [("a", "F4", (1,))]):
        with pytest.raises(ValueError, match=r"'a'|'__metadata__'"):
            Writer(path, wrong)
    with pytest.raises(ValueError, match="expected strings by strings"):
        Writer(path, tensors, {"a": 1})  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_without_nameless_files_a_temporary_one_serves_and_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems without O_TMPFILE: the same file on success, nothing after an exception."""
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    with Writer(tmp_path / "out", [("a", "U8", (2,))]) as file:
        assert [p.suffix for p in tmp_path.iterdir()] == [".part"]
        file.write("a", np.zeros(2, np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out2", [("a", "U8", (2,))]):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    """progress raises at its second call: no new file, and an old target untouched; without it the target is replaced."""
    checkpoint(tmp_path / "in")
    for old in (None, b"the old one"):
        if old is not None:
            (tmp_path / "out").write_bytes(old)
        calls = []

        def stop(done: int, total: int, name: str, calls: list = calls) -> None:
            calls.append((done, total, name))
            if len(calls) == 2:
                raise error

        with pytest.raises(error):
            dequantize_file(tmp_path / "in", tmp_path / "out", progress=stop)
        assert 0 < calls[1][0] < calls[1][1]
        assert {p.name for p in tmp_path.iterdir()} == {"in"} | ({"out"} if old is not None else set())
        assert old is None or (tmp_path / "out").read_bytes() == old
    calls = []
    dequantize_file(tmp_path / "in", tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls[-1][:2] == (576 * 300 * 2 + 24 + 10,) * 2
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)
    with Reader(tmp_path / "out") as file:
        assert file.entry(KV_A).dtype == "BF16"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_half_file(tmp_path: Path, number: signal.Signals) -> None:
    """The command is stopped in the middle of a file: nothing new is in the directory."""
    if number != signal.SIGINT and not hasattr(os, "O_TMPFILE"):
        pytest.skip("without nameless files, what cannot be caught leaves one")
    checkpoint(tmp_path / "in")
    script = """
        import sys, time
        from leadline.golden import cli
        def update(self, done, total, what):
            if done:
                print("writing", flush=True)
                time.sleep(60)
        cli.Progress.__call__ = update
        cli.main(["dequantize", *sys.argv[1:]])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "in"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert err.strip() == ("leadline: interrupted" if number == signal.SIGINT else "")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_file_takes_the_memory_of_a_few_pieces_not_of_a_tensor(tmp_path: Path) -> None:
    """32 MiB of codes, 64 of results, 64 passed through: less than 8 MiB of arrays at a time."""
    shape = (8192, 4096)
    with Writer(tmp_path / "in", [*pair_entries("w", shape), ("b", "BF16", shape)]) as file:
        write_pair(file, "w", np.zeros(shape, np.uint8), np.ones((64, 32), np.float32))
        file.write("b", np.zeros(shape, np.uint16))
    tracemalloc.start()
    dequantize_file(tmp_path / "in", tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_terminal_sees_a_bar(tmp_path: Path) -> None:
    """On standard error, with the file's name; the summary is on standard output alone."""
    pty = pytest.importorskip("pty")
    checkpoint(tmp_path / "weights")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "leadline.golden.cli", "dequantize", str(tmp_path / "weights"), str(tmp_path / "out")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "150"}, check=True)
    seen = os.read(ours, 1 << 16)
    os.close(ours)
    os.close(theirs)
    assert b"weights" in seen
    assert "━".encode() in seen
    assert done.stdout.startswith(b"1 weights to bf16")


def test_the_command_line_dequantises_and_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    """Exit status 0 with a summary, or 2 and one line on standard error."""

    def leadline(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, ["dequantize", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    source, target = tmp_path / "in", tmp_path / "out"
    checkpoint(source)
    status, out, err = leadline(source, target, "--dtype", "fp32")
    assert (status, err) == (0, "")
    assert out.startswith("1 weights to fp32, 2 tensors unchanged, ")
    with Reader(target) as file:
        assert file.entry(KV_A).dtype == "F32"
    (tmp_path / "link").hardlink_to(source)
    raw_file(tmp_path / "damaged", {"[/]\n": one()["a"]}, b"123")
    raw_file(tmp_path / "markup", {"[/]\n": one()["a"]}, b"1234")
    assert leadline(tmp_path / "markup", target)[0] == 0
    for arguments, message in (
        ((source, source), "is the file to be read"),
        ((source, tmp_path / "link"), "is the file to be read"),
        ((source, target, "--dtype", "fp16"), "dtype is 'fp16'; expected bf16 or fp32"),
        ((tmp_path / "absent", target), "No such file"),
        ((source, tmp_path / "absent" / "out"), "expected a directory"),
        ((tmp_path, target), "Is a directory"),
        ((tmp_path / "damaged", target), r"'[/]\n' has data_offsets [0, 4]"),
        ((source,), "TARGET"),
    ):
        before = target.read_bytes()
        status, out, err = leadline(*arguments)
        assert (status, out) == (2, ""), arguments
        assert err.startswith("leadline: ")
        assert err.count("\n") == 1
        assert message in err
        assert target.read_bytes() == before


def small(path: Path) -> bytes:
    """A sound file of less than a kilobyte, with every kind of tensor that is treated differently."""
    with Writer(
        path, [*pair_entries("a.weight", (3, 130)), *pair_entries("b", (2, 2), "F8_E8M0"), ("n", "BF16", (2,))], {"k": "v"}
    ) as file:
        write_pair(file, "a.weight", np.full((3, 130), 0x38, np.uint8), np.ones((1, 2), np.float32))
        write_pair(file, "b", np.full((2, 2), 0x38, np.uint8), np.full((1, 1), 127, np.uint8))
        file.write("n", np.ones(2, np.uint16))
    dequantize_file(path, path.with_suffix(".out"))
    return path.read_bytes()


def outcome(path: Path) -> bool:
    """Whether a file is dequantised; False if it is refused by a plain ValueError with its name, and no output. Anything else fails."""
    target = path.with_suffix(".out")
    target.unlink(missing_ok=True)
    try:
        dequantize_file(path, target)
    except ValueError as error:
        refusal = error
    else:
        Reader(target).close()
        return True
    assert type(refusal) is ValueError, repr(refusal)
    assert str(path) in str(refusal)
    assert not target.exists()
    return False


def test_ten_thousand_flips_of_a_byte_are_read_or_refused(tmp_path: Path) -> None:
    """Any byte of the file to any other value: never another exception or a crash. In the header almost all are refused."""
    sound = small(tmp_path / "in")
    header = 8 + int.from_bytes(sound[:8], "little")
    draw = random.Random(0)
    read = {True: 0, False: 0}
    with open(tmp_path / "in", "r+b", buffering=0) as file:
        for k in range(10_000):
            at = k % header if k % 2 else draw.randrange(len(sound))
            os.pwrite(file.fileno(), bytes([sound[at] ^ draw.randrange(1, 256)]), at)
            read[at < header] += outcome(tmp_path / "in")
            os.pwrite(file.fileno(), sound[at : at + 1], at)
    assert 0 < read[True] < 1500
    assert read[False] > 2000


def test_a_file_cut_anywhere_or_with_a_byte_too_many_is_refused(tmp_path: Path) -> None:
    """Every length but the right one."""
    sound = small(tmp_path / "in")
    assert outcome(tmp_path / "in")
    (tmp_path / "in").write_bytes(sound + b"\0")
    assert not outcome(tmp_path / "in")
    for n in reversed(range(len(sound))):
        os.truncate(tmp_path / "in", n)
        assert not outcome(tmp_path / "in"), n
