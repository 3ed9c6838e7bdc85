"""Launchers of fp8_gemm.cu and fp8_gemm_wgmma.cu: FP8 codes with 1×128 and 128×128 scales, promoted to float32 every 128."""

from typing import Any

import numpy as np

from .launch import Launch, checked, fits, need, runner, taken

TILE, THREADS, SHARED = 128, 256, 3 * 2 * 128 * 128
# What each path's instruction is said to add up like (ref/fp8_accumulate.py): `leadline probe accumulator` asks the chip.
PATHS = {"wgmma": "wgmma13", "mma": "mma25", "bf16": "fp32"}
ORDERS = ("one by one", "product first")


def path_of(kernel: str, capability: int, path: str | None) -> str:
    """The path asked for, or the device's best; ValueError where the device has no such instruction"""
    best = "wgmma" if capability == 90 else "mma" if capability >= 89 else "bf16"
    path = path or best
    need(path in PATHS, kernel, "path", repr(path), f"one of {', '.join(PATHS)}")
    have = {"wgmma": capability == 90, "mma": capability >= 89, "bf16": True}[path]
    wants = {"wgmma": "Hopper (9.0)", "mma": "8.9 or later, for FP8 tensor cores"}.get(path, "")
    need(have, kernel, "path", f"{path!r} on compute capability {capability / 10}", f"{wants}; path='bf16' runs everywhere")
    return path


def _padded(codes: Any) -> Any:
    """Rows of a multiple of 16 codes, as copies of 16 bytes need them: a copy with zeros at the end where they are not"""
    d = codes.shape[-1]
    if d % 16 == 0:
        return codes
    wide = runner().zeros((*codes.shape[:-1], -(-d // 16) * 16), np.uint8)
    wide[..., :d] = codes
    return wide


def gemm(
    a_codes: Any,
    a_scale: Any,
    b_codes: Any,
    b_scale: Any,
    expert_of: Any = None,
    *,
    scale_order: str = "one by one",
    out: str = "fp32",
    path: str | None = None,
) -> Any:
    """y[n,o] in float32, or bfloat16 bits (out="bf16"). b_codes[o,d] and b_scale[⌈o/128⌉ or o, ⌈d/128⌉]; or, grouped, [e,o,d] and
    [e,·,·] with expert_of[⌈n/128⌉]: the weights of each 128 rows of a_codes, whose result is undefined where it is negative."""
    kernel = "fp8.gemm"
    path = path_of(kernel, runner().capability, path)
    grouped = expert_of is not None
    a_codes = taken(kernel, "a_codes", a_codes, (np.uint8,), 2)
    b_codes = taken(kernel, "b_codes", b_codes, (np.uint8,), 3 if grouped else 2)
    a_scale = taken(kernel, "a_scale", a_scale, (np.float32,), 2)
    b_scale = taken(kernel, "b_scale", b_scale, (np.float32,), 3 if grouped else 2)
    (n, d), (o, db) = a_codes.shape, b_codes.shape[-2:]
    tiles, blocks = -(-d // TILE), -(-o // TILE)
    need(d >= 1 and db == d, kernel, "b_codes", f"of width {db}", f"{d}, that of a_codes, and at least 1")
    need(a_scale.shape == (n, tiles), kernel, "a_scale", f"of shape {a_scale.shape}", f"{(n, tiles)}")
    need(
        b_scale.shape[-2:] in ((blocks, tiles), (o, tiles)),
        kernel,
        "b_scale",
        f"of shape {b_scale.shape}",
        f"{(blocks, tiles)} or {(o, tiles)}",
    )
    need(scale_order in ORDERS, kernel, "scale_order", repr(scale_order), " or ".join(ORDERS))
    need(out in ("fp32", "bf16"), kernel, "out", repr(out), "fp32 or bf16")
    fits(-(-n // TILE) <= 65535, kernel, "a_codes", f"of {n} rows", f"at most {65535 * TILE}")
    if grouped:
        expert_of = taken(kernel, "expert_of", expert_of, (np.int32,), 1)
        need(expert_of.shape == (-(-n // TILE),), kernel, "expert_of", f"of shape {expert_of.shape}", f"one number for each {TILE} rows")
        need(b_scale.shape[0] == b_codes.shape[0], kernel, "b_scale", f"of {b_scale.shape[0]} experts", f"{b_codes.shape[0]}")
        need(
            n == 0 or not checked() or int(expert_of.max()) < b_codes.shape[0],
            kernel,
            "expert_of",
            "beyond the experts",
            f"less than {b_codes.shape[0]}",
        )
    for name, scale in (("a_scale", a_scale), ("b_scale", b_scale)):
        need(
            not checked() or bool(((scale > 0) & (scale < np.inf)).all()), kernel, name, "not finite and > 0 somewhere", "finite scales > 0"
        )
    a_codes, b_codes, y = _padded(a_codes), _padded(b_codes), runner().empty((n, o), np.float32 if out == "fp32" else np.uint16)
    if n and o:
        # p = o = ⌈o/128⌉ = 1 is the same either way
        flags = b_scale.shape[-2] == o and o != blocks, scale_order == ORDERS[1], out == "bf16"
        args = a_codes, a_scale, b_codes, b_scale, expert_of, y, *(np.int32(v) for v in (n, o, a_codes.shape[1], *flags))
        file, defines = ("fp8_gemm_wgmma", ()) if path == "wgmma" else ("fp8_gemm", (("PATH", int(path == "bf16")),))
        runner().launch(Launch(file, file, defines, (blocks, -(-n // TILE)), THREADS, args, SHARED))
    return y


def fp8_gemm(
    a_codes: Any,
    a_scale: Any,
    b_codes: Any,
    b_scale: Any,
    *,
    accumulator: str = "fp32",
    promote: int = 128,
    tile: int = 128,
    scale_order: str = "one by one",
    format: str = "e4m3fn",
    out: str = "fp32",
) -> Any:
    """The reference's fp8.gemm on the path whose instruction adds as `accumulator` says: wgmma13, mma25, or fp32 (bfloat16 products)

    NotImplementedError: another accumulator, promotion, tile or format than the kernels have.
    """
    path = next((p for p, adds in PATHS.items() if adds == accumulator), None)
    if path is None or tile != TILE or promote != TILE or format != "e4m3fn":
        raise NotImplementedError(f"fp8.gemm here has tile = promote = 128, e4m3fn and accumulator {', '.join(PATHS.values())}")
    y = gemm(a_codes, a_scale, b_codes, b_scale, scale_order=scale_order, out=out, path=path)
    if out == "fp32":
        return y
    from .bf16 import values

    return values(y)
