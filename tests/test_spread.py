"""A run shared by several processes, or interrupted and resumed, is the run of one process: the same results, in the same order."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from leadline.golden.cli import main

OPS = ("--op", "rmsnorm", "--op", "cast.e5m2", "--op", "swiglu")


def run(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, JSON lines, standard error."""
    result = CliRunner().invoke(main, ["verify", *arguments, "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()], result.stderr


def told(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a run says, less the time that it took."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines[1:]]


WRONG = """
import numpy as np

def rmsnorm(x, weight, eps):
    y = x / np.sqrt((x * x).mean(1, keepdims=True) + np.float32(eps)) * (weight + 1)
    return y.astype(np.float32)
"""


@pytest.fixture
def wrong(tmp_path: Path) -> str:
    """A subject with a known bug: explanations, limits per op and maps have to survive the journey."""
    (tmp_path / "wrong.py").write_text(WRONG)
    return str(tmp_path / "wrong.py")


def test_any_number_of_processes_gives_the_same(wrong: str) -> None:
    """Every line but the header, passing and failing subjects, in the same order and to the bit."""
    for subject, jobs in (("kernels.cpu", "2"), (wrong, "3")):
        (one, alone, _), (many, shared, _) = run(subject, *OPS), run(subject, *OPS, "--jobs", jobs)
        assert many == one
        assert told(shared) == told(alone)


def test_a_worker_loads_its_subject_once(tmp_path: Path) -> None:
    """Five groups, two workers: at most two loads, and nothing of a subject is left when the run is over."""
    log = tmp_path / "log"
    mark = f"import os\nwith open({str(log)!r}, 'a') as file:\n    print(os.getpid(), file=file)\n"
    (tmp_path / "wrong.py").write_text(WRONG + mark)
    claims = ("fp32", "bf16", "fp16", "fp64", "bf16-eager")
    asked = ("--op", "rmsnorm", "--direction", "forward", "--jobs", "2", *(a for p in claims for a in ("--precision", p)))
    status, lines, _ = run(str(tmp_path / "wrong.py"), *asked)
    assert status == 1
    assert set(claims) <= {line.get("precision") for line in lines}
    pids = [int(line) for line in log.read_text().split()]
    assert 1 <= len(pids) <= 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


KILLER = """
import os, signal, pathlib
import numpy as np

MARK = pathlib.Path(__file__).with_name("killed")

def rmsnorm(x, weight, eps):
    if len(x) == 5 and not MARK.exists():
        MARK.touch()
        os.kill(os.getppid(), signal.SIGKILL)  # the worker that asks
    return x / np.sqrt((x * x).mean(1, keepdims=True) + np.float32(eps)) * weight
"""


def test_a_killed_workers_cases_are_asked_again(tmp_path: Path) -> None:
    """The worker dies midway, once; the run has every case all the same."""
    (tmp_path / "killer.py").write_text(KILLER)
    arguments = (str(tmp_path / "killer.py"), "--op", "rmsnorm", "--direction", "forward", "--precision", "fp32")
    status, lines, _ = run(*arguments, "--jobs", "2")
    assert (tmp_path / "killed").exists()
    assert status == 0
    assert told(lines) == told(run(*arguments)[1])


def test_what_kills_every_worker_is_said_and_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text(KILLER.replace("MARK.touch()", "pass"))
    status, _, error = run(str(tmp_path / "killer.py"), "--op", "rmsnorm", "--direction", "forward", "--precision", "fp32", "--jobs", "2")
    assert status == 2
    assert "killed its worker 3 times" in error
    assert error.count("\n") == 1


COUNTING = """
import pathlib
import numpy as np

def rmsnorm(x, weight, eps):
    with pathlib.Path(__file__).with_name("asked").open("a") as f:
        f.write(".")
    return x / np.sqrt((x * x).mean(1, keepdims=True) + np.float32(eps)) * weight
"""


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_resuming_asks_what_is_left(jobs: str, tmp_path: Path) -> None:
    """From the lines of a run that was cut off in the middle of a line: the same report, and only the other cases are asked."""
    (tmp_path / "counting.py").write_text(COUNTING)
    lines, asked = tmp_path / "run.jsonl", tmp_path / "asked"
    arguments = (str(tmp_path / "counting.py"), "--op", "rmsnorm", "--direction", "forward")
    _, whole, _ = run(*arguments, "--jsonl", str(lines))
    total = len(asked.read_text())
    asked.unlink()
    text = lines.read_text().splitlines(keepends=True)
    lines.write_text("".join(text[:8]) + text[8][:40])
    status, resumed, _ = run(*arguments, "--jsonl", str(lines), "--resume", str(lines), "--jobs", jobs)
    assert status == 0
    assert len(asked.read_text()) == total - 7
    assert told(resumed) == told(whole)
    assert told([json.loads(line) for line in lines.read_text().splitlines()]) == told(whole)


REFUSED = {
    "another op": (["--op", "swiglu"], "has other options"),
    "another subject": (["ref"], "has other subjects"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_resuming_another_run_is_refused(case: str, tmp_path: Path) -> None:
    lines = tmp_path / "run.jsonl"
    run("kernels.cpu", "--op", "cast.e5m2", "--jsonl", str(lines))
    other, says = REFUSED[case]
    subject = [] if other[0] == "ref" else ["kernels.cpu"]
    op = ["--op", "cast.e5m2"] if other[0] == "ref" else []
    status, _, error = run(*subject, *other, *op, "--resume", str(lines))
    assert status == 2
    assert says in error


def test_an_interrupt_loses_no_finished_case(tmp_path: Path) -> None:
    """SIGINT midway: the lines that were written are whole, and the rest of the run completes them."""
    (tmp_path / "slow.py").write_text(COUNTING.replace('f.write(".")', 'f.write(".")\n    import time; time.sleep(0.4)'))
    lines = tmp_path / "run.jsonl"
    arguments = ["verify", str(tmp_path / "slow.py"), "--op", "rmsnorm", "--direction", "forward", "--jsonl", str(lines)]
    process = subprocess.Popen([sys.executable, "-c", "from leadline.golden.cli import main; main()", *arguments], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while (not lines.exists() or lines.read_text().count("\n") < 4) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    written = lines.read_text().count("\n") - 1
    assert written >= 3
    before = len((tmp_path / "asked").read_text())
    status, resumed, _ = run(*arguments[1:], "--resume", str(lines))
    assert status == 0
    assert len(resumed) - 2 == 20
    assert len((tmp_path / "asked").read_text()) - before == 20 - written


def test_jobs_below_one_are_refused() -> None:
    status, _, error = run("kernels.cpu", "--op", "cast.e5m2", "--jobs", "0")
    assert status == 2
    assert "--jobs 0; expected at least 1" in error


@pytest.mark.peers("distributed")
def test_a_dask_cluster_gives_the_same_though_a_worker_is_killed(tmp_path: Path) -> None:
    """A real scheduler and two workers on this machine; one of them is killed midway, and its work is done by the other."""
    program = textwrap.dedent(
        f"""
        import os, signal, threading, time
        from distributed import LocalCluster
        from click.testing import CliRunner
        from leadline.golden.cli import main

        if __name__ == "__main__":
            with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
                victim = next(iter(cluster.workers.values())).process.process.pid
                threading.Timer(3.0, os.kill, (victim, signal.SIGKILL)).start()
                arguments = ["verify", "kernels.cpu", *{OPS!r}, "--jsonl", {str(tmp_path / "dask.jsonl")!r}]
                arguments += ["--scheduler", cluster.scheduler_address]
                result = CliRunner().invoke(main, arguments)
            print(result.output, result.exception)
            raise SystemExit(result.exit_code)
        """
    )
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "dask.jsonl").read_text().splitlines()]
    assert told(lines) == told(run("kernels.cpu", *OPS)[1])


def test_a_scheduler_that_does_not_answer_is_one_line() -> None:
    pytest.importorskip("distributed", reason="needs the extra cluster")
    status, _, error = run("kernels.cpu", "--op", "cast.e5m2", "--scheduler", "tcp://127.0.0.1:9")
    assert status == 2
    assert "no scheduler answers at tcp://127.0.0.1:9" in error
