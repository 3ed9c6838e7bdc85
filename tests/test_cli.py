"""The command line as a user meets it: what each command prints, and one line with exit status 2 for every wrong use."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from leadline.golden.cli import main
from leadline.ref import OPS


def leadline(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    result = CliRunner().invoke(main, list(arguments), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_ops_lists_every_op_and_show_says_equation_source_contract_and_cost() -> None:
    """A user finds every declared op, and for one of them all that the contract holds."""
    status, out, _ = leadline("ops")
    assert status == 0
    assert all(name in out for name in OPS)
    for name, op in OPS.items():
        status, out, _ = leadline("ops", "show", name)
        assert status == 0
        assert op.source in out
        assert "FLOPs" in out
        assert "=" in out.splitlines()[2]


def test_verify_prints_a_table_and_exits_zero_when_all_pass() -> None:
    """The default subject on one op: a row, a verdict, exit status 0."""
    status, out, _ = leadline("verify", "--op", "rmsnorm")
    assert status == 0
    assert "rmsnorm backward" in out
    assert "PASS  40 passed, 0 failed" in out


def test_json_is_one_object_a_line_with_versions_first_and_totals_last() -> None:
    """Machines read JSON lines: provenance, a line a case, totals."""
    status, out, _ = leadline("verify", "kernels.cpu", "--op", "cast.e4m3fn", "--json")
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0]["schema"] == "leadline.report/1"
    assert {"leadline", "numpy"} <= set(lines[0]["versions"])
    assert all(line["verdict"] == "PASS" for line in lines[1:-1])
    assert lines[-1]["total"] == {"pass": len(lines) - 2, "fail": 0, "error": 0, "skipped": 0}


SUBJECT = """
import numpy as np

def rmsnorm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * weight

def eps_outside(x, weight, eps):
    return x / (np.sqrt((x * x).mean(-1, keepdims=True)) + np.float32(eps)) * weight

def takes_no_weight(x):
    return x

def takes_a_stranger(x, weight, *, colour):
    return x
