"""The shape of the code, held over its syntax tree: sections, what each may touch, sizes, what is tracked."""

from __future__ import annotations

import ast
import re
import subprocess
import symtable
from bisect import bisect
from pathlib import Path

import pytest
from conftest import ROOT

SOURCE = (ROOT / "monitor.py").read_text()
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)

SOURCES = ("redaction", "agents", "github")  # payload -> Draft: pure, and free of the rest of us
STORE = ("queries", "transaction", "database")  # the statements, and the connections that run them
COMMAND_LINE = ("client", "cli", "reading", "run", "pack", "commands")
WEB_SIDE = ("guard", "socket", "web", "pages", "mcp", "app")
LOADED_LATE = {"flask", "gevent", "jinja2", "requests", "urllib3", "werkzeug", "wsproto"}
DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_TYPES = {"list", "dict", "set", "deque", "defaultdict", "Counter", "bytearray"}
MUTATORS = {"add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem"}
MUTATORS |= {"popleft", "remove", "reverse", "setdefault", "sort", "update"}
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.match_case)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
STATEMENT = re.compile(
    r"\s*(SELECT|INSERT|REPLACE|UPDATE|DELETE|CREATE|ALTER|DROP|PRAGMA|BEGIN|COMMIT|ROLLBACK|SAVEPOINT"
    r"|RELEASE|WITH|VACUUM|ANALYZE|ATTACH|EXPLAIN)\b(?!-)"
)
TOP_LEVEL = {"monitor.py", "schema.sql", "templates", "static", "tests"}
TOP_LEVEL |= {"pyproject.toml", "README.md", "LICENSE"}


def banners() -> list[tuple[int, str]]:
    """The line and name of every section's banner."""
    rules = [number for number, line in enumerate(LINES, 1) if re.fullmatch("# ={20,}", line)]
    tops = rules[::2]
    assert [top + 2 for top in tops] == rules[1::2], "a banner is a rule, a line `# name: what`, and a rule"
    return [(top, re.match(r"# ([a-z]+): ", LINES[top])[1]) for top in tops]


BANNERS = banners()
SECTIONS = [name for _, name in BANNERS]


def section_of(line: int) -> str:
    """The name of the section that a line stands in; "header" before the first banner."""
    return ["header", *SECTIONS][bisect([top for top, _ in BANNERS], line)]


def where(node: ast.AST) -> str:
    """Where a node stands, for a reader of a failure."""
    name = getattr(node, "name", "")
    return f"{name or 'line'} in {section_of(node.lineno)}, line {node.lineno}"


def nodes(*kinds: type) -> list[ast.AST]:
    """Every node of these kinds in the file."""
    return [node for node in ast.walk(TREE) if isinstance(node, kinds)]


def defined_names(statement: ast.stmt) -> list[str]:
    """The names that a statement of the module makes."""
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    parts = [part for target in targets if target for part in ast.walk(target)]
    return [part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]


HOME_OF = {name: section_of(node.lineno) for node in TREE.body for name in defined_names(node)}


def global_names(table: symtable.SymbolTable):
    """Yield (line, name) for the module's names that functions and classes read; not locals of that name."""
    for child in table.get_children():
        for symbol in child.get_symbols():
            if symbol.is_referenced() and symbol.is_global():
                yield child.get_lineno(), symbol.get_name()
        yield from global_names(child)


def names_used() -> set[tuple[str, str]]:
    """Every (section, name of the module) such that code of the section reads the name."""
    table = symtable.symtable(SOURCE, "monitor.py", "exec")
    inside = {(section_of(line), name) for line, name in global_names(table)}
    tables = [node for node in TREE.body if not isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    tables += [part for node in nodes(*FUNCTIONS, ast.ClassDef) for part in node.decorator_list]
    outside = {
        (section_of(name.lineno), name.id)
        for node in tables
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load)
    }
    return {(section, name) for section, name in inside | outside if name in HOME_OF}


USED = names_used()


