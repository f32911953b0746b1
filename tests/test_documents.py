"""What the documents say exists: commands with their options, recipes, files."""

import re
import shlex
from pathlib import Path

import click
import pytest

from orchestrator.commands.main import COMMANDS, group
from orchestrator.commands.request import requested_settings
from orchestrator.errors import OrchestrateError
from tests.conftest import REPOSITORY

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
CALL = re.compile(r"(?:\.venv/bin/)?orchestrate\s+(.+)")
FILE = re.compile(r"(?:[\w.-]+/)+(?:[\w.-]+\.(?:py|md|yaml|toml|txt))?|(?:Makefile|\.ci/run|pyproject\.toml)")

MADE_BY_USE = {
    "corpus/",
    "conf/defaults.yaml",
    "conf/recipe/mine.yaml",
    "checkpoints/",
    "failures/",
    ".venv/",
    "./conf",
}
"""Files of a person's own or of a run, which documents name as well."""


def spans(text: str) -> list[str]:
    """Return the lines of plain fenced blocks and the inline code of a document."""
    lines = [line for language, block in FENCE.findall(text) if language in ("", "sh") for line in block.splitlines()]
    return [*lines, *INLINE.findall(FENCE.sub("", text))]


def calls(text: str) -> list[list[str]]:
    """Return the arguments of every `orchestrate ...` that a document tells to type."""
    found = [match[1] for span in spans(text) if (match := CALL.fullmatch(span.split("  #")[0].strip()))]
    return [shlex.split(arguments.split(" ──►")[0]) for arguments in found]


def documented_calls() -> list[tuple[str, list[str]]]:
    return [(path.name, call) for path in DOCUMENTS for call in calls(path.read_text())]


def problem_of(arguments: list[str]) -> str:
    """Return what the command line would refuse before anything is looked for, or nothing."""
    if arguments[0].startswith("-"):
        return "" if arguments[0] in ("--help", "-h", "--version") else f"no option {arguments[0]}"
    if arguments[0] not in COMMANDS:
        return f"no command {arguments[0]}"
    return problem_within(group, click.Context(group), arguments)


def problem_within(commands: click.Group, parent: click.Context, arguments: list[str]) -> str:
    """Return what a group would refuse of the name of a command of it and its arguments, or nothing."""
    command = commands.get_command(parent, arguments[0])
    if command is None:
        return f"no command {arguments[0]}"
    context = click.Context(command, parent=parent, info_name=arguments[0])
    try:
        _, rest, _ = command.make_parser(context).parse_args(arguments[1:])
    except click.UsageError as error:
        return error.format_message()
    if isinstance(command, click.Group) and rest:
        return problem_within(command, context, rest)
    return f"left over: {rest}" if rest else ""


def files_in(text: str) -> list[str]:
    """Return the paths of the repository that a document names in inline code."""
    return [code for code in INLINE.findall(FENCE.sub("", text)) if FILE.fullmatch(code)]


def test_every_command_line_in_the_documents_is_accepted() -> None:
    found = documented_calls()
    assert {call[0] for _, call in found} >= set(COMMANDS)
    assert [(name, call, problem) for name, call in found if (problem := problem_of(call))] == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["lunch", "demo"], "no command lunch"),
        (["launch", "demo", "--nodes", "4", "--wrong"], "No such option"),
        (["status", "last", "more"], "left over: ['more']"),
        (["sandbox", "begin"], "no command begin"),
        (["sandbox", "start", "--knots", "4"], "No such option"),
    ],
)
def test_a_command_line_that_does_not_exist_is_found(arguments: list[str], problem: str) -> None:
    assert problem_of(arguments).startswith(problem)


def test_the_table_of_commands_is_that_of_the_command_line() -> None:
    table = re.findall(r"^\| `orchestrate (\w+)` \| (.+) \|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert [name for name, _ in table] == list(COMMANDS)
    assert all(COMMANDS[name].startswith(words.split(",")[0]) for name, words in table)


def test_the_recipe_in_the_readme_can_be_planned_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    (recipe,) = [block for language, block in FENCE.findall(readme) if language == "yaml"]
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "mine.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    requests = [call[1:] for call in calls(readme) if call[:2] in (["plan", "mine"], ["launch", "mine"])]
    assert len(requests) >= 4
    for name, *rest in requests:
        nodes = int(rest[rest.index("--nodes") + 1]) if "--nodes" in rest else None
        settings = requested_settings(name, [word for word in rest if "=" in word], nodes)
        assert settings.base == str(tmp_path / "deeper")
    with pytest.raises(OrchestrateError, match="did you mean"):
        requested_settings("mine", ["training.token=1"], None)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_files_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text()
    missing = [name for name in files_in(text) if not (REPOSITORY / name).exists() and name not in MADE_BY_USE]
    assert missing == []


def test_the_architecture_names_most_modules() -> None:
    named = set(files_in((REPOSITORY / "docs" / "architecture.md").read_text()))
    assert len(named) > 40
    assert "megatron_solar/train.py" in named


def test_functions_named_in_the_architecture_are_defined_there() -> None:
    text = " ".join((REPOSITORY / "docs" / "architecture.md").read_text().split())
    pairs = re.findall(r"`([\w/]+\.py)`: `(\w+)`", text)
    assert len(pairs) >= 7
    assert [
        (name, function)
        for name, function in pairs
        if not re.search(rf"^(def|class) {function}\b", (REPOSITORY / name).read_text(), re.MULTILINE)
    ] == []
