"""Programs as subjects: the examples pass, a bug is named, and a program that misbehaves costs exactly the case that it did so in."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import leadline.golden
import numpy as np
import pytest
from click.testing import CliRunner
from leadline.golden import verify
from leadline.golden.cli import main
from leadline.golden.exec_subject import ExecSubject
from leadline.golden.precision import precision_named
from leadline.golden.vectors import make
from leadline.golden.wire import pack, unpack
from leadline.ref.formats import BF16, FP16
from leadline.ref.op import op_named

EXAMPLES = Path(leadline.golden.__path__[0]) / "adapters"
RUSTC = shutil.which("rustc") or shutil.which(str(Path.home() / ".cargo" / "bin" / "rustc"))


def leadline_says(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(arguments), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The C++ example, built as its first lines say, right and with its bug. The folder's name is one that a shell would split."""
    if shutil.which("g++") is None:
        pytest.skip("g++ not installed")
    folder = tmp_path_factory.mktemp("a folder")
    built = {}
    for name, options in {"right": [], "wrong": ["-DBUG"]}.items():
        built[name] = f"exec:'{folder / name}'"
        command = [
            "g++",
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            *options,
            "-o",
            str(folder / name),
            str(EXAMPLES / "example.cpp"),
        ]
        subprocess.run(command, check=True)
    return built


def test_the_example_in_cpp_passes_all_that_it_declares(example: dict[str, str]) -> None:
    """rmsnorm both ways and the router pass at float32, bfloat16 and float64; only attributes that it does not take are SKIPPED."""
    report = verify(example["right"], op=["rmsnorm", "router.noaux_tc"], precision=["fp32", "bf16", "fp64"])
    assert report.verdict == "PASS"
    assert report.count("FAIL") == report.count("ERROR") == 0
    passed = Counter((r.op, r.direction, r.precision) for r in report.results if r.verdict == "PASS")
    least = {("rmsnorm", "forward"): 10, ("rmsnorm", "backward"): 10, ("router.noaux_tc", "forward"): 12}
    assert passed == {(*key, precision): count for key, count in least.items() for precision in ("fp32", "bf16", "fp64")}
    skipped = {r.reason for r in report.results if r.verdict == "SKIPPED"}
    assert all("does not take" in reason or reason == "the subject does not have it" for reason in skipped)


def test_the_example_s_bug_is_told_by_name(example: dict[str, str]) -> None:
    """On the command line: exit status 1, the case that reveals it, and the bug's name."""
    status, out, _ = leadline_says("verify", example["wrong"], "--op", "router.noaux_tc", "--precision", "fp32")
    assert status == 1
    assert "FAIL v3-negative-bias" in out
    assert "known group-mask-zero" in out
    assert "11 passed, 1 failed" in out


@pytest.mark.skipif(RUSTC is None, reason="rustc not installed")
def test_the_example_in_rust_passes(tmp_path: Path) -> None:
    """The same protocol from another language."""
    command = [str(RUSTC), "--edition", "2021", "-D", "warnings", "-o", str(tmp_path / "example"), str(EXAMPLES / "example.rs")]
    subprocess.run(command, check=True)
    report = verify(f"exec:{tmp_path}/example", op="rmsnorm", precision=["fp32", "bf16", "fp64"])
    assert report.count("PASS") == len(report.results) == 60


def test_smoke_says_every_step(example: dict[str, str]) -> None:
    """start, describe, a run of each op and direction, stop: a line each, exit status 0."""
    status, out, _ = leadline_says("smoke", example["right"])
    assert status == 0
    steps = [line.split() for line in out.splitlines()]
    assert [s[:2] for s in steps] == [["PASS", step] for step in ("start", "describe", "run", "run", "run", "stop")]
    assert [s[2:4] for s in steps[2:5]] == [["rmsnorm", "forward"], ["rmsnorm", "backward"], ["router.noaux_tc", "forward"]]


