"""How the tests run: Hypothesis profiles, one BLAS thread a worker, and what is skipped, each with a reason that `-ra` prints."""

import importlib.util
import os
import signal
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis.strategies import SearchStrategy
from threadpoolctl import threadpool_limits

# BLAS libraries read these when they are loaded, here and in the processes that tests start.
for _library in ("OMP", "OPENBLAS", "MKL", "BLIS"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

# Select one with --hypothesis-profile or HYPOTHESIS_PROFILE. A failure prints a blob that replays it (@reproduce_failure).
# The gate draws the same questions every time, so that it is red for a change and never by chance; other runs draw new ones, `deep` many.
SLOW_DRAWS = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)  # arrays of thousands, oracles of 50 digits
settings.register_profile("dev", deadline=None, max_examples=8, print_blob=True, suppress_health_check=SLOW_DRAWS)
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True, database=None)
settings.register_profile("deep", parent=settings.get_profile("dev"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

PEERS = ("torch", "transformers", "ml_dtypes", "gfloat")


def pytest_configure(config: pytest.Config) -> None:
    """One BLAS thread a worker where the library was loaded before us, too. The limit ends with its object, so that is kept."""
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated")  # torch's own use of it
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; the commands that are tested inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config._leadline_threads = threadpool_limits(limits=1)  # type: ignore[attr-defined]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips from here, so that `-ra` folds each reason into one line."""
    if item.get_closest_marker("slow") and "slow" not in item.config.option.markexpr:
        pytest.skip("slow: takes minutes, run with -m slow")
    if (peers := item.get_closest_marker("peers")) and (missing := absent(peers.args or PEERS)):
        pytest.skip(f"peers: {', '.join(missing)} not installed")
    if item.get_closest_marker("gpu") and (why := no_gpu()):
        pytest.skip(f"gpu: {why}")


def absent(packages: tuple[str, ...]) -> list[str]:
    """Those of the packages that cannot be imported. The marker `peers` without arguments means the whole extra."""
    return [p for p in packages if importlib.util.find_spec(p) is None]


@cache
def no_gpu() -> str | None:
    """Why no CUDA device can be used, or None."""
    if absent(("cupy",)):
        return "cupy not installed"
    import cupy

    try:
        return None if cupy.cuda.runtime.getDeviceCount() else "no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device ({error})"


@pytest.fixture(scope="session")
def killed() -> Callable[[Callable[[Any], None], SearchStrategy], None]:
    """killed(check, questions): the check fails on some question. A fixed search, so a mutant that survives does so every time."""

    def search(check: Callable[[Any], None], questions: SearchStrategy) -> None:
        def fails(question: Any) -> bool:
            try:
                with np.errstate(all="ignore"):
                    check(question)
            except AssertionError:
                return True
            return False

        fixed = settings(parent=settings.get_profile("dev"), max_examples=400, database=None, phases=[Phase.generate])
        find(questions, fails, settings=fixed, random=Random(0))

    return search
