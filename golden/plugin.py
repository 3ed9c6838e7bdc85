"""The pytest plugin: options, waivers and seeds for the tests that leadline.golden.conforms makes. It imports nothing but pytest until such
tests are there, and does nothing in a run that has none."""

import random
from pathlib import Path
from typing import Any

import pytest

SEED = pytest.StashKey[int]()
WAIVERS = pytest.StashKey[list]()
USED = pytest.StashKey[set]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("leadline", "leadline: tests made by leadline.golden.conforms")
    add = group.addoption
    add("--leadline-precision", action="append", metavar="NAME", help="Judge at this precision, whatever the tests say (repeat for more).")
    add("--leadline-profile", choices=("quick", "full"), help="The cases of this profile, whatever the tests say.")
    add("--leadline-seed", type=int, metavar="N", help="What properties draw from; the header shows it.")
    add("--leadline-waivers", type=Path, metavar="FILE", help="Known failures, a line each: op direction precision case  # reason")
    add("--leadline-strict", action="store_true", help="A waived test that passes fails.")


def seed_of(config: pytest.Config) -> int:
    return config.stash.get(SEED, 0)


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("leadline_seed")
    shared = getattr(config, "workerinput", {}).get("leadline_seed")  # under xdist, every worker has the same
    config.stash[SEED] = next((s for s in (given, shared) if s is not None), random.SystemRandom().randrange(2**32))
    config.stash[USED] = set()
    config.stash[WAIVERS] = []
    if (path := config.getoption("leadline_waivers")) is not None:
        from .errors import UsageError
        from .waivers import read

        try:
            config.stash[WAIVERS] = read(path)
        except UsageError as error:
            raise pytest.UsageError(f"leadline: {error}") from error
    if names := config.getoption("leadline_precision"):
        from .precision import precision_named

        try:
            for name in names:
                precision_named(name)
        except ValueError as error:
            raise pytest.UsageError(f"leadline: --leadline-precision: {error}") from error


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["leadline_seed"] = seed_of(node.config)


def pytest_report_header(config: pytest.Config) -> str:
    parts = [f"seed {seed_of(config)} (--leadline-seed)"]
    parts += [f"{len(config.stash[WAIVERS])} waivers"] * bool(config.stash[WAIVERS])
    return f"leadline: {', '.join(parts)}"


def asked(item: pytest.Item) -> tuple[str, str, str, str] | None:
    """Op, direction, precision and case (or property) of a test that conforms made."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if (task := parameters.get("leadline_task")) is not None:
        return task.op.name, task.direction, task.precision.name, task.case.name if task.case else "absent"
    trial: Any = parameters.get("leadline_trial")
    if hasattr(trial, "property"):
        return trial.op.name, trial.direction, trial.precision.name, trial.property.name
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items if config.stash[WAIVERS] else ():
        what = asked(item)
        waiver = next((w for w in config.stash[WAIVERS] if what is not None and w.covers(*what)), None)
        if waiver is not None:
            config.stash[USED].add(waiver)
            reason = f"waived, line {waiver.line}: {waiver.reason}"
            strict = bool(config.getoption("leadline_strict"))
            item.add_marker(pytest.mark.xfail(reason=reason, raises=pytest.fail.Exception, strict=strict))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was waived and passes, and waivers of nothing."""
    if not config.stash[WAIVERS]:
        return
    passed = [r for r in terminalreporter.stats.get("xpassed", []) if "waived, line " in getattr(r, "wasxfail", "")]
    unused = [w for w in config.stash[WAIVERS] if w not in config.stash[USED]] if not hasattr(config, "workerinput") else []
    if passed or unused:
        terminalreporter.section("leadline waivers")
    for report in passed:
        terminalreporter.write_line(f"unexpected pass: {report.nodeid} ({report.wasxfail})")
    for waiver in unused if not terminalreporter.stats.get("error") else ():
        terminalreporter.write_line(f"unused: line {waiver.line}: {' '.join(waiver.patterns)}  # {waiver.reason}")
