"""Reports of a run: JSON lines that the schema describes, and the HTML, JUnit and Markdown that are made from them alone."""

import json
import math
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from leadline.golden import maps, verify
from leadline.golden.cli import main
from leadline.golden.explain import Explanation
from leadline.golden.html import html
from leadline.golden.outputs import unwritable
from leadline.golden.precision import PRECISIONS
from leadline.golden.report import evidence
from leadline.golden.runs import Run, read
from leadline.golden.summaries import junit, markdown
from leadline.golden.verify import CaseResult, Report
from leadline.ref import OPS

SCHEMA = json.loads((Path(maps.__file__).parent / "schema" / "report.schema.json").read_text())
HOSTILE = "<script>document.title = 'ran'; window.ran = 1</script> ]]> ``` | \x1b[31m \x00 [x](javascript:alert(1)) &amp; </td></details>"

SUBJECT = f"""
import numpy as np
from leadline.ref import OPS

def rmsnorm(x, weight, eps):
    return x / (np.sqrt((x * x).mean(-1, keepdims=True)) + np.float32(eps)) * weight

def attention(q, k, v, sink=None, **attrs):
    o, lse = OPS["attention"].fwd(q, k, v, sink, **attrs)[0]
    o = o.copy()
    o[:, :, 1:2] *= np.float32(1.001)
    return o, lse

def router_softmax(logits, **attrs):
    raise RuntimeError({HOSTILE!r})

def encode_e4m3fn(x, random=None, **attrs):
    codes = OPS["encode.e4m3fn"].fwd(x, random, **attrs)[0].copy()
    codes[5:6] ^= 1
    return codes
"""
OPTIONS = [word for op in ("rmsnorm", "attention", "router.softmax", "encode.e4m3fn") for word in ("--op", op)]


def leadline(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(arguments), env={"COLUMNS": "200"}, input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


class Made:
    """One run of a subject with every kind of mistake, and its reports."""

    def __init__(self, folder: Path):
        self.subject = folder / "mine.py"
        self.subject.write_text(SUBJECT)
        cases = ["small", "square", "v2*", "one", OPS["encode.e4m3fn"].cases[0].name]
        words = [w for case in cases for w in ("--case", case)]
        self.files = {name: folder / "out" / f"report.{name}" for name in ("html", "junit", "markdown", "jsonl")}
        files = [w for name, path in self.files.items() for w in (f"--{name}", str(path))]
        self.status, self.out, self.err = leadline(
            "verify", str(self.subject), *OPTIONS, "--precision", "fp32", "--seed", "1", *words, "--maps", *files
        )
        self.text = {name: path.read_text(encoding="utf-8") for name, path in self.files.items()}
        self.lines = [json.loads(line) for line in self.text["jsonl"].splitlines()]
        self.results = self.lines[1:-1]

    def of(self, op: str, verdict: str = "FAIL") -> dict[str, Any]:
        return next(r for r in self.results if r["op"] == op and r["verdict"] == verdict)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("reports"))


# JSON lines


def test_every_line_is_what_the_schema_says_and_the_schema_describes_every_field(made: Made) -> None:
    """Header, results and totals are valid, and no field is written that the schema does not name."""
    assert made.status == 1
    for line, kind in zip(made.lines, ["header", *["result"] * len(made.results), "total"], strict=True):
        jsonschema.validate(line, {**SCHEMA, "anyOf": [{"$ref": f"#/$defs/{kind}"}]})
        assert set(line) <= set(SCHEMA["$defs"][kind]["properties"])
    found = [e for r in made.results for e in r["explanations"]]
    assert found
    assert {key for e in found for key in e} <= set(SCHEMA["$defs"]["explanation"]["properties"])
    drawn = [m for r in made.results for m in r["maps"].values()]
    assert {key for m in drawn for key in m} == set(SCHEMA["$defs"]["map"]["properties"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**made.results[0], "verdict": "GOOD"}, SCHEMA)


