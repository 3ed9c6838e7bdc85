"""Shared libraries as subjects: C functions pass or fail on their merits, and one that crashes costs its case."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import leadline.golden
import pytest
from click.testing import CliRunner
from leadline.golden import verify
from leadline.golden.cli import main
from leadline.golden.ctypes_subject import CODES, CArray

HEADERS = Path(leadline.golden.__path__[0]) / "adapters"
Build = Callable[..., str]

# rmsnorm and its backward at float32 and bfloat16, and the router's weights for a choice that it is given. DEED is done at five rows.
SOURCE = """
#include "leadline.h"
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#ifndef DEED
#define DEED
#endif
#define TOLD const leadline_array *in, int n_in, leadline_array *out, int n_out, const char *attrs

static float get(const leadline_array *a, int64_t i) {
    return a->dtype == LEADLINE_BF16 ? leadline_from_bf16(((const uint16_t *)a->data)[i]) : ((const float *)a->data)[i];
}

static void set(leadline_array *a, int64_t i, double value) {
    if (a->dtype == LEADLINE_BF16) ((uint16_t *)a->data)[i] = leadline_to_bf16((float)value);
    else ((float *)a->data)[i] = (float)value;
}

static double rstd(const leadline_array *x, int64_t row, const char *attrs) {
    int64_t d = x->shape[1];
    double sum = 0;
    for (int64_t j = 0; j < d; j++) sum += (double)get(x, row * d + j) * get(x, row * d + j);
    return 1 / sqrt(sum / d + leadline_number(attrs, "eps", 0));
}

int leadline_rmsnorm(TOLD) {
    const leadline_array *x = leadline_find(in, n_in, "x"), *weight = leadline_find(in, n_in, "weight");
    if (!x || !weight || n_in != 2 || n_out != 1 || x->ndim != 2 || weight->ndim != 1) return LEADLINE_FAILED;
    if (x->dtype != LEADLINE_F32 && x->dtype != LEADLINE_BF16) return LEADLINE_REFUSED;
    int64_t n = x->shape[0], d = x->shape[1];
    if (n == 5) { DEED; }
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < d; j++) set(out, i * d + j, get(x, i * d + j) * rstd(x, i, attrs) * get(weight, j));
    if (n == 5) { AFTER; }
    return LEADLINE_OK;
}

int leadline_rmsnorm_bwd(TOLD) {
    const leadline_array *x = leadline_find(in, n_in, "x"), *weight = leadline_find(in, n_in, "weight");
    const leadline_array *dy = leadline_find(in, n_in, "dy");
    if (!x || !weight || !dy || n_out != 2 || strcmp(out[0].name, "dx") || strcmp(out[1].name, "dweight")) return LEADLINE_FAILED;
    int64_t n = x->shape[0], d = x->shape[1];
    double *dweight = calloc(d, sizeof *dweight);
    for (int64_t i = 0; i < n; i++) {
        double r = rstd(x, i, attrs), mean = 0;
        for (int64_t j = 0; j < d; j++) {
            double xhat = get(x, i * d + j) * r;
            mean += get(dy, i * d + j) * get(weight, j) * xhat / d;
            dweight[j] += get(dy, i * d + j) * xhat;
        }
        for (int64_t j = 0; j < d; j++)
            set(out, i * d + j, r * (get(dy, i * d + j) * get(weight, j) - get(x, i * d + j) * r * mean));
    }
    for (int64_t j = 0; j < d; j++) set(out + 1, j, dweight[j]);
    free(dweight);
    return LEADLINE_OK;
}

