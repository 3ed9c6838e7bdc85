"""Which constants each .cu file is compiled with and for which chips: what the compile check goes through, and what no GPU has run yet."""

from collections.abc import Mapping

from .compile import ARCHITECTURES, Defines


def _all(*sets: Mapping[str, str | int]) -> tuple[Defines, ...]:
    return tuple(tuple(s.items()) for s in sets)


def _quantised(**more: int) -> tuple[Defines, ...]:
    inputs = ({"INPUT": "float"}, {"INPUT": "u16"})
    return _all(*({**i, "CODE": "u8", "FORMAT": "E4M3FN", "TILE": 128, **more} for i in inputs))


DECODE: dict[str, str | int] = {"K": 576, "C": 512, "ROPE": 64, "STAGES": 1, "PIECE": 16}
# The production sizes of each file; others are compiled when they are asked for.
VARIANTS: dict[str, tuple[Defines, ...]] = {
    "accumulate": ((),),
    "attention": _all({"DK": 192, "DV": 128}),
    "attention_backward": _all({"DK": 192, "DV": 128}),
    "cast": _all(*({"FORMAT": f, "CODE": c} for f, c in (("E4M3FN", "u8"), ("E8M0", "u8"), ("E5M6", "u16"), ("BF16", "u16")))),
    "fp8_gemm": _all({"PATH": 0}, {"PATH": 1}),
    "fp8_gemm_wgmma": ((),),
    "merge": _all({"TYPE": "float"}, {"TYPE": "u16"}),
    "mla_decode": _all(
        {**DECODE, "LAYOUT": 0},
        {**DECODE, "LAYOUT": 0, "STAGES": 2},
        {**DECODE, "LAYOUT": 1},
        {**DECODE, "LAYOUT": 2, "K": 512},
    ),
    "permute": _all({"TYPE": "float"}, {"TYPE": "u16"}),
    "quantize_panel": (*_quantised(PER_COLUMN=0), *_quantised(PER_COLUMN=1)),
    "quantize_tile": _quantised(),
    "rmsnorm": _all({"TYPE": "float", "CHUNKS": 8, "TWO_ROUNDINGS": 0}, {"TYPE": "u16", "CHUNKS": 4, "TWO_ROUNDINGS": 1}),
    "router": _all({"TYPE": "float", "PER": 8, "BEST": 2, "BIAS": 1}, {"TYPE": "u16", "PER": 12, "BEST": 2, "BIAS": 1}),
}
# No GPU has run these yet: they compile, and run right on the CPU. A name leaves when golden/hardware holds a run of it.
UNRUN = tuple(VARIANTS)


def architectures(file: str, defines: Defines) -> tuple[str, ...]:
    """The chips that a variant exists for"""
    if file == "fp8_gemm_wgmma":
        return ("sm_90a",)
    if file == "fp8_gemm" and dict(defines)["PATH"] == 0:
        return tuple(a for a in ARCHITECTURES if a != "sm_80")  # no FP8 instruction there
    return ARCHITECTURES
