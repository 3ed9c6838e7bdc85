"""The kill matrix's records, counted: bugs that fail and are named by precision and op, false alarms, what survives, what is misnamed."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ref.op import OPS, op_named
from .catalogue import entries
from .field import METRICS
from .power import CORRECT
from .power_sample import recipes_of
from .precision import PRECISIONS

SAME = 1e-9  # relative: fingerprints that are no further apart are of one function
OURS, ROUNDED = "leadline", "rounded"
JUDGES = (OURS, ROUNDED, *METRICS)
SHOWN = dict(zip((OURS, *METRICS), ("ours", "allclose", "assert", "calc_diff", "cosine", "85%"), strict=True))
Record = Mapping[str, Any]
WANTED = {"fp32": 1.0, "bf16": 0.9}  # the share of bugs that fail
NAMED = 0.95  # the share of them that are named first, at fp32


@dataclass
class Count:
    """Bugs of an op at a precision, how many each judge kills, and the same by case; cases of the reference and false alarms on them."""

    bugs: int = 0
    killed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(JUDGES, 0))
    cases: int = 0
    cases_killed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(JUDGES, 0))
    asked: int = 0
    first: int = 0
    correct: int = 0
    alarms: dict[str, int] = field(default_factory=lambda: dict.fromkeys(JUDGES, 0))

    def add(self, other: "Count") -> None:
        for name in ("bugs", "cases", "asked", "first", "correct"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("killed", "cases_killed", "alarms"):
            for judge, count in getattr(other, name).items():
                getattr(self, name)[judge] += count


@dataclass
class Matrix:
    """The records, counted."""

    rows: dict[str, dict[str, Count]] = field(default_factory=dict)  # by precision and op
    survivors: list[Record] = field(default_factory=list)
    misnamed: list[tuple[Record, list[str]]] = field(default_factory=list)  # with the ids that would have been right
    errors: list[Record] = field(default_factory=list)
    recipes: "Matrix | None" = None  # FP8 ops, by precision and recipe or accumulator
    wall: dict[str, Count] = field(default_factory=dict)  # correct variants by precision: cases and false alarms

    def total(self, precision: str) -> Count:
        total = Count()
        for count in self.rows[precision].values():
            total.add(count)
        return total


def count(records: Iterable[Record], wall: Iterable[Record] = ()) -> Matrix:
    """Sums records up. A bug counts as named first if it, or one that is the same function on these cases, is."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if "op" in record:
            groups.setdefault((record["precision"], record["op"], record["direction"]), []).append(record)
    matrix = Matrix(recipes=Matrix())
    assert matrix.recipes is not None
    order = {name: i for i, name in enumerate((*PRECISIONS, *OPS))}  # whatever the order in which processes were done
    for (precision, op, _), group in sorted(groups.items(), key=lambda g: (order[g[0][0]], order[g[0][1]], g[0][2] == "backward")):
        row = matrix.rows.setdefault(precision, {}).setdefault(op, Count())
        for record in group:
            if "id" in record:
                _count(matrix, row, record, group)
        for recipe, cases in recipes_in(op).items():
            own = [under(record, recipe, cases) for record in group]
            if not any(record.get("cases") for record in own):
                continue
            row = matrix.recipes.rows.setdefault(precision, {}).setdefault(recipe, Count())
            for record in own:
                if "id" in record and (record["id"] == CORRECT or record["differ"]):  # the others are the same function here
                    _count(matrix.recipes, row, record, own)
    for record in wall:
        variants = matrix.wall.setdefault(record["precision"], Count())
        variants.correct += record["cases"]
        for judge, alarms in {OURS: record["false_alarms"], **record["field"]}.items():
            variants.alarms[judge] += alarms
    return matrix


def recipes_in(op: str) -> dict[str, list[str]]:
    """The recipes and accumulators of an FP8 op, each with its cases."""
    found: dict[str, list[str]] = {}
    for case in op_named(op).cases:
        for recipe in recipes_of(op_named(op), case):
            found.setdefault(recipe, []).append(case.name)
    return found


def under(record: Record, recipe: str, cases: Collection[str]) -> dict[str, Any]:
    """What of a record was found under a recipe."""
    prints = {case: found for case, found in record["print"].items() if case in cases}
    if "id" not in record:
        return {**record, "print": prints}
    some = {name: [case for case in record[name] if case in cases] for name in ("differ", "rounded", "computed")}
    named = record.get("by_recipe", {}).get(recipe)
    return {
        **record,
        **some,
        "errors": [],  # told of once, with the op
        "op": f"{record['op']} under {recipe}",
        "cases": sum(found is not None for found in prints.values()),
        "field": {judge: [case for case in failing if case in cases] for judge, failing in record["field"].items()},
        "filtered": {case: ids for case, ids in record["filtered"].items() if case in cases},
        "print": prints,
        "named": [[id, 1] for id in named or ()],
        "explained": named is not None,
    }


def _count(matrix: Matrix, row: Count, record: Record, group: Sequence[Record]) -> None:
    failing = {OURS: record["computed"], ROUNDED: record["rounded"], **record["field"]}
    if record["errors"]:
        matrix.errors.append(record)
    if record["id"] == CORRECT:
        row.correct += record["cases"]
        for judge, cases in failing.items():
            row.alarms[judge] += len(cases)
        return
    alike = same(record, group)
    filtered = [case for case, ids in record["filtered"].items() if set(ids) & set(alike)]
    row.bugs += 1
    row.cases += len(record["differ"])
    for judge, cases in failing.items():
        row.killed[judge] += bool(cases) or (judge == OURS and bool(filtered))
        row.cases_killed[judge] += len(set(cases) & set(record["differ"]))
    if not (record["computed"] or filtered):
        matrix.survivors.append(record)
    if record["explained"]:
        row.asked += 1
        right = bool(record["named"]) and record["named"][0][0] in alike
        row.first += right
        if not right:
            matrix.misnamed.append((record, alike))


def same(record: Record, group: Iterable[Record]) -> list[str]:
    """The ids, and attributes' values, that are the same function as a bug on the cases of both; its own first."""
    found = [record["id"]]
    if record["id"] == "topk-tie-break":
        found.append("ties")
    entry = entries().get(record["id"])
    found += [f"{name}={value}" for bug in (entry.bugs if entry else ()) for name, value in bug.attrs.items()]
    for other in group:
        id = other.get("id") or other["other"]
        if id not in (*found, CORRECT) and _alike(record["print"], other["print"]):
            found.append(id)
    return found


def _alike(ours: Mapping[str, list[float] | None], theirs: Mapping[str, list[float] | None]) -> bool:
    """On the cases of both. Fingerprints are triples: a norm, a product with random numbers over it, a count."""
    common = ours.keys() & theirs.keys()
    for case in common:
        a, b = ours[case], theirs[case]
        if a is None or b is None or len(a) != len(b) or a[2::3] != b[2::3]:
            if a is b is None:
                continue
            return False
        norms, products = zip(a[::3], b[::3], strict=True), zip(a[1::3], b[1::3], strict=True)
        if any(abs(x - y) > SAME * max(x, y) for x, y in norms) or any(abs(x - y) > SAME for x, y in products):
            return False
    return bool(common)
