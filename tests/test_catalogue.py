"""The catalogue: nothing is dropped silently, every entry says what it is, and the commands print it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from leadline.golden import catalogue
from leadline.golden.catalogue import entries, registry, unwritten, written
from leadline.golden.cli import main
from leadline.golden.errors import UsageError
from leadline.golden.precision import PRECISIONS
from leadline.golden.vectors import directions
from leadline.ref.op import OPS

ENTRIES = registry()["bugs"]
WAITING = "Its op is not here yet"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments, catch_exceptions=False, env={"COLUMNS": "160"})


def test_the_registry_has_every_bug_that_was_met() -> None:
    """150 entries, each once, with what the catalogue needs of it."""
    ids = [e["id"] for e in ENTRIES]
    assert len(ids) == len(set(ids)) == 150
    for e in ENTRIES:
        assert e["kind"] in ("bug", "variant", "benign"), e
        assert e["severity"] in ("high", "medium", "low", "none"), e
        assert (e["severity"] == "none") <= (e["kind"] != "bug"), e
        assert e["evidence"] in catalogue.EVIDENCE, e
        assert e["inputs"].endswith("."), e
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", source) for source in e["sources"]), e


def test_an_entry_is_written_or_says_why_not() -> None:
    """Each id has a variant, or is an attribute's value, or has a reason in golden/bugs or in the registry: one of these, never two."""
    variants, reasons = {bug.id for bug in written()}, unwritten()
    for e in ENTRIES:
        ways = [e["id"] in variants, "attribute" in e, e["id"] in reasons, "reason" in e]
        assert sum(ways) == 1, (e["id"], ways)
        assert (e["id"] in variants) != ("what" in e), f"{e['id']}: what goes wrong is said once, by the variant if there is one"
    known = {e["id"] for e in ENTRIES}
    assert reasons.keys() <= known
    assert all(len(entry.reason) > 40 for entry in entries().values() if entry.reason)


def test_an_op_that_is_waited_for_is_not_here() -> None:
    """Once an op is declared, the entries that waited for it must be written."""
    later = ("grpo", "kl", "adamw")
    waiting = [e for e in ENTRIES if e.get("reason", "").startswith(WAITING)]
    assert waiting
    assert not [name for name in OPS if name.split(".")[0] in later], "write the entries that wait for these ops"


def test_every_bug_names_what_goes_wrong_and_how_severe_it_is() -> None:
    """Through the registry or by itself; and the registry rates nothing that is not there."""
    for entry in entries().values():
        assert entry.severity in ("high", "medium", "low", "none"), f"{entry.id}: golden/bugs/registry.json does not rate it"
        assert all(sentence.endswith((".", "?")) and ops for sentence, ops in entry.what), entry
        assert entry.directions != ("",), entry
    rated = [id for ids in registry()["severity"].values() for id in ids]
    assert len(rated) == len(set(rated))
    assert set(rated) == {id for id, e in entries().items() if e.evidence == "ours"}


def test_written_entries_are_of_ops_that_are_here() -> None:
    for entry in entries().values():
        if not entry.reason:
            assert entry.bugs
            assert set(entry.ops) <= OPS.keys(), entry


def test_an_attribute_entry_is_another_value_of_the_ops_attribute() -> None:
    """A convention that no variant stands for: its value is one of the attribute's, and not the default."""
    found = [e["attribute"] for e in ENTRIES if "attribute" in e]
    assert found
    for about in found:
        op = OPS[about["op"]]
        assert op.defaults[about["name"]] != about["value"]
        assert about["value"] in str(op.attrs[about["name"]].annotation)
        assert set(about["precisions"]) <= PRECISIONS.keys()
        for precision in PRECISIONS:
            conventions = catalogue.conventions(op, "forward", precision)
            assert [dict(b.attrs) for b in conventions] == [{about["name"]: about["value"]}] * (precision in about["precisions"])


def test_bugs_lists_all_and_json_has_as_many() -> None:
    table, lines = run("bugs"), run("bugs", "--json")
    assert table.exit_code == lines.exit_code == 0
    found = [json.loads(line) for line in lines.output.splitlines()]
    assert [f["id"] for f in found] == list(entries())
    assert all(f["id"] in table.output for f in found)
    assert f"{len(found)} entries, 150 of them" in table.output
    group = next(f for f in found if f["id"] == "group-mask-zero")
    assert group["caught"]["fp32"]["router.noaux_tc"], "no stored vector catches it"
    assert "https://github.com/vllm-project/vllm/issues/13474" in group["sources"]


def test_bugs_of_an_op_and_those_that_are_not_written() -> None:
    of_rmsnorm = [json.loads(line)["id"] for line in run("bugs", "--op", "rmsnorm", "--json").output.splitlines()]
    assert "rmsnorm-bwd-gamma" in of_rmsnorm
    assert "rmsnorm-weight-multiply-dtype" in of_rmsnorm
    assert "group-mask-zero" not in of_rmsnorm
    missing = [json.loads(line) for line in run("bugs", "--unwritten", "--json").output.splitlines()]
    assert all(f["reason"] for f in missing)
    assert "adamw-decay-after-update" in [f["id"] for f in missing]
    assert WAITING in run("bugs", "--unwritten").output


@pytest.mark.parametrize("id", ["lse-base2-vs-e", "rmsnorm-weight-multiply-dtype", "adamw-decay-after-update", "rmsnorm-unit-offset"])
def test_bugs_show_tells_all(id: str) -> None:
    """A bug with threads and vectors, a convention with its option, one that is not written, and one of ours."""
    result, entry = run("bugs", "show", id), entries()[id]
    assert result.exit_code == 0
    links = map(catalogue.link, entry.sources)
    for text in (id, entry.severity, entry.inputs, entry.reason, entry.declared, *(s for s, _ in entry.what), *links):
        assert text in result.output
    assert ("caught at fp32" in result.output) == (id in ("lse-base2-vs-e", "rmsnorm-unit-offset"))
    assert ("--attr cast_order=cast_then_weight" in result.output) == (id == "rmsnorm-weight-multiply-dtype")


def test_an_unknown_id_is_one_line_with_near_ids() -> None:
    result = run("bugs", "show", "group-mask-zeros")
    assert result.exit_code == 2
    assert "unknown bug 'group-mask-zeros'; did you mean group-mask-zero" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert run("bugs", "--op", "rmsnrm").exit_code == 2


def test_a_link_is_an_address_or_what_it_was() -> None:
    assert catalogue.link("a/b#3") == "https://github.com/a/b/issues/3"
    assert catalogue.link("DeepSeek-V3 paper, App. B.2") == "DeepSeek-V3 paper, App. B.2"
    sources = entries()["wgrad-x-original"].sources
    assert sources, sources
    assert all(not s.startswith("#") for entry in entries().values() for s in entry.sources)


def test_a_registry_of_another_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "registry.json"
    path.write_text('{"schema": "leadline.bugs/9"}')
    monkeypatch.setattr(catalogue, "REGISTRY", path)
    registry.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"registry.json: schema is 'leadline.bugs/9'; expected 'leadline.bugs/1'"):
            registry()
    finally:
        registry.cache_clear()


def test_every_direction_of_a_bug_is_one_of_its_ops() -> None:
    for bug in written():
        for name in bug.ops:
            assert any(bug.touches(way) for way in directions(OPS[name])), bug.id