# A subject without imports that cost time. `deed` is what it does when it is asked about five rows; `ops` what it says it has.
PROGRAM = """
import json, math, os, signal, struct, sys, time

def read(path):
    data = open(path, "rb").read()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    about = {{k: v for k, v in header.items() if k != "__metadata__"}}
    return {{k: (v["shape"], struct.unpack(f"<{{(v['data_offsets'][1] - v['data_offsets'][0]) // 4}}f",
            data[end + v["data_offsets"][0]: end + v["data_offsets"][1]])) for k, v in about.items()}}

def put(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    open(path, "wb").write(struct.pack("<Q", len(text) if length is None else length) + text + data)

def say(text):
    os.write(1, text.encode() + b"\\n")

def rmsnorm(arrays, eps):
    (n, d), x = arrays["x"]
    weight = arrays["weight"][1]
    y = []
    for i in range(n):
        row = x[i * d : i * d + d]
        rstd = 1 / math.sqrt(sum(v * v for v in row) / d + eps)
        y += [v * rstd * w for v, w in zip(row, weight)]
    return (n, d), struct.pack(f"<{{n * d}}f", *y)

def header(shape, data, **other):
    return {{"y": {{"dtype": "F32", "shape": list(shape), "data_offsets": [0, len(data)], **other}}}}

def deed(asked, outputs, shape, data):
{deed}

for line in sys.stdin:
    asked = json.loads(line)
    if asked["command"] == "start":
        say({start!r})
    elif asked["command"] == "describe":
        say({describe!r})
    elif asked["command"] == "stop":
        break
    else:
        shape, data = rmsnorm(read(asked["inputs"]), asked["attrs"].get("eps", 1e-6))
        put(asked["outputs"], header(shape, data), data)
        if shape[0] != 5 or deed(asked, asked["outputs"], shape, data) is None:
            say('{{"ok": true}}')
"""
OPS: dict[str, Any] = {"rmsnorm": {"attrs": ["eps"], "precisions": ["fp32"]}}


@pytest.fixture
def program(tmp_path: Path) -> Any:
    """program(deed) writes a program and returns its spec."""

    def write(deed: str = "pass", start: str = '{"ok": true}', describe: str | None = None) -> str:
        path = tmp_path / "program.py"
        describe = json.dumps({"ops": OPS}) if describe is None else describe
        path.write_text(PROGRAM.format(deed=textwrap.indent(textwrap.dedent(deed), "    "), start=start, describe=describe))
        return f"exec:{sys.executable} -I -S {path}"

    return write


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files, in which nothing may be left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