def test_the_header_says_what_was_run_and_what_was_not_asked(made: Made) -> None:
    """The command asks the same again; the ops, precisions and directions that were left out are named."""
    header = made.lines[0]
    assert shlex.split(header["command"])[:3] == ["leadline", "verify", str(made.subject)]
    assert "swiglu" in header["not_asked"]["ops"]
    assert "rmsnorm" not in header["not_asked"]["ops"]
    assert "bf16" in header["not_asked"]["precisions"]
    assert header["options"]["seed"] == [1]


def test_digests_are_those_of_the_vector_files(tmp_path: Path) -> None:
    """What sha256sum says of the index that was read."""
    path = tmp_path / "run.jsonl"
    assert leadline("verify", "ref", "--op", "rmsnorm", "--precision", "fp32", "--case", "one", "--jsonl", str(path))[0] == 0
    digests = json.loads(path.read_text().splitlines()[0])["digests"]
    assert list(digests) == ["rmsnorm/fp32"]
    index = Path(maps.__file__).parent / "vectors" / "rmsnorm" / "fp32.json"
    said = subprocess.run(["sha256sum", str(index)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert digests["rmsnorm/fp32"] == said


# Error maps


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 200), st.integers(1, 200), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_cell_is_the_largest_error_of_what_it_covers(seed: int, depth: int, rows: int, columns: int, unjudged: float) -> None:
    """Element by element: every error lies in the one cell that covers it, and each cell holds the largest of its own with its sign."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((rows, depth, columns)) * 10
    z[rng.random(z.shape) < unjudged] = np.nan
    z[rng.random(z.shape) < 0.01] = np.inf
    cells, count, cell = maps.reduced(z, (0,), (2,))
    assert count == (rows, columns)
    assert all(n <= maps.CELLS and n == math.ceil(c / w) and w & (w - 1) == 0 for n, c, w in zip(cells.shape, count, cell, strict=True))
    best: dict[tuple[int, int], float] = {}
    for (i, _, j), value in np.ndenumerate(z):
        at = (i // cell[0], j // cell[1])
        if not math.isnan(value) and abs(value) >= abs(best.get(at, 0.0)):
            best[at] = value
    for at, value in np.ndenumerate(cells):
        assert (math.isnan(value) and at not in best) or abs(best[at]) == abs(value)
        assert at not in best or any(v == value for v in z[at[0] * cell[0] : (at[0] + 1) * cell[0], :, at[1] * cell[1] :].ravel())


def test_heads_and_positions_come_first_and_the_wrong_head_is_seen(made: Made) -> None:
    """o[b,s,h,v] is b·h × s; the head whose output was scaled is many σ off, the other is not."""
    o = made.of("attention")["maps"]["o"]
    view = o["views"][0]
    assert view["axes"] == ["b · h", "s"]
    assert view["count"] == [o["shape"][0] * o["shape"][2], o["shape"][1]]
    wrong, right = ([abs(v) for v in view["cells"][h]] for h in (1, 0))
    assert max(right) < 8 < 64 < max(wrong)
    assert o["views"][1]["axes"] == ["b · s · h", "v"]
    assert {w["at"][2] for w in o["worst"]} == {1}


def test_the_map_is_of_the_error_that_was_judged(made: Made) -> None:
    """The histogram counts every judged element, and the map's errors have the statistic that the judge found."""
    result = made.of("rmsnorm")
    y = result["maps"]["y"]
    assert sum(y["histogram"]) == y["judged"] == math.prod(y["shape"])
    cells = np.abs(np.array(y["views"][0]["cells"], dtype=np.float64))
    wide = math.sqrt(np.mean(cells**2))  # of the largest in each cell, of three digits
    assert 1.01 * wide >= result["statistics"]["y"]["rms"] >= 0.3 * wide
    assert abs(y["worst"][0]["error"]) == np.max(cells)


def test_what_is_judged_bit_for_bit_is_mapped_by_what_differs(made: Made) -> None:
    """One code was changed: one cell says so, and the worst element is that one."""
    codes = made.of("encode.e4m3fn")["maps"]["codes"]
    assert (codes["unit"], codes["wrong"], codes["histogram"]) == ("differs", 1, None)
    assert [w["at"] for w in codes["worst"]] == [[5]]
    assert sum(v == 1 for row in codes["views"][0]["cells"] for v in row) == 1


def test_only_failing_cases_have_maps_unless_all_are_asked_for() -> None:
    """A PASS costs no map; maps=True makes one of every case that answered."""

    def rmsnorm(x: Any, weight: Any, eps: float) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * weight

    for asked in (False, True):
        (result,) = verify(rmsnorm, op="rmsnorm", precision="fp32", cases=["one"], maps=asked).results
        assert (result.verdict, bool(result.maps)) == ("PASS", asked)


def test_a_wrong_shape_has_no_map() -> None:
    """Nothing could be compared, so nothing is drawn."""

    def cut(x: Any, weight: Any) -> Any:
        return x[:, :-1]

    (result,) = verify(cut, op="rmsnorm", precision="fp32", cases=["small"]).results
    assert (result.verdict, dict(result.maps)) == ("FAIL", {})


def test_infinities_are_mapped_without_a_word() -> None:
    """∞ where ∞ is due is no error, ∞ where a number is due is infinitely many σ; NumPy's warnings are not the user's."""
    got, truth, sigma = np.array([np.inf, np.inf, 1.0, -np.inf]), np.array([np.inf, 1.0, 1.0, np.inf]), np.array([0.0, 0.1, 0.1, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z = maps.deviations(got, truth, sigma, np.ones(4, dtype=bool), PRECISIONS["fp32"])
    assert np.array_equal(z, [0.0, np.inf, 0.0, np.inf])


def test_the_evidence_says_no_more_than_is_known() -> None:
    """A coefficient of 1 has its digits, and millions of deviations are not told as 9999."""
    sure, some = Explanation("a", "A.", coefficient=1.0, significance=3.2e6), Explanation("a", "A.", coefficient=0.01923, significance=37.2)
    assert evidence(sure) == "[1.00 of its difference is there, over 9999 deviations from chance.] "
    assert evidence(some) == "[0.0192 of its difference is there, 37 deviations from chance.] "
    assert evidence(Explanation("a", "A.")) == ""


def test_the_histogram_counts_by_halves_of_sigma() -> None:
    """Counted one by one; what is not judged is in no bin, what is infinite in the last."""
    z = np.array([-np.inf, -8.01, -8.0, -0.1, 0.0, 0.49, 0.5, 7.99, 8.5, np.inf, np.nan])
    expected = [0] * 34
    for value in z[~np.isnan(z)]:
        expected[0 if value < -8 else 33 if value >= 8.0 else 1 + int((value + 8) // 0.5)] += 1
    assert maps.histogram(z) == expected


# Reports from the lines


def test_reports_need_nothing_but_the_lines(made: Made, tmp_path: Path) -> None:
    """`leadline report` makes of the lines, from a file or a pipe, what the run itself made."""
    for source, stdin in ((str(made.files["jsonl"]), None), ("-", made.text["jsonl"])):
        again = {name: tmp_path / name for name in ("html", "junit", "markdown")}
        words = [w for name, path in again.items() for w in (f"--{name}", str(path))]
        assert leadline("report", source, *words, stdin=stdin) == (0, "", "")
        assert {name: path.read_text(encoding="utf-8") for name, path in again.items()} == {name: made.text[name] for name in again}


def test_the_command_of_a_case_asks_that_case_again(made: Made) -> None:
    """The line under a failing case, run as it stands, has one case with the same verdict and reason."""
    run = read("lines", made.text["jsonl"])
    result = next(r for r in run.report.results if r.verdict == "FAIL")
    words = shlex.split(run.reproduce(result))
    status, out, _ = leadline(*words[1:], "--json")
    (again,) = [json.loads(line) for line in out.splitlines()[1:-1]]
    assert status == 1
    assert (again["case"], again["verdict"], again["reason"]) == (result.case, result.verdict, result.reason)


def test_an_interrupted_run_is_told_as_one(made: Made, tmp_path: Path) -> None:
    """Without the totals, or with a torn last line, every report says that it is not the whole."""
    whole = made.text["jsonl"].splitlines()
    torn = tmp_path / "torn.jsonl"
    for lines in (whole[:-1], [*whole[:-2], whole[-2][: len(whole[-2]) // 2]]):
        torn.write_text("\n".join(lines))
        words = [w for name in ("html", "markdown") for w in (f"--{name}", str(tmp_path / name))]
        assert leadline("report", str(torn), *words)[0] == 0
        assert "interrupted" in (tmp_path / "html").read_text()
        assert "interrupted" in (tmp_path / "markdown").read_text()
    assert "interrupted" not in made.text["html"]


LINES = {
    "an empty file": ("", "is empty"),
    "no JSON": ("hello\n{}\n", "line 1 is no JSON object"),
    "another schema": ('{"schema": "leadline.report/9"}\n', "expected 'leadline.report/1'"),
    "another's lines": ('{"a": 1}\n', "expected 'leadline.report/1'"),
    "a result without a verdict": ('{"schema": "leadline.report/1"}\n{"subject": "x"}\n', "line 2: op is None"),
    "a torn line within": ('{"schema": "leadline.report/1"}\n{"subj\n{"total": {}}\n', "line 2 is no JSON object"),
    "a map that is none": (
        '{"schema": "leadline.report/1"}\n{"subject": "x", "op": "y", "direction": "forward", "precision": "p", "case": "c", "seed": 0, '
        '"verdict": "FAIL", "maps": {"y": {"unit": 1}}}\n',
        "line 2 is no result",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_that_are_no_report_are_one_line_and_exit_status_2(name: str, tmp_path: Path) -> None:
    """The file and the line are named; nothing is written."""
    text, expected = LINES[name]
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    status, out, err = leadline("report", str(path), "--html", str(tmp_path / "r.html"))
    assert (status, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_wrong_use_of_the_report_options_is_one_line(made: Made, tmp_path: Path) -> None:
    """Nothing to make, no such file, one file for two reports, an unknown case."""
    lines, one = str(made.files["jsonl"]), str(tmp_path / "x")
    for words, expected in (
        (["report", lines], "name what to make"),
        (["report", "nowhere.jsonl", "--html", one], "nowhere.jsonl"),
        (["report", lines, "--html", one, "--junit", one], "named for two reports"),
        (["verify", "--op", "rmsnorm", "--case", "smal"], "did you mean small"),
    ):
        status, out, err = leadline(*words)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert expected in err


def test_a_report_that_cannot_be_written_costs_one_line_and_not_the_run(tmp_path: Path) -> None:
    """A folder that is a file, a path that is a folder, a full disk: told once each; the table and the other reports are there."""
    (tmp_path / "file").write_text("")
    good = tmp_path / "deep" / "er" / "r.xml"
    words = ["verify", "ref", "--op", "rmsnorm", "--precision", "fp32", "--case", "one"]
    bad = ["--html", str(tmp_path / "file" / "r.html"), "--markdown", str(tmp_path), "--jsonl", "/dev/full"]
    status, out, err = leadline(*words, *bad, "--junit", str(good))
    assert status == 2  # it passed, but what was asked for is not there
    assert "PASS  2 passed" in out
    assert ET.fromstring(good.read_text()).get("tests") == "2"
    assert [line.split(" cannot be written")[0].split()[1] for line in err.splitlines()] == ["--html", "--markdown", "--jsonl"]
    assert (tmp_path / "file").read_text() == ""
    assert leadline(*words, "--json", "--html", str(tmp_path / "file" / "r.html"))[1].count("\n") == 4


def test_looking_whether_a_file_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    """No empty file where none was, and what was there is as it was."""
    assert unwritable(tmp_path / "new") is None
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").write_text("kept")
    assert unwritable(tmp_path / "old") is None
    assert (tmp_path / "old").read_text() == "kept"


# What a subject printed is text

TEXT = st.text(st.one_of(st.characters(), st.sampled_from("<>&\"'`|\\[]\x00\x1b\n\ud800")), max_size=60).map(lambda text: f"x{text}")


def run_of(text: str) -> Run:
    """One failing case whose every string a subject may choose is this text."""
    result = CaseResult(text, "rmsnorm", "forward", "fp32", "one", 0, "FAIL", reason=text, attrs={"eps": text})
    return Run({"versions": {"leadline": text}, "command": text}, Report([result]), True)


class Page(HTMLParser):
    """The tags and the text of a page, as a browser tells them apart."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: set[tuple[str, str]] = set()
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@given(TEXT)
def test_no_text_becomes_markup(text: str) -> None:
    """A page about any text has the tags of a page about a plain one, and shows the text. Without escaping it would not."""
    plain, page = Page(html(run_of("plain"))), Page(html(run_of(text)))
    assert page.tags == plain.tags
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    assert text.replace("\r", "") in "".join(page.text).replace("\r", "")


def test_an_unescaped_page_is_told_apart() -> None:
    """The mutant: the same page with the text as it is has other tags."""
    page = html(run_of("<i>x</i>"))
    assert Page(page.replace("&lt;i&gt;x&lt;/i&gt;", "<i>x</i>")).tags != Page(page).tags


@given(TEXT)
def test_junit_is_xml_whatever_was_printed(text: str) -> None:
    """It parses, and holds every character that XML can hold."""
    root = ET.fromstring(junit(run_of(text)).encode("utf-8"))
    message = root.findall(".//failure")[0].get("message", "")
    for character in text:
        assert character in message or not (character in "\t\n\r" or " " <= character <= "\ud7ff") or character in "\r\n\t"


@given(TEXT)
def test_markdown_keeps_its_lines(text: str) -> None:
    """The table's rows have the columns of the head, and no tag, link or code begins within the text."""
    lines = markdown(run_of(text)).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    told = next(line for line in lines if line.startswith("- ❌"))
    told = re.sub(r"\\[\\*_\[\]~]|&#\d+;", "", told.split("**", 2)[2])
    assert not re.search(r"[<>`\[\]|*_~\\]", told)


def test_junit_has_the_form_that_ci_servers_read(made: Made) -> None:
    """testsuites, testsuite, testcase; counts that add up; at most one outcome a case."""
    root = ET.fromstring(made.text["junit"].encode("utf-8"))
    assert root.tag == "testsuites"
    cases = 0
    for suite in root:
        assert suite.tag == "testsuite"
        found = suite.findall("testcase")
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.attrib[attribute]) == len(suite.findall(f"testcase/{tag}"))
        assert int(suite.attrib["tests"]) == len(found)
        assert all({"name", "classname", "time"} == set(case.attrib) and len(case) <= 1 for case in found)
        cases += len(found)
    totals = made.lines[-1]["total"]
    assert (int(root.attrib["tests"]), int(root.attrib["failures"])) == (cases, totals["fail"])
    assert int(root.attrib["errors"]) == totals["error"]


def test_the_page_fetches_nothing_and_tells_what_was_found(made: Made) -> None:
    """No address but in links; the verdicts, the known bug, the command of a case and what was not checked are there."""
    page = Page(made.text["html"])
    assert not {name for name, value in page.attributes if "//" in value and name != "href"} - {"content"}
    assert not {"img", "link", "iframe", "object", "embed"} & set(page.tags)
    assert page.tags.count("script") == 2
    text = "".join(page.text)
    for part in ("rmsnorm-eps-outside", "Not checked", "swiglu", "--case small", HOSTILE, made.lines[0]["versions"]["numpy"]):
        assert part in text
    assert "url(" not in text


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
# The page in a frame of 360 pixels, every case opened; what is seen there goes into the title of this one.
FRAME = """<!doctype html><title>waiting</title><iframe style="width:360px;height:800px;border:0"></iframe><script>
const frame = document.querySelector("iframe");
frame.srcdoc = %s;
frame.onload = () => setTimeout(() => {
  const page = frame.contentDocument;
  for (const d of page.querySelectorAll("details")) d.open = true;
  setTimeout(() => {
    const canvases = [...page.querySelectorAll("canvas")].sort((a, b) => b.width * b.height - a.width * a.height), canvas = canvases[0];
    const told = canvas && canvas.closest(".map").querySelector("output"), read = [], colours = new Set();
    for (const c of canvases) {
      const data = new Uint32Array(c.getContext("2d").getImageData(0, 0, c.width, c.height).data.buffer);
      for (const pixel of data) colours.add(pixel);
    }
    if (canvas) {
      canvas.focus();
      canvas.dispatchEvent(new frame.contentWindow.FocusEvent("focus"));
      read.push(told.textContent);
      for (const key of ["ArrowUp", "ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowDown"]) {
        canvas.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
        read.push(told.textContent);
      }
    }
    const focusable = [...page.querySelectorAll("a[href], summary, canvas, [role=region]")];
    document.title = JSON.stringify({
      overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth, width: page.documentElement.clientWidth,
      ran: !!frame.contentWindow.ran, title: page.title, colours: colours.size,
      canvases: canvases.length, read, stuck: focusable.filter((e) => e.tabIndex < 0).length,
      table: Math.max(...[...page.querySelectorAll(".scroll")].map((e) => e.scrollWidth - e.clientWidth)),
    });
  }, 300);
}, 300);
</script>"""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """browse(page): what a browser makes of it."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here (chromium, chromium-browser or google-chrome)")

    def look(page: str) -> dict[str, Any]:
        path = tmp_path / "frame.html"
        path.write_text(FRAME % json.dumps(page).replace("<", "\\u003c"), encoding="utf-8")
        words = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
        seen = subprocess.run([*words, path.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
        title = re.findall(r"<title>(.*?)</title>", seen, re.S)[0]
        return json.loads("".join(Page(f"<p>{title}</p>").text))

    return look


def test_the_page_works_at_phone_width_by_keyboard_and_runs_no_subjects_script(made: Made, browse: Callable[[str], dict]) -> None:
    """At 360 pixels nothing overflows but tables in their own boxes; maps are drawn and read by arrow keys; nothing that a subject printed
    runs, even without the page's policy."""
    for page in (made.text["html"], re.sub(r"<meta http-equiv=[^>]*>", "", made.text["html"])):
        seen = browse(page)
        assert seen["overflow"] == 0
        assert 300 < seen["width"] <= 360
        assert seen["table"] > 0  # a wide table is there, and scrolls in its box
        assert (seen["ran"], seen["stuck"]) == (False, 0)
        assert seen["title"].startswith("Leadline: ERROR")
        views = [v for r in made.results for m in r["maps"].values() if m["wrong"] != 0 for v in m["views"]]
        assert seen["canvases"] == len(views)
        assert seen["colours"] >= 5
        worst = {max((v for row in view["cells"] for v in row), key=lambda v: abs(float(v))) for view in views}
        assert seen["read"][0].endswith(tuple(f": {v:+g} σ" if v < 1e6 else f": +{v} σ" for v in worst))
        assert len(set(seen["read"])) >= 3  # the arrow keys move


def test_a_browser_tells_a_page_that_is_wrong(made: Made, browse: Callable[[str], dict]) -> None:
    """The mutant: unescaped and without its policy, the subject's script runs; a wide element makes the page overflow."""
    page = re.sub(r"<meta http-equiv=[^>]*>", "", made.text["html"]).replace("&lt;", "<").replace("&gt;", ">").replace("&#x27;", "'")
    seen = browse(page.replace("<main", '<div style="width:500px">wide</div><main', 1))
    assert seen["ran"]
    assert seen["overflow"] > 0
