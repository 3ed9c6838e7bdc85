"""`leadline bench`: the form that every benchmark has. Its figures are a command's, not a test's."""

import numpy as np
import pytest
from leadline.golden import bench, bench_moe


def test_a_record_has_the_form_that_every_benchmark_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """op, case, direction, subject, seconds, peer, peer_seconds, ratio, limit, limit_share; the memory copy is always a peer."""
    monkeypatch.setattr(bench, "REPEATS", 5)
    x = np.ones(1 << 20, np.float32)
    timed = bench.Bench("cast.e4m3fn", "small", lambda: x + 1, {"numpy": lambda: (x + 1) + 1}, x.nbytes * 2)
    records = list(bench.measure(timed))
    assert [r["peer"] for r in records] == ["numpy", "memory copy"]
    for r in records:
        assert set(r) == {"op", "case", "direction", "subject", "seconds", "peer", "peer_seconds", "ratio", "limit", "limit_share"}
        assert r["ratio"] == r["seconds"] / r["peer_seconds"]
        assert r["limit"] in ("copy", "gemm")
    assert records[0]["limit_share"] == records[1]["peer_seconds"] / records[1]["seconds"]


@pytest.mark.peers
@pytest.mark.parametrize("name", bench.BENCHES)
def test_what_is_timed_is_the_same_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each peer runs, and where it returns codes or values they are ours: a ratio of two different things means nothing. The experts are
    narrower than in the benchmark, whose 32 of V3's width take 12 GB and minutes."""
    monkeypatch.setattr(bench_moe, "HIDDEN", 512)
    monkeypatch.setattr(bench_moe, "WIDTH", 128)
    pytest.importorskip("torch", reason="needs the extra peers")
    pytest.importorskip("ml_dtypes", reason="needs the extra peers")
    import torch

    for timed in bench.BENCHES[name]():
        ours = timed.ours()
        ours = ours[0] if isinstance(ours, tuple) else ours
        for peer, run in timed.peers.items():
            theirs = run()
            theirs = theirs[0] if isinstance(theirs, tuple) else theirs
            if theirs is None:
                continue
            if isinstance(theirs, torch.Tensor):
                theirs = theirs.detach()
                theirs = (
                    theirs.view(torch.uint8)
                    if theirs.dtype.itemsize == 1
                    else theirs.view(torch.uint16)
                    if theirs.dtype.itemsize == 2
                    else theirs
                ).numpy()
            elif theirs.dtype.kind == "V" or theirs.dtype.itemsize < 4:
                theirs = theirs.view(f"uint{8 * theirs.dtype.itemsize}")
            size = 1.0 if ours.dtype.kind in "u" else max(1.0, float(np.sqrt(np.mean(np.square(ours, dtype=np.float64)))))
            same = (
                theirs.reshape(ours.shape) == ours
                if ours.dtype.kind in "u"
                else np.isclose(theirs.reshape(ours.shape), ours, rtol=1e-4, atol=1e-4 * size)  # of the model's gradients, 74
            )
            if ours.dtype.kind == "i":  # torch leaves ties open, and orders slots as it likes
                same = np.sort(theirs, -1) == np.sort(ours, -1)
            assert same.mean() > 0.999, peer