def docstrings() -> set[ast.AST]:
    """The constants that are docstrings."""
    owners = nodes(ast.Module, ast.ClassDef, *FUNCTIONS)
    return {owner.body[0].value for owner in owners if ast.get_docstring(owner) is not None}


def test_the_docstring_is_the_map_of_the_file():
    assert re.findall(r"^    ([a-z]+)  +\S", ast.get_docstring(TREE, clean=False), re.M) == SECTIONS


def test_a_section_has_one_banner():
    assert len(set(SECTIONS)) == len(SECTIONS)


def test_sql_stands_only_in_the_store():
    prose = docstrings()
    found = [
        f"{where(node)}: {node.value[:40]!r}"
        for node in nodes(ast.Constant)
        if isinstance(node.value, str) and node not in prose and STATEMENT.match(node.value)
        if section_of(node.lineno) not in STORE and " " in node.value.strip()
    ]
    assert found == []


def test_only_the_store_talks_to_the_database():
    talk = {"execute", "executemany", "executescript", "cursor", "commit", "rollback", "blobopen"}
    calls = [node for node in nodes(ast.Call) if getattr(node.func, "attr", None) in talk]
    assert [where(node) for node in calls if section_of(node.lineno) not in STORE] == []


def test_the_request_is_read_only_on_the_web_side():
    asked = [
        node
        for node in nodes(ast.Attribute)
        if isinstance(node.value, ast.Name) and (node.value.id, node.attr) == ("flask", "request")
    ]
    assert asked
    assert [where(node) for node in asked if section_of(node.lineno) not in WEB_SIDE] == []
    taken = [node for node in nodes(ast.ImportFrom) if (node.module or "").partition(".")[0] == "flask"]
    assert [where(node) for node in taken] == []


def test_flask_is_known_only_to_the_web_side():
    assert {section for section, name in USED if name == "flask"} <= {*WEB_SIDE, "server"}


def test_click_is_used_only_by_the_command_line():
    assert {section for section, name in USED if name == "click"} <= set(COMMAND_LINE)


@pytest.mark.parametrize("section", [name for name in SOURCES if name in SECTIONS])
def test_a_source_uses_nothing_of_ours_but_constants_and_the_other_sources(section):
    ours = {name for where_used, name in USED if where_used == section and HOME_OF[name] in SECTIONS}
    assert sorted(name for name in ours if HOME_OF[name] not in SOURCES and not name.isupper()) == []


@pytest.mark.parametrize("section", [name for name in SOURCES if name in SECTIONS])
def test_a_source_has_no_effects(section):
    reach = {"flask", "click", "os", "sqlite3", "threading", "tempfile", "sys", "time", "random", "secrets"}
    assert {name for where_used, name in USED if where_used == section} & reach == set()


def test_a_section_uses_no_section_below_it():
    """Layers in dependency order: a reader meets nothing before it is defined."""
    order = ["header", *SECTIONS]
    upward = {
        f"{section} uses {name} of {HOME_OF[name]}"
        for section, name in USED
        if order.index(HOME_OF[name]) > order.index(section)
    }
    # A bad setting is a Problem like any other; a Flask app carries the click commands.
    allowed = {"config uses Problem of errors", "app uses cli of cli"}
    assert upward - allowed == set()


def mutable_names() -> set[str]:
    """The names of the module that hold a list, a dict, a set or one of their kin."""
    return {
        name
        for node in TREE.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and is_mutable(node.value)
        for name in defined_names(node)
    }


def is_mutable(value: ast.expr | None) -> bool:
    """Whether an expression makes something that can be changed later."""
    if isinstance(value, ast.BinOp):
        return is_mutable(value.left) or is_mutable(value.right)
    called = getattr(value, "func", None)
    name = getattr(called, "id", getattr(called, "attr", None))
    return isinstance(value, DISPLAYS) or name in MUTABLE_TYPES