# What it does instead of answering; the verdict of that case; words of the reason.
DEEDS = {
    "garbage": ("say('Hello, world!'); return 1", "ERROR", "answered run with 'Hello, world!'"),
    "bytes that are no text": ("os.write(1, bytes(range(128, 256)) + b'\\n'); return 1", "ERROR", "answered run with"),
    "JSON that is no object": ("say('[1, 2]'); return 1", "ERROR", "answered run with '[1, 2]'"),
    "an object without ok": ("say('{}'); return 1", "ERROR", 'expected a JSON object with "ok"'),
    "JSON too deep to read": ("say('[' * 100_000); return 1", "ERROR", "answered run with"),
    "a number of a million digits": ("say('9' * 1_000_000); return 1", "ERROR", "answered run with"),
    "half a message, then the end": (
        "os.write(1, b'{\"ok\": tr'); os._exit(0)",
        "ERROR",
        "exited with status 0 without an answer; it printed",
    ),
    "half a message, then nothing": (
        "os.write(1, b'{\"ok\": tr'); time.sleep(600)",
        "ERROR",
        "no answer within 4 s (--timeout); it printed",
    ),
    "nothing": ("time.sleep(600)", "ERROR", "no answer within 4 s (--timeout)"),
    "endless output": ("while True: os.write(1, b'x' * 65536)", "ERROR", "over a megabyte"),
    "a gigabyte of lines": ("while True: os.write(1, b'x\\n' * 32768)", "ERROR", "more than one line"),
    "two answers": ("os.write(1, b'{\"ok\": true}\\n' * 2); return 1", "ERROR", "more than one line"),
    "an early exit": ("os._exit(0)", "ERROR", "exited with status 0"),
    "an exception": ("raise KeyError('lost')", "ERROR", "exited with status 1 without an answer; its last words: KeyError: 'lost'"),
    "a crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "ERROR", "killed by SIGSEGV"),
    "a closed pipe": ("os.close(1); os.close(2); time.sleep(600)", "ERROR", "closed its pipes"),
    "a failure of its own": ('say(\'{"ok": false, "error": "out\\\\n\\\\u001b[31mof memory"}\'); return 1', "ERROR", "out ?[31mof memory"),
    "a refusal": ('say(\'{"ok": false, "kind": "refused", "error": "five is too much"}\'); return 1', "SKIPPED", "five is too much"),
    "no file": ("os.remove(outputs)", "FAIL", "outputs.safetensors cannot be read (No such file or directory)"),
    "no folder": ("import shutil; shutil.rmtree(os.path.dirname(outputs))", "FAIL", "cannot be read (No such file or directory)"),
    "a link": ("os.rename(outputs, outputs + '2'); os.symlink(outputs + '2', outputs)", "FAIL", "cannot be read"),
    "a folder for a file": ("os.remove(outputs); os.mkdir(outputs)", "FAIL", "is no regular file"),
    "a pipe for a file": ("os.remove(outputs); os.mkfifo(outputs)", "FAIL", "is no regular file"),
    "a vast file": ("open(outputs, 'r+b').truncate(1 << 40)", "FAIL", "has 1099511627776 bytes"),
    "an empty file": ("open(outputs, 'wb')", "FAIL", "has 0 bytes"),
    "a header beyond the file": ("put(outputs, header(shape, data), data, 1 << 62)", "FAIL", "has a header of 4611686018427387904 bytes"),
    "a header that is no JSON": ("put(outputs, b'{\"y\": ', data)", "FAIL", "has a damaged header"),
    "a header that is a list": ("put(outputs, b'[]', data)", "FAIL", "a header that starts with '['"),
    "a shape too large": (
        "put(outputs, header([1 << 40, 1 << 40], data), data)",
        "FAIL",
        "'y' has 10240 bytes; expected a whole number of bytes",
    ),
    "offsets beyond the data": (
        "put(outputs, header(shape, data, data_offsets=[0, 1 << 40]), data)",
        "FAIL",
        "a range within the 10240 bytes",
    ),
    "negative offsets": (
        "put(outputs, header(shape, data, data_offsets=[-8, 10232]), data)",
        "FAIL",
        "expected two integers of at least 0",
    ),
    "data that are cut off": ("put(outputs, header(shape, data), data[:-4])", "FAIL", "a range within the 10236 bytes"),
    "an unknown dtype": ("put(outputs, header(shape, data, dtype='F33'), data)", "FAIL", "has dtype 'F33'"),
    "parts of bytes": ("put(outputs, header((5, 4096), data, dtype='F4'), data)", "FAIL", "has dtype F4"),
    "another name": ("put(outputs, {'z': header(shape, data)['y']}, data)", "FAIL", "outputs.safetensors has z; y is missing"),
    "an array of no known name beside it": (
        "y, n = header(shape, data)['y'], len(data); put(outputs, {'y': y, 'rstd': {**y, 'data_offsets': [n, 2 * n]}}, data * 2)",
        "FAIL",
        "returned rstd; expected y alone",
    ),
    "another dtype": ("put(outputs, header((5, 256), data, dtype='F64'), data)", "FAIL", "y has shape (5, 256); expected (5, 512)"),
    "integers": ("put(outputs, header(shape, data, dtype='I32'), data)", "FAIL", "y is int32; expected float32"),
    "numbers that are wrong": ("put(outputs, header(shape, data), data[4:] + data[:4])", "FAIL", "y is off by"),
}


@pytest.mark.parametrize("name", DEEDS)
def test_a_misdeed_costs_its_case_and_no_other(name: str, program: Any, temporary: Path) -> None:
    """One clear line for the case, and every case before and after it passes."""
    deed, verdict, words = DEEDS[name]
    report = verify(program(deed), op="rmsnorm", precision="fp32", direction="forward", timeout=4.0, explained=False)
    assert [r.case for r in report.results if r.verdict != "PASS"] == ["latent"]
    assert report.count("PASS") == 9
    result = next(r for r in report.results if r.case == "latent")
    assert result.verdict == verdict
    assert words in result.reason
    assert result.reason.isprintable()
    assert len(result.reason) < 400
    assert str(temporary) not in result.reason


