"""Every .cu file compiles for every chip that it is meant for, without a GPU, and spills no register where it says so."""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor

import pytest
from conftest import absent
from leadline.kernels.gpu.cuda import UNRUN
from leadline.kernels.gpu.cuda.compile import ARCHITECTURES, HERE, CompileError, Defines, Usage, compiled, says_no_spills, usage_of
from leadline.kernels.gpu.cuda.variants import VARIANTS, architectures

FILES = sorted(path.stem for path in HERE.glob("*.cu"))


def nvrtc_missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    missing = absent(("cupy",))
    if missing:
        return "cupy not installed; python3 -m pip install 'leadline[gpu]'"
    from leadline.kernels.gpu.cuda.compile import nvrtc

    try:
        nvrtc()
    except CompileError as error:
        return str(error)
    return None


def usage(file: str, defines: Defines, arch: str) -> dict[str, Usage]:
    return dict(compiled(file, defines, arch).usage)


@pytest.fixture(scope="module")
def pool():
    """NVRTC runs in a process of its own: what crashes there is one failed test."""
    if why := nvrtc_missing():
        pytest.skip(f"NVRTC: {why}")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_every_file_is_checked() -> None:
    """A new .cu file has variants, and one that no GPU has run is named in UNRUN."""
    assert sorted(VARIANTS) == FILES
    assert set(UNRUN) <= set(FILES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_compiles_and_spills_nothing(pool: ProcessPoolExecutor, file: str, arch: str) -> None:
    variants = [v for v in VARIANTS[file] if arch in architectures(file, v)]
    if not variants:
        pytest.skip(f"{file}.cu is not for {arch}")
    kernels = re.findall(r'extern "C" __global__ void(?: __launch_bounds__\([^\n]*\))?\s+(\w+)\(', (HERE / f"{file}.cu").read_text())
    for defines in variants:
        found = pool.submit(usage, file, defines, arch).result()
        assert sorted(found) == sorted(kernels)
        if says_no_spills(file, arch):
            assert {name: u.spills for name, u in found.items()} == dict.fromkeys(kernels, 0), (defines, found)
        assert all(0 < u.registers <= 255 for u in found.values())


def test_an_error_names_file_and_chip(pool: ProcessPoolExecutor) -> None:
    """wgmma is Hopper's: elsewhere the compiler's own message comes through."""
    with pytest.raises(CompileError, match=r"fp8_gemm_wgmma\.cu for sm_80: .*wgmma"):
        pool.submit(usage, "fp8_gemm_wgmma", (), "sm_80").result()


def test_spills_are_read_from_the_log() -> None:
    """The check can fail: a log that tells of spills is one."""
    log = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
ptxas         .     16 bytes stack frame, 36 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers
"""
    assert usage_of(log) == {"k": Usage(80, 36, 16)}
    with pytest.raises(CompileError, match="kernel k"):
        usage_of("Compiling entry function 'k' for 'sm_90a'")


def test_a_promise_is_of_the_chips_that_it_names() -> None:
    assert says_no_spills("mla_decode", "sm_100")
    assert says_no_spills("attention_backward", "sm_90a")
    assert not says_no_spills("attention_backward", "sm_100")


@pytest.mark.parametrize("file", FILES)
def test_files_say_what_they_compute(file: str) -> None:
    """A head comment with the index equation, and no more than three screens."""
    lines = (HERE / f"{file}.cu").read_text().splitlines()
    assert lines[0].startswith("// ")
    assert "=" in "".join(lines[:3])
    assert len(lines) <= 300
    assert max(map(len, lines)) <= 160
