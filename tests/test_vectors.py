"""The vectors on disk: their schema, their provenance, and what damage does."""

import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from leadline.golden.errors import UsageError
from leadline.golden.generate import bless, build, differences, write
from leadline.golden.precision import PRECISIONS
from leadline.golden.vectors import DIRECTORY, STORED, Store, digest, make, plan, read
from leadline.ref import OPS
from oracles import ORACLES

SCHEMA = json.loads((DIRECTORY.parent / "schema" / "vectors.schema.json").read_text())
FILES = [(op, precision) for op in OPS for precision in STORED]


@pytest.mark.parametrize(("op", "precision"), FILES)
def test_stored_vectors_follow_the_written_schema(op: str, precision: str) -> None:
    """Every JSON validates, and every tensor that it speaks of lies beside it."""
    jsonschema.validate(json.loads((DIRECTORY / op / f"{precision}.json").read_text()), SCHEMA)
    vectors = read(DIRECTORY / op / f"{precision}.json", OPS[op], PRECISIONS[precision])
    assert {v.id for v in vectors.values()} == {f"{case.name}/{direction}" for case, direction in plan(OPS[op], PRECISIONS[precision])}


def test_the_schema_refuses_what_it_should() -> None:
    """A vector without flags, and a file of another schema, do not validate."""
    index = json.loads((DIRECTORY / "rmsnorm" / "fp32.json").read_text())
    for change in ({"schema": "leadline.vectors/2"}, {"vectors": [{k: v for k, v in index["vectors"][0].items() if k != "flags"}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**index, **change}, SCHEMA)


def test_all_vectors_are_small() -> None:
    """A clone stays small: under 25 MB in all (72 ops), no op over 1.5 MB."""
    sizes = {folder.name: sum(p.stat().st_size for p in folder.iterdir()) for folder in DIRECTORY.iterdir()}
    assert sum(sizes.values()) < 25e6
    assert max(sizes.values()) < 1.5e6, sizes


def test_a_wrong_reference_is_not_blessed() -> None:
    """The oracle refuses a truth that is off by 1e-9, and codes that are off by one bit."""
    for op, direction, output in (
        ("rmsnorm", "forward", "y"),
        ("router.noaux_tc", "backward", "dlogits"),
        ("encode.e4m3fn", "forward", "codes"),
    ):
        vector = make(OPS[op], OPS[op].cases[1], direction, PRECISIONS["fp32"])
        bless(vector, ORACLES[op, direction])
        truth = vector.band.truth[output]
        vector.band.truth[output] = truth ^ np.uint8(1) if truth.dtype == np.uint8 else truth * (1 + 1e-9)
        with pytest.raises(UsageError, match="disagree"):
            bless(vector, ORACLES[op, direction])


def test_check_finds_a_changed_vector(tmp_path: Path) -> None:
    """A truth, a flag or a case that differs from what the code makes is listed."""
    op, precision = OPS["rmsnorm"], PRECISIONS["fp32"]
    index, arrays = build(op, precision, None)
    write(tmp_path, op, precision, index, arrays)
    assert differences(tmp_path, op, precision, index, arrays) == []
    name = "ragged/forward/y"
    changed = {**arrays, name: arrays[name] * (1 + 1e-9)}
    assert any("values differ" in d for d in differences(tmp_path, op, precision, index, changed))
    flags = {**index, "vectors": [{**index["vectors"][0], "flags": ["other"]}, *index["vectors"][1:]]}
    assert any("flags" in d for d in differences(tmp_path, op, precision, flags, arrays))
    fewer = {**index, "vectors": index["vectors"][1:]}
    assert any("stored, not made" in d for d in differences(tmp_path, op, precision, fewer, arrays))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(DIRECTORY / "rmsnorm", tmp_path / "rmsnorm")
    return tmp_path


def read_all(directory: Path) -> None:
    op, precision = OPS["rmsnorm"], PRECISIONS["fp32"]
    Store(directory).get(op, op.cases[0], "forward", precision)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_truncated_foreign_and_newer_files_are_named(copied: Path) -> None:
    """Whatever happened to a file, the message names it and says what to do."""
    index, tensors = copied / "rmsnorm" / "fp32.json", copied / "rmsnorm" / "fp32.safetensors"
    whole, text = tensors.read_bytes(), index.read_text()
    read_all(copied)
    for damage, expected in (
        (lambda: tensors.write_bytes(whole[: len(whole) // 2]), "SHA-256"),
        (lambda: tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])), "SHA-256"),
        (lambda: tensors.unlink(), "there is no"),
        (lambda: index.write_text(text[: len(text) // 2]), "damaged"),
        (lambda: index.write_text('{"hello": "world"}'), "no vector file"),
        (lambda: index.write_text("[1, 2]"), "no vector file"),
        (lambda: edit(index, schema="leadline.vectors/2"), "newer leadline"),
        (lambda: edit(index, op="cast.bf16"), "expected 'rmsnorm'"),
        (lambda: edit(index, vectors=[{"id": "one/forward"}]), "damaged"),
        (lambda: edit(index, vectors=[]), "has no vector"),
        (lambda: index.unlink(), "there is no vector file"),
    ):
        damage()
        with pytest.raises(UsageError, match=expected) as caught:
            read_all(copied)
        assert str(copied) in str(caught.value)
        tensors.write_bytes(whole)
        index.write_text(text)


def test_digest_counts_shape_dtype_and_bits_but_every_nan_once() -> None:
    """Two NaN patterns have one digest; a transposed, a widened and a sign-flipped array have others."""
    x = np.array([[1.0, np.nan], [0.0, 2.0]], dtype=np.float32)
    other = x.copy()
    other.view(np.uint32)[0, 1] |= 0x80000001
    assert digest(x) == digest(other)
    flipped = x.copy()
    flipped[1, 0] = -0.0
    assert len({digest(x), digest(x.reshape(4)), digest(x.astype(np.float64)), digest(flipped)}) == 4
