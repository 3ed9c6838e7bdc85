"""Launchers of permute.cu: tokens to experts and back, forward and backward."""

from typing import Any

import numpy as np

from .launch import Launch, aligned, checked, fits, need, runner, taken
from .quantize import INPUTS

CHUNK, EXPERTS, THREADS = 1024, 1024, 256
INTEGERS = (np.int32, np.int64)


def plan_of(kernel: str, topk_idx: Any, e: int, alignment: int) -> tuple[Any, Any, Any]:
    """counts[e], source[m] and place[n,k], all int32; the number of rows is read back from the device"""
    fits(1 <= e <= EXPERTS, kernel, "n_routed_experts", e, f"1 to {EXPERTS}")
    need(alignment >= 1, kernel, "alignment", alignment, "1 or 128")
    on, topk_idx = runner(), taken(kernel, "topk_idx", topk_idx, INTEGERS, 2)
    (n, k), slots = topk_idx.shape, topk_idx.shape[0] * topk_idx.shape[1]
    fits(slots + e * alignment < 2**31, kernel, "topk_idx", f"of {slots} slots", f"fewer than {2**31 - e * alignment}")
    if slots and checked():
        need(int(topk_idx.min()) >= -1 and int(topk_idx.max()) < e, kernel, "topk_idx", "outside its range", f"-1 to {e - 1}")
    topk_idx, chunks = on.array(topk_idx.astype(np.int32)), -(-slots // CHUNK)
    counts, total, rows, place = (on.zeros(s, np.int32) for s in ((max(chunks, 1), e), (e,), (1,), (n, k)))
    defines = (("TYPE", "float"),)
    if slots == 0:
        return total, on.zeros((0,), np.int32), place
    args = topk_idx, counts, np.int32(slots), np.int32(e)
    on.launch(Launch("permute", "count_slots", defines, (chunks,), 256, args))
    args = counts, total, rows, np.int32(chunks), np.int32(e), np.int32(alignment)
    on.launch(Launch("permute", "first_rows", defines, (1,), EXPERTS, args))
    source = on.zeros((int(rows[0]),), np.int32)
    source -= 1
    args = topk_idx, counts, source, place, np.int32(slots), np.int32(e)
    on.launch(Launch("permute", "place_slots", defines, (chunks,), 32, args))
    return total, source, place


def _whole(d: int, *arrays: Any) -> np.int32:
    return np.int32(d % (16 // arrays[0].dtype.itemsize) == 0 and aligned(*arrays))


def _defines(x: Any) -> tuple[tuple[str, str | int], ...]:
    return (("TYPE", INPUTS[np.dtype(x.dtype)]),)


def moe_permute(x: Any, topk_idx: Any, *, n_routed_experts: int = 256, alignment: int = 1) -> tuple[Any, Any, Any]:
    """x_sorted[i] = x[source[i] // k], rows sorted by (expert, token, slot); counts[e] and source[m] are int32"""
    x = taken("moe.permute", "x", x, tuple(INPUTS), 2)
    need(topk_idx.shape[0] == x.shape[0], "moe.permute", "topk_idx", f"of {topk_idx.shape[0]} tokens", f"{x.shape[0]}, those of x")
    counts, source, _ = plan_of("moe.permute", topk_idx, n_routed_experts, alignment)
    rows, d = source.shape[0], x.shape[1]
    x_sorted = runner().empty((rows, d), x.dtype)
    if rows and d:
        args = x, source, x_sorted, np.int32(d), np.int32(topk_idx.shape[1]), _whole(d, x, x_sorted)
        runner().launch(Launch("permute", "gather_rows", _defines(x), (rows,), THREADS, args))
    return x_sorted, counts, source


def _summed(name: str, kernel: str, y_sorted: Any, topk_idx: Any, weight: Any, e: int, alignment: int) -> Any:
    y_sorted = taken(kernel, name, y_sorted, tuple(INPUTS), 2)
    _, source, place = plan_of(kernel, topk_idx, e, alignment)
    (n, k), d = place.shape, y_sorted.shape[1]
    rows = f"{source.shape[0]}, those that moe.permute makes"
    need(y_sorted.shape[0] == source.shape[0], kernel, name, f"of {y_sorted.shape[0]} rows", rows)
    y = runner().empty((n, d), y_sorted.dtype)
    if n and d:
        args = y_sorted, place, weight, y, np.int32(d), np.int32(k), _whole(d, y_sorted, y)
        runner().launch(Launch("permute", "sum_slots", _defines(y_sorted), (n,), THREADS, args))
    return y


def moe_permute_bwd(dx_sorted: Any, x: Any, topk_idx: Any, *, n_routed_experts: int = 256, alignment: int = 1) -> Any:
    """dx[n] = Σ_k dx_sorted[place[n,k]]"""
    del x
    return _summed("dx_sorted", "moe.permute backward", dx_sorted, topk_idx, None, n_routed_experts, alignment)


def moe_unpermute(y_sorted: Any, topk_idx: Any, topk_weight: Any, *, n_routed_experts: int = 256, alignment: int = 1) -> Any:
    """y[n,d] = Σ_k topk_weight[n,k] y_sorted[place[n,k],d], slot after slot in float32"""
    name = "moe.unpermute"
    topk_weight = taken(name, "topk_weight", topk_weight, (y_sorted.dtype,), 2)
    need(topk_weight.shape == tuple(topk_idx.shape), name, "topk_weight", f"of shape {topk_weight.shape}", f"{tuple(topk_idx.shape)}")
    return _summed("y_sorted", name, y_sorted, topk_idx, topk_weight, n_routed_experts, alignment)


def moe_unpermute_bwd(
    dy: Any, y_sorted: Any, topk_idx: Any, topk_weight: Any, *, n_routed_experts: int = 256, alignment: int = 1
) -> tuple[Any, Any]:
    """dy_sorted[i] = w[source[i]] dy[source[i] // k],   dtopk_weight[n,k] = Σ_d dy[n,d] y_sorted[place[n,k],d]"""
    name, on = "moe.unpermute backward", runner()
    y_sorted = taken(name, "y_sorted", y_sorted, tuple(INPUTS), 2)
    dy, topk_weight = taken(name, "dy", dy, (y_sorted.dtype,), 2), taken(name, "topk_weight", topk_weight, (y_sorted.dtype,), 2)
    _, source, place = plan_of(name, topk_idx, n_routed_experts, alignment)
    (n, k), d = place.shape, y_sorted.shape[1]
    need(y_sorted.shape[0] == source.shape[0], name, "y_sorted", f"of {y_sorted.shape[0]} rows", f"{source.shape[0]}")
    need(dy.shape == (n, d), name, "dy", f"of shape {dy.shape}", f"{(n, d)}")
    dy_sorted, dweight = on.zeros(y_sorted.shape, y_sorted.dtype), on.zeros((n, k), y_sorted.dtype)
    if n and k:
        args = dy, y_sorted, place, topk_weight, dy_sorted, dweight, np.int32(d), np.int32(k), _whole(d, dy, y_sorted, dy_sorted)
        on.launch(Launch("permute", "unpermute_backward", _defines(y_sorted), (n,), THREADS, args))
    return dy_sorted, dweight