# The router's own text, its scores beside its outputs; `wrong` of them are off by a thousandth.
ROUTER = """
import json, sys
import numpy as np
from leadline.golden.safetensor_file import Reader, Writer
from leadline.ref import OPS
from leadline.ref.xp import recording

op = OPS["router.noaux_tc"]
for line in sys.stdin:
    asked = json.loads(line)
    if asked["command"] == "describe":
        print(json.dumps({{"ops": {{op.name: {{"attrs": list(op.attrs)}}}}}}), flush=True)
        continue
    if asked["command"] == "run":
        with Reader(asked["inputs"]) as file:
            arrays = {{name: np.array(file.array(name)) for name in file.keys()}}
        with recording() as shown:
            shown |= op.run("forward", arrays, asked["attrs"])
        shown = {{name: np.ascontiguousarray(x * np.float32(1.001) if name in {wrong} else x) for name, x in shown.items()}}
        dtypes = {{name: {{"f": "F32", "i": "I"}}[x.dtype.kind] for name, x in shown.items()}}
        dtypes = {{name: f"I{{8 * shown[name].itemsize}}" if d == "I" else d for name, d in dtypes.items()}}
        with Writer(asked["outputs"], [(name, dtypes[name], x.shape) for name, x in shown.items()]) as file:
            for name, x in shown.items():
                file.write(name, x)
    print('{{"ok": true}}', flush=True)
"""


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(["scores", "topk_weight"], "scores is the first that is wrong"), (["topk_weight"], "look at what comes after scores")],
)
def test_what_a_program_writes_beside_its_outputs_says_where_it_goes_wrong(wrong: list[str], words: str, tmp_path: Path) -> None:
    """As of a Python subject: the first intermediate that is wrong, or that the error is after them."""
    path = tmp_path / "router.py"
    path.write_text(ROUTER.format(wrong=wrong))
    report = verify(f"exec:{sys.executable} {path}", op="router.noaux_tc", precision="fp32", direction="forward")
    failed = [r for r in report.results if r.verdict == "FAIL"]
    assert len(failed) == len(report.results)
    told = [e.text for r in failed for e in r.explanations if e.kind == "intermediate"]
    assert len(told) >= 3
    assert all(words in text for text in told)


# What is no misdeed: the case passes, too, and nothing is left behind.
HABITS = {
    "files elsewhere in the case folder": """
        folder = os.path.dirname(outputs)
        os.mkdir(folder + "/sub")
        open(folder + "/sub/file", "w").write("mine")
        os.symlink("/", folder + "/root")
        os.chmod(folder + "/sub", 0)
    """,
    "a long log": "os.write(2, b'log\\n' * 500_000)",
    "an answer in two parts": "os.write(1, b'{\"ok\"'); time.sleep(0.3); os.write(1, b': true}\\n'); return 1",
    "a clean end after the answer was read": "pass",
}


@pytest.mark.parametrize("name", HABITS)
def test_a_habit_costs_nothing(name: str, program: Any, temporary: Path) -> None:
    """Writing files of its own or long logs, or slowly, is allowed."""
    report = verify(program(HABITS[name]), op="rmsnorm", precision="fp32", direction="forward")
    assert report.count("PASS") == len(report.results) == 10