/* No groups: index outputs, and attributes that are not numbers. */
int leadline_router_noaux_tc(TOLD) {
    const leadline_array *logits = leadline_find(in, n_in, "logits"), *bias = leadline_find(in, n_in, "bias");
    const char *scoring = leadline_attr(attrs, "scoring");
    if (!scoring || strncmp(scoring, "\\"sigmoid\\"", 9) || leadline_number(attrs, "n_group", 0) != 1) return LEADLINE_REFUSED;
    if (bias->dtype != LEADLINE_F32 || out[0].dtype != LEADLINE_I64 || n_out != 2) return LEADLINE_FAILED;
    int64_t n = logits->shape[0], e = logits->shape[1], k = out[0].shape[1], *idx = out[0].data;
    double *s = malloc(e * sizeof *s);
    for (int64_t i = 0; i < n; i++) {
        double total = leadline_number(attrs, "denominator_eps", 0);
        for (int64_t j = 0; j < e; j++) s[j] = 1 / (1 + exp(-(double)get(logits, i * e + j)));
        for (int64_t slot = 0; slot < k; slot++) {
            int64_t best = -1;
            for (int64_t j = 0; j < e; j++) {
                int taken = 0;
                for (int64_t other = 0; other < slot; other++) taken |= idx[i * k + other] == j;
                if (!taken && (best < 0 || s[j] + get(bias, j) > s[best] + get(bias, best))) best = j;
            }
            idx[i * k + slot] = best;
            total += s[best];
        }
        for (int64_t slot = 0; slot < k; slot++)
            set(out + 1, i * k + slot, s[idx[i * k + slot]] / total * leadline_number(attrs, "routed_scaling_factor", 1));
    }
    free(s);
    return LEADLINE_OK;
}
#ifdef DESCRIPTION
const char *leadline_describe(void) { return DESCRIPTION; }
#endif
"""


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """build(deed, after) compiles the library, with something amiss before or after the work on five rows, and returns its spec."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc not installed")

    def compiled(deed: str = "", after: str = "", description: str | None = None, source: str = SOURCE) -> str:
        text, library = tmp_path / "library.c", tmp_path / "library.so"
        defined = f"#define DEED {deed}\n#define AFTER {after}\n"
        if description is not None:
            defined += f'#define DESCRIPTION "{description.replace(chr(34), chr(92) + chr(34))}"\n'
        text.write_text(defined + source)
        options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-shared", "-fPIC", f"-I{HEADERS}"]
        subprocess.run(["gcc", *options, "-o", str(library), str(text), "-lm"], check=True)
        return f"ctypes:{library}"

    return compiled


def test_a_library_passes_in_both_directions(build: Build) -> None:
    """Forward, backward and a choice, at both precisions; what it refuses and what it does not have is SKIPPED."""
    report = verify(build(), op=["rmsnorm", "router.noaux_tc", "swiglu"])
    assert report.verdict == "PASS"
    assert report.count("FAIL") == report.count("ERROR") == 0
    passed = {(r.op, r.direction, r.precision, r.case) for r in report.results if r.verdict == "PASS"}
    for precision in ("fp32", "bf16"):
        assert sum(p[:3] == ("rmsnorm", "forward", precision) for p in passed) == 10
        assert sum(p[:3] == ("rmsnorm", "backward", precision) for p in passed) == 10
        assert {p[3] for p in passed if p[0] == "router.noaux_tc" and p[2] == precision} >= {"kimi-k2", "moonlight"}
    skipped = {r.reason for r in report.results if r.verdict == "SKIPPED"}
    assert skipped == {"leadline_router_noaux_tc refuses", "the subject does not have it"}


# What is amiss before or after the work on five rows; the verdict of that case; words of the reason.
DEEDS = {
    "a null pointer": ("*(volatile int *)0 = 1", "", "ERROR", "SIGSEGV"),
    "an abort": ("abort()", "", "ERROR", "SIGABRT"),
    "an exit": ("_exit(0)", "", "ERROR", "exited with status 0"),
    "a hang": ("for (;;) sleep(1)", "", "ERROR", "no answer within 8 s"),
    "a status of its own": ("return 7", "", "ERROR", "leadline_rmsnorm returned 7"),
    "a refusal": ("return LEADLINE_REFUSED", "", "SKIPPED", "leadline_rmsnorm refuses"),
    "nothing written": ("return LEADLINE_OK", "", "FAIL", "y was not written"),
    "half of it written": ("n = 3", "", "FAIL", "y[3, 0] is nan"),
    "a byte after the end": ("", "((char *)out->data)[n * d * 4] = 1", "FAIL", "wrote beyond y, which has 10240 bytes"),
    "a byte before the start": ("", "((char *)out->data)[-1] = 1", "FAIL", "wrote beyond y"),
    "an input that is written": ("", "((float *)x->data)[0] += 1", "FAIL", "x was changed in place"),
    "a row of zeros": ("", "memset(out->data, 0, d * 4)", "FAIL", "y is off by"),
}


