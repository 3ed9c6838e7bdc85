"""Pictures of `leadline ops show NAME --plot FILE`: what they draw is what the op does; wrong use is one line."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from leadline.golden import plot
from leadline.golden.cli import main
from leadline.ref import E4M3FN, encode

pytestmark = pytest.mark.peers("matplotlib")


def drawn(op: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5))
    plot.picture_of(op)(figure, op)
    return figure


def test_accumulators_are_those_of_the_op() -> None:
    """One line a model over K. At V3's width, products of one sign: without promotion 5% and more are lost, with it under 0.1% (V3 §3.3.2);
    float32 keeps six digits. A picture whose labels were exchanged would show."""
    one_sign = drawn("fp8.gemm").axes[0]
    last = {line.get_label(): line.get_ydata()[-1] for line in one_sign.get_lines()}
    assert one_sign.get_lines()[0].get_xdata()[-1] == 7168
    assert last["wgmma13, promoted every 128"] < 1e-3 < 0.05 < last["wgmma13, never promoted"] < last["10 fraction bits"]
    assert last["float32"] < 1e-6


def test_recipes_have_a_histogram_each_and_powers_of_two_cost_more() -> None:
    titles = [axis.get_title() for axis in drawn("fp8.quantize_tile").axes if axis.get_title()]
    rms = {title.split(":")[0]: float(title.split()[-1]) for title in titles}
    assert set(rms) == {name for name in plot.RECIPES if name != "mxfp4"}
    assert rms["v3"] < rms["v3-ue8m0"]


def test_the_staircase_is_the_cast() -> None:
    """Relative errors are the format's own: half a unit at most over the normal numbers."""
    (curve, *_) = drawn("cast.e4m3fn").axes[0].get_lines()
    x, error = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
    normal = (x >= 2.0**-6) & (x <= 448)
    assert 1 / 17 - 0.002 < error[normal].max() <= 1 / 17
    at = int(np.argmax(error * normal))
    assert encode(E4M3FN, x[at : at + 1])[0] % 8 in (0, 1)  # the worst lies just above a power of two


@pytest.mark.parametrize("name", ["out.png", "out.svg", "out.pdf"])
def test_writes_the_file(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["ops", "show", "cast.e8m0", "--plot", str(tmp_path / name)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / name).read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")


WRONG = {
    "no picture": ("rmsnorm", "out.png", "rmsnorm has no picture; cast.*"),
    "no such format": ("cast.bf16", "out.xyz", "cannot draw 'out.xyz'; expected a name that ends in one of"),
    "no such directory": ("cast.bf16", "none/out.png", "no directory"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line(case: str, tmp_path: Path) -> None:
    op, name, says = WRONG[case]
    result = CliRunner().invoke(main, ["ops", "show", op, "--plot", str(tmp_path / name)])
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(main, ["ops", "show", "cast.bf16", "--plot", str(tmp_path / "out.png")])
    assert result.exit_code == 2
    assert 'pip install "leadline[report]"' in result.stderr