def test_a_child_that_keeps_the_pipe_open_costs_no_time_and_is_ended(program: Any, temporary: Path, tmp_path: Path) -> None:
    """The program leaves at once, its child holds both pipes: that is seen long before the time limit, and the child is gone after it."""
    deed = f"""
        child = os.fork()
        if child == 0:
            time.sleep(600)
        open({str(tmp_path / "pid")!r}, "w").write(str(child))
        os._exit(3)
    """
    started = time.monotonic()
    report = verify(program(deed), op="rmsnorm", precision="fp32", direction="forward", timeout=100.0)
    assert time.monotonic() - started < 60
    assert report.count("PASS") == 9
    assert "exited with status 3 without an answer" in next(r.reason for r in report.results if r.verdict == "ERROR")
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while _lives(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(child)


def _lives(pid: int) -> bool:
    """Whether a process runs: an ended one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


WRONG_STARTS = {
    "a banner": ({"start": "Welcome"}, "answered start with 'Welcome'"),
    "a refusal": ({"start": '{"ok": false, "error": "no device"}'}, "does not start: it refuses to: no device"),
    "no ops": ({"describe": '{"ok": true}'}, "describes its ops as None"),
    "an unknown op": ({"describe": '{"ops": {"rmsnrom": {}}}'}, "did you mean rmsnorm?"),
    "an op that is no object": ({"describe": '{"ops": {"rmsnorm": 1}}'}, "expected an object with directions"),
    "an unknown field": ({"describe": '{"ops": {"rmsnorm": {"attr": []}}}'}, "did you mean attrs"),
    "an unknown attribute": ({"describe": '{"ops": {"rmsnorm": {"attrs": ["epsilon"]}}}'}, "did you mean eps?"),
    "attributes that are no list": ({"describe": '{"ops": {"rmsnorm": {"attrs": "eps"}}}'}, "expected a list of names"),
    "an unknown precision": ({"describe": '{"ops": {"rmsnorm": {"precisions": ["f32"]}}}'}, "did you mean fp32"),
    "a backward that is none": ({"describe": '{"ops": {"cast.bf16": {"directions": ["backward"]}}}'}, "did you mean forward?"),
    "a value that no attribute has": ({"describe": '{"ops": {"rmsnorm": {"declares": {"eps": "small"}}}}'}, "eps is 'small'"),
    "an unread input": ({"describe": '{"ops": {"rmsnorm": {"inputs": ["x"]}}}'}, "does not read weight, which rmsnorm forward needs"),
    "an unknown tie rule": ({"describe": '{"ties": "first", "ops": {"rmsnorm": {}}}'}, "expected lowest or any"),
}


@pytest.mark.parametrize("name", WRONG_STARTS)
def test_a_program_that_describes_itself_wrongly_is_one_line_and_exit_status_2(name: str, program: Any, temporary: Path) -> None:
    """What is wrong is named, with its mend, before any case."""
    keywords, words = WRONG_STARTS[name]
    status, out, err = leadline_says("verify", program(**keywords), "--op", "rmsnorm")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("exec:", (), "names no program"),
        ("exec:./no-such-program --fast", (), "the program ./no-such-program is not there"),
        ("exec:'half", (), "No closing quotation"),
        (f"exec:{__file__}", (), "make it executable"),
        ("exec:true", (), "exited with status 0"),
        ("exec:yes", (), "logs go to standard error"),
        ("exec:cat", (), "answered start with"),
        ("exec:cat", ("--framework", "torch"), "--framework is for Python's"),
    ],
)
def test_what_is_no_program_of_this_protocol_is_one_line_and_exit_status_2(spec: str, options: tuple[str, ...], words: str) -> None:
    status, out, err = leadline_says("verify", spec, "--op", "rmsnorm", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_smoke_fails_with_the_step_that_fails(program: Any, temporary: Path) -> None:
    """Exit status 1 and the reason where a run fails or the program does not end; 2 where it does not start, or is no program."""
    spec = program().replace("exec:", "exec:env ")
    path = Path(spec.split()[-1])
    right = path.read_text()
    path.write_text(
        right.replace("shape[0] != 5 or ", "").replace("def deed(asked, outputs, shape, data):", "def deed(*_):\n    os._exit(7)")
    )
    status, out, _ = leadline_says("smoke", spec)
    assert status == 1
    assert "ERROR   run       rmsnorm forward fp32, case one: it exited with status 7 without an answer" in out
    path.write_text(right.replace("        break", "        time.sleep(600)"))
    status, out, _ = leadline_says("smoke", spec)
    assert status == 1
    assert "FAIL    stop      it had to be killed" in out
    assert leadline_says("smoke", "exec:true")[0] == leadline_says("smoke", "kernels.cpu")[0] == 2


def test_an_attribute_or_precision_that_is_not_declared_is_skipped(program: Any, temporary: Path) -> None:
    """Cases that need an attribute that the program does not take, and precisions that it does not claim, say so."""
    spec = program(describe=json.dumps({"ops": {"rmsnorm": {"precisions": ["fp32"]}}}))
    report = verify(spec, op="rmsnorm", direction="forward")
    skipped = {(r.precision, r.case): r.reason for r in report.results if r.verdict == "SKIPPED"}
    assert skipped.pop(("fp32", "glm")) == "the subject does not take eps=1e-05"
    assert skipped.pop(("bf16", "glm")) == "the subject does not take eps=1e-05"
    assert set(skipped.values()) == {"it does not declare bf16"}
    assert report.count("PASS") == 9


RECORDER = """
import json, shutil, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["command"] == "run":
        shutil.copy(asked["inputs"], {kept!r})
        print(json.dumps({{"ok": False, "kind": "refused", "error": json.dumps(asked["attrs"])}}), flush=True)
    else:
        print({describe!r}, flush=True)
"""


@pytest.mark.parametrize(
    ("name", "direction", "precision", "expected"),
    [
        ("router.noaux_tc", "forward", "bf16", {"logits": "BF16", "bias": "F32"}),
        ("router.noaux_tc", "backward", "fp16", {"logits": "F16", "bias": "F32", "topk_idx": "I64", "dtopk_weight": "F16"}),
        ("router.noaux_tc", "forward", "fp64", {"logits": "F64", "bias": "F64"}),
        ("decode.e4m3fn", "forward", "fp32", {"codes": "U8"}),
        ("decode.bf16", "forward", "fp32", {"codes": "U16"}),
        ("rope", "forward", "bf16-eager", {"x": "BF16", "positions": "I64"}),
    ],
)
def test_a_program_is_handed_the_claimed_dtypes(name: str, direction: str, precision: str, expected: dict, tmp_path: Path) -> None:
    """Each input is in its own dtype and has the case's values, as another reader of the format finds them."""
    safetensors = pytest.importorskip("safetensors")
    op, kept, path = op_named(name), tmp_path / "kept.safetensors", tmp_path / "recorder.py"
    describe = json.dumps({"ok": True, "ops": {name: {"directions": [direction], "attrs": list(op.attrs)}}})
    path.write_text(RECORDER.format(kept=str(kept), describe=describe))
    vector = make(op, op.cases[0], direction, precision_named(precision))
    subject = ExecSubject(f"exec:{sys.executable} {path}")
    try:
        with pytest.raises(leadline.golden.errors.Refused) as refused:
            subject.ask(op, direction, vector.inputs, {**op.defaults, **op.cases[0].attrs}, vector.precision)
    finally:
        subject.close()
    assert json.loads(str(refused.value)) == json.loads(json.dumps({**op.defaults, **op.cases[0].attrs}))
    data = kept.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert {k: v["dtype"] for k, v in header.items() if k != "__metadata__"} == expected
    for tensor, about in safetensors.deserialize(data):
        x = vector.inputs[tensor]
        if about["dtype"] == "BF16":
            assert np.array_equal(np.frombuffer(about["data"], np.uint16), x.ravel().view(np.uint32) >> 16)
        else:
            own = x.astype(np.float16) if about["dtype"] == "F16" else x
            assert bytes(about["data"]) == own.tobytes()


def test_every_16_bit_number_travels_unchanged() -> None:
    """bfloat16 and float16 to the file and back: all values, signed zeros, infinities, subnormals; every NaN stays one."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    wide = {"BF16": (codes.astype(np.uint32) << 16).view(np.float32), "F16": codes.view(np.float16).astype(np.float32)}
    for name, fmt in {"BF16": BF16, "F16": FP16}.items():
        nan = np.isnan(wide[name])
        dtype, packed = pack(wide[name], fmt)
        assert dtype == name
        assert np.array_equal(packed.view(np.uint16)[~nan], codes[~nan])
        assert np.all(np.isnan(unpack(name, packed, "real").values[nan]))
        back = unpack(name, packed, "real")
        assert back.values.dtype == np.float32
        assert np.array_equal(back.values[~nan].view(np.uint32), wide[name][~nan].view(np.uint32))
        assert np.array_equal(unpack(name, packed, "code").values[~nan], codes[~nan])


def test_an_interrupt_leaves_no_process_and_no_file(program: Any, tmp_path: Path) -> None:
    """Ctrl-C while a program hangs: one line, exit status 130, the program and its folder gone."""
    (tmp_path / "temporary").mkdir()
    spec = program(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    command = [sys.executable, "-m", "leadline.golden.cli", "verify", spec, "--op", "rmsnorm", "--precision", "fp32"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 300
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 130, err
    assert err.strip() == "leadline: interrupted"
    assert not _lives(int((tmp_path / "pid").read_text()))
    assert list((tmp_path / "temporary").iterdir()) == []