@pytest.mark.parametrize("name", DEEDS)
def test_a_misdeed_costs_its_case_and_no_other(name: str, build: Build) -> None:
    """The process may die; every other case passes."""
    deed, after, verdict, words = DEEDS[name]
    report = verify(build(deed, after), op="rmsnorm", precision="fp32", direction="forward", timeout=8.0, explained=False)
    assert [(r.case, r.verdict) for r in report.results if r.verdict != "PASS"] == [("latent", verdict)]
    result = next(r for r in report.results if r.case == "latent")
    assert words in result.reason
    assert "\n" not in result.reason
    assert report.count("PASS") == 9


def test_a_description_says_what_the_library_has(build: Build) -> None:
    """With leadline_describe only what it names is asked: ops, precisions, attributes."""
    spec = build(description='{"ops": {"rmsnorm": {"precisions": ["fp32"]}}}')
    report = verify(spec, op=["rmsnorm", "router.noaux_tc"], precision=["fp32", "bf16"])
    assert {(r.op, r.direction) for r in report.results if r.case != "-"} == {("rmsnorm", "forward")}
    skipped = {(r.precision, r.case): r.reason for r in report.results if r.verdict == "SKIPPED" and r.case != "-"}
    assert skipped.pop(("fp32", "glm")) == skipped.pop(("bf16", "glm")) == "the subject does not take eps=1e-05"
    assert set(skipped.values()) == {"it does not declare bf16"}


WRONG = {
    "a description that is none": ("rmsnorm", "leadline_describe returns b'rmsnorm'"),
    "an op that it does not export": ('{"ops": {"swiglu": {}}}', "describes swiglu forward but exports no leadline_swiglu"),
    "an unknown op": ('{"ops": {"rmsnrom": {}}}', "did you mean rmsnorm?"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_description_is_one_line_and_exit_status_2(name: str, build: Build) -> None:
    description, words = WRONG[name]
    result = CliRunner().invoke(main, ["verify", build(description=description), "--op", "swiglu"])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert words in result.stderr


def test_what_is_no_library_is_one_line_and_exit_status_2(build: Build, tmp_path: Path) -> None:
    """A file that is not there, is no library, or exports nothing of use; an option that is Python's."""
    text = tmp_path / "text.so"
    text.write_text("hello")
    empty = build(source="int other;")
    for spec, options, words in (
        ("ctypes:no/such.so", [], "there is no file no/such.so"),
        ("ctypes:", [], "expected ctypes:LIB.so"),
        (f"ctypes:{text}", [], "does not load"),
        (empty, [], "exports no function of an op"),
        (empty, ["--framework", "torch"], "--framework is for Python's"),
    ):
        result = CliRunner().invoke(main, ["verify", spec, "--op", "rmsnorm", *options])
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert words in result.stderr


def test_the_header_says_what_python_says(build: Build, tmp_path: Path) -> None:
    """The dtypes' numbers and the struct's layout, as a C compiler has them; the header is C++ too."""
    fields = ("data", "dtype", "ndim", "shape", "name")
    values = [*(f"LEADLINE_{name}" for name in CODES), "sizeof(leadline_array)", *(f"offsetof(leadline_array, {f})" for f in fields)]
    text = f'#include <stddef.h>\n#include "leadline.h"\nconst long facts[] = {{{", ".join(f"(long)({v})" for v in values)}}};\n'
    library = ctypes.CDLL(build(source=text).removeprefix("ctypes:"))
    facts = list((ctypes.c_long * len(values)).in_dll(library, "facts"))
    assert facts == [*CODES.values(), ctypes.sizeof(CArray), *(getattr(CArray, f).offset for f in fields)]
    if shutil.which("g++"):
        cpp = tmp_path / "header.cpp"
        cpp.write_text('#include "leadline.h"\nint main() { return leadline_to_bf16(1.0f) != 0x3F80; }\n')
        subprocess.run(
            ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{HEADERS}", "-o", str(tmp_path / "header"), str(cpp)], check=True
        )
        assert subprocess.run([str(tmp_path / "header")], check=False).returncode == 0