"""


@pytest.fixture
def subject(tmp_path: Path) -> str:
    path = tmp_path / "subject.py"
    path.write_text(SUBJECT)
    return str(path)


def test_a_file_is_verified_and_a_wrong_one_is_told_its_bug(subject: str) -> None:
    """file.py:fn passes or fails on its merits, and the failure names the bug."""
    assert leadline("verify", f"{subject}:rmsnorm", "--op", "rmsnorm")[0] == 0
    status, out, _ = leadline("verify", f"{subject}:eps_outside", "--op", "rmsnorm")
    assert status == 1
    assert "rmsnorm-eps-outside" in out


def test_a_module_of_the_current_folder_is_found(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """module:attr is looked up from where the user stands."""
    monkeypatch.chdir(Path(subject).parent)
    assert leadline("verify", "subject:rmsnorm", "--op", "rmsnorm", "--precision", "fp32")[0] == 0


WRONG = {
    "an unknown op": (["verify", "--op", "rmsnrom"], "did you mean rmsnorm?"),
    "an unknown op to show": (["ops", "show", "router"], "router.noaux_tc"),
    "an unknown subject": (["verify", "kernels.cpuu"], "did you mean kernels.cpu"),
    "an unknown precision": (["verify", "--precision", "fp23"], "did you mean fp32"),
    "an unknown direction": (["verify", "--direction", "sideways"], "forward, backward"),
    "a direction that the op lacks": (["verify", "--op", "cast.bf16", "--direction", "backward"], "no backward"),
    "an unknown profile": (["verify", "--profile", "slow"], "quick, full"),
    "an unknown tie rule": (["verify", "--ties", "first"], "lowest, any"),
    "an unknown framework": (["verify", "--framework", "tf"], "numpy, torch"),
    "an unknown attribute": (["verify", "--attr", "overflw=nan"], "did you mean overflow"),
    "an attribute without a value": (["verify", "--attr", "overflow"], "name=value"),
    "an attribute of the wrong type": (["verify", "--attr", "eps=small"], "'small' is no float"),
    "an attribute's unknown value": (["verify", "--op", "cast.bf16", "--attr", "overflow=wrap"], "saturate, nan"),
    "another op's attribute": (["verify", "--op", "rmsnorm", "--attr", "overflow=nan"], "cast_order, eps"),
    "an unknown option": (["verify", "--frobnicate"], "--frobnicate"),
    "an unknown command": (["verfy"], "verfy"),
    "a file that is not there": (["verify", "nowhere/file.py:fn", "--op", "rmsnorm"], "there is no file nowhere/file.py"),
    "no vectors there": (["verify", "--op", "rmsnorm", "--vectors", "nowhere"], "there is no vector file nowhere"),
    "no benchmark": (["bench", "--op", "decode.bf16"], "has no benchmark"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line_and_exit_status_2(name: str) -> None:
    """Every wrong argument is named with its mend, in one line on standard error."""
    arguments, expected = WRONG[name]
    status, out, err = leadline(*arguments)
    assert (status, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


FILES = {
    "a syntax error": ("def f(:\n", "does not import: SyntaxError"),
    "a missing import": ("import no_such_module_anywhere\n", "does not import: ModuleNotFoundError"),
    "an exit": ("import sys\nsys.exit(3)\n", "does not import: SystemExit"),
    "a crash": ("import os\nos._exit(5)\n", "exited with status 5"),
    "no such attribute": ("def fm(x, weight): return x\n", "has no fn; did you mean fm?"),
    "missing inputs": ("def fn(x): return x\n", "passes by keyword x, weight"),
    "foreign parameters": ("def fn(x, weight, *, colour): return x\n", "takes x, weight, colour"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_subject_that_does_not_fit_is_one_line_and_exit_status_2(name: str, tmp_path: Path) -> None:
    """A file that does not import, or a callable that the contract cannot call, ends before any case, by name."""
    text, expected = FILES[name]
    path = tmp_path / "mine.py"
    path.write_text(text)
    status, out, err = leadline("verify", f"{path}:fn", "--op", "rmsnorm")
    assert (status, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1


def test_an_interrupt_ends_with_130_and_leaves_no_process(tmp_path: Path) -> None:
    """Ctrl-C in a run: one line, exit status 130, and the subject's process is gone."""
    path, pid = tmp_path / "mine.py", tmp_path / "pid"
    path.write_text(
        textwrap.dedent(f"""
            import os, pathlib, time
            def fn(x, weight):
                pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))
                time.sleep(600)
        """)
    )
    command = [sys.executable, "-m", "leadline.golden.cli", "verify", f"{path}:fn", "--op", "rmsnorm"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_json_lines_are_written_as_they_come(tmp_path: Path) -> None:
    """What was judged before an interrupt is on standard output: nothing is lost."""
    path = tmp_path / "mine.py"
    path.write_text(
        textwrap.dedent("""
            import time
            def fn(x, weight):
                if x.shape == (5, 512):
                    time.sleep(600)
                return x * weight
        """)
    )
    command = [sys.executable, "-m", "leadline.golden.cli", "verify", f"{path}:fn", "--op", "rmsnorm", "--json"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path)
    assert run.stdout
    lines = [json.loads(run.stdout.readline()) for _ in range(3)]
    assert [line.get("case") for line in lines] == [None, "one", "ragged"]
    run.send_signal(signal.SIGINT)
    rest, _ = run.communicate(timeout=300)
    assert run.returncode == 130
    assert "total" not in rest


def test_a_subject_cannot_steer_the_terminal(tmp_path: Path) -> None:
    """Escape sequences in what a subject raises are shown, not obeyed."""
    (tmp_path / "loud.py").write_text("def rmsnorm(x, weight, eps):\n    raise RuntimeError('\\x1b[31mred\\x07[bold]')\n")
    status, out, _ = leadline("verify", f"{tmp_path / 'loud.py'}", "--op", "rmsnorm", "--direction", "forward")
    assert status == 1
    assert "\\x1b[31mred\\x07[bold]" in out
    assert "\x1b[31mred" not in out
