"""The README says what is so."""

import re
import subprocess
import sys
from pathlib import Path

import click
from click.testing import CliRunner
from leadline.golden.cli import main
from leadline.golden.precision import PRECISIONS

README = (Path(__file__).parent.parent / "README.md").read_text()


def table(heading: str) -> list[str]:
    section = README.split(heading, 1)[1]
    found = re.search(r"(?:^\|.*\|\n)+", section, re.M)
    assert found
    return found[0].splitlines()


def test_the_op_table_is_what_the_declarations_say() -> None:
    """Copied from `leadline ops --markdown`."""
    assert table("<!-- leadline ops --markdown -->") == CliRunner().invoke(main, ["ops", "--markdown"]).stdout.splitlines()


def test_the_precision_table_is_what_the_declarations_say() -> None:
    """Every precision with its meaning."""
    assert table("## How a verdict is made")[2:] == [f"| {p.name} | {p.meaning} |" for p in PRECISIONS.values()]


def test_the_first_example_prints_what_the_readme_says(tmp_path: Path) -> None:
    """The example is run as it stands; each line that the README shows, up to its ellipsis, is in what it prints."""
    example = re.search(r"```python\n(.*?)```", README, re.S)
    assert example
    (tmp_path / "example.py").write_text(example[1])
    run = subprocess.run([sys.executable, "example.py"], capture_output=True, text=True, cwd=tmp_path, check=True)
    shown = README[example.end() :].strip().split("\n\n")[0].splitlines()
    for line in shown:
        for part in line.strip().split("…"):
            assert part.strip() in run.stdout


def test_the_commands_that_the_readme_shows_are_options_that_exist() -> None:
    """Every `leadline …` line of the README parses."""
    commands = re.findall(r"^    leadline (.*?)(?:\s+#.*)?$", README, re.M)
    assert len(commands) >= 8
    for command in commands:
        words = command.split()
        group = main.get_command(click.Context(main), words[0])
        nested = words[:2] if isinstance(group, click.Group) and set(words[1:2]) & set(group.commands) else words[:1]
        run = CliRunner().invoke(main, [*nested, "--help"])
        assert run.exit_code == 0
        for option in [w for w in words if w.startswith("--")]:
            assert option in run.stdout