def changed_names():
    """Yield (node, name) for every name whose value is changed in place."""
    for node in nodes(ast.Call, ast.Subscript, ast.Attribute, ast.AugAssign):
        if isinstance(node, ast.Call):
            changes = isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS
            target = node.func.value if changes else None
        elif isinstance(node, ast.AugAssign):
            target = node.target
        else:
            target = node.value if isinstance(node.ctx, (ast.Store, ast.Del)) else None
        if isinstance(target, ast.Name):
            yield node, target.id


def test_there_is_no_mutable_module_state():
    assert [where(node) for node in nodes(ast.Global)] == []
    mutable = mutable_names()
    assert sorted(name for name in mutable if not name.isupper()) == []
    inside = [node for function in nodes(*FUNCTIONS) for node in ast.walk(function)]
    changed = [(node, name) for node, name in changed_names() if name in mutable and node in inside]
    assert [f"{where(node)}: {name}" for node, name in changed] == []


def test_a_function_fits_a_screen():
    sizes = {where(node): node.end_lineno - node.lineno + 1 for node in nodes(*FUNCTIONS)}
    assert {place: size for place, size in sizes.items() if size > 40} == {}


def complexity(function: ast.AST) -> int:
    """McCabe's count as ruff takes it: one, and one for every statement that forks."""
    return 1 + sum(isinstance(node, BRANCHES) for node in ast.walk(function))


def test_a_function_has_few_ways_through_it():
    counts = {where(node): complexity(node) for node in nodes(*FUNCTIONS)}
    assert {place: count for place, count in counts.items() if count > 10} == {}


def test_a_section_is_no_longer_than_600_lines():
    tops = [top for top, _ in BANNERS] + [len(LINES) + 1]
    sizes = {name: below - top for (top, name), below in zip(BANNERS, tops[1:], strict=True)}
    assert {name: size for name, size in sizes.items() if size > 600} == {}


def test_the_file_stays_within_its_limit():
    """3,500 were planned. What plugs agents and GitHub in took 1,000 more; the command line, one file to drop
    in, export and import, the socket, the schema and MCP 2,500. No section, a reader's room, passes 600."""
    assert len(LINES) <= 7000


def test_a_line_is_no_longer_than_110_characters():
    assert [number for number, line in enumerate(LINES, 1) if len(line) > 110] == []


def public_things():
    """Yield (name, node) for the module's public functions and classes, and the latter's public methods."""
    for node in TREE.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            methods = node.body if isinstance(node, ast.ClassDef) else []
            for method in methods:
                if isinstance(method, FUNCTIONS) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method


def test_every_public_thing_says_what_it_is():
    assert [name for name, node in public_things() if not (ast.get_docstring(node) or "").strip()] == []


def test_the_web_stack_is_not_imported_at_the_top():
    plain = [alias.name for node in TREE.body if isinstance(node, ast.Import) for alias in node.names]
    picked = [node.module or "" for node in TREE.body if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in plain + picked} & LOADED_LATE == set()


def tracked_files() -> list[str]:
    """What git holds, or would hold after `git add .`."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git, or not a git checkout")
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def test_the_top_level_holds_what_it_must_and_nothing_else():
    top = {name.partition("/")[0] for name in tracked_files()}
    assert top >= TOP_LEVEL
    assert {name for name in top - TOP_LEVEL if not name.startswith(".")} == set()


def test_no_tracked_file_tells_where_it_was_made():
    secret = r"index-url|find-links|://[^/\s]*(artifactory|nexus|devpi)"
    if len(ROOT.parts) > 2:  # else it may be an ordinary word, as /app
        secret += rf"|{re.escape(str(ROOT))}(?![\w-])"
    home = r"/(?:home|Users)/(?!dev\b)\w|/root/\w"
    recorded = {".json", ".jsonl"}  # payloads name the folders of people that do not exist
    for name in tracked_files():
        text = (ROOT / name).read_bytes().decode("utf-8", "replace")
        pattern = secret if Path(name).suffix in recorded else f"{secret}|{home}"
        found = None if name == "tests/test_shape.py" else re.search(pattern, text)
        assert found is None, f"{name}: {found[0] if found else ''}"
