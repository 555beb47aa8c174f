"""What is checked of pages, README.md and docs/: links, paths, names of the library, code, and commands."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

from openpi_like.config import load_run, override
from openpi_like.models.released import find_model
from openpi_like.robots.find import find_robot

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("openpi_like", "data", "train", "serve", "configs", "tests", "docs")
# Paths below these folders that a page may name although they are not in the repository: data of its readers.
READERS = ("data/bridge_dataset/",)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_OWN = re.compile(r"(^|[/:])my_\w+|^[A-Z_.]+$")  # my_robot.py, runs/my_robot; DIR, RUN, CONFIG


# ---- Parts of a page -------------------------------------------------------------------------------------------------


def fences(text: str) -> list[tuple[str, str]]:
    """Returns (language, content) of the fenced blocks of a page."""
    return [(m[1], m[2]) for m in _FENCE.finditer(text)]


def spans(text: str) -> list[str]:
    """Returns what stands in backticks outside of fenced blocks, each on one line."""
    return [re.sub(r"\s+", " ", m[2]).replace(r"\|", "|").strip() for m in _SPAN.finditer(_FENCE.sub("", text))]


def commands(text: str) -> list[str]:
    """Returns the command lines of a page that start a program of ours: of fenced blocks, and in backticks."""
    blocks = [content for language, content in fences(text) if language != "python"]
    return [*(line for block in blocks for line in _lines(block)), *filter(_starts_program, spans(text))]


def docstring_commands(source: str) -> list[str]:
    """Returns the command lines that stand, indented, in the docstring of a file."""
    return _lines("\n".join(re.findall(r"^    (.*)$", ast.get_docstring(ast.parse(source)) or "", re.MULTILINE)))


def _lines(block: str) -> list[str]:
    joined = re.sub(r"\s*\\\n\s*", " ", block)
    return [line.strip() for line in joined.split("\n") if _starts_program(line.strip())]


def _starts_program(line: str) -> bool:
    return line.startswith(("python ", "make "))


# ---- Links, paths, names ---------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def link_problems(page: Path, text: str, root: Path = ROOT) -> list[str]:
    """Returns the relative links and pictures of a page that lead nowhere."""
    problems = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", _SPAN.sub("", _FENCE.sub("", text))):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        to = (page.parent / file).resolve() if file else page
        if file and not to.exists():
            problems.append(f"{page.name}: link to {target}, there is no {to.relative_to(root)}")
        elif anchor and anchor not in anchors(text if to == page else to.read_text()):
            problems.append(f"{page.name}: link to {target}, {to.name} has no such heading")
    return problems


def path_problems(text: str, root: Path = ROOT) -> list[str]:
    """Returns the paths of the repository in backticks that do not exist."""
    problems = []
    for word in (w for span in spans(text) for w in re.split(r"[\s=,()\"'\[\]]+", span)):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]*", word):
            known = word.startswith(READERS) or _OWN.search(word)
            if not known and not any(root.glob(word.rstrip("/"))):
                problems.append(f"no {word}")
        elif re.fullmatch(r"[\w*]+\.py", word) and not (_OWN.search(word) or _in_any_folder(word, root)):
            problems.append(f"no file {word} in any folder")
    return problems


def _in_any_folder(name: str, root: Path) -> bool:
    return any(path.match(name) for path in _python_files(root))


@functools.cache
def _python_files(root: Path) -> list[Path]:
    return [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]


def name_problems(text: str) -> list[str]:
    """Returns the names in backticks that begin with openpi_like. and do not exist."""
    found = (m for span in spans(text) for m in re.findall(r"openpi_like(?:\.\w+)+", span))
    return [f"no {name}" for name in found if not _resolves(name)]


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            fields = getattr(value, "__dataclass_fields__", {})
            if not hasattr(value, part) and part not in fields:
                return False
            value = getattr(value, part, None)
        return True
    return False


def python_problems(code: str) -> list[str]:
    """Returns what is wrong with a block of Python: its grammar, or what it imports from the library."""
    try:
        tree = ast.parse(code)
    except SyntaxError as e:
        return [f"line {e.lineno}: {e.msg}"]
    imports = [
        n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("openpi_like")
    ]
    names = (f"{node.module}.{alias.name}" for node in imports for alias in node.names)
    return [f"no {name}" for name in names if not _resolves(name)]


# ---- Commands --------------------------------------------------------------------------------------------------------


def command_problems(line: str, root: Path = ROOT) -> list[str]:
    """Returns what is wrong with a command line: its program, an option, a config, one of its overrides, a robot."""
    words = [w for w in shlex.split(line, comments=True) if w != "&"]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), re.MULTILINE)
        return [f"{line}: no target {w}" for w in words[1:] if "=" not in w and w not in targets]
    if words[1].startswith("-"):  # a module of Python, such as venv
        return []
    if not (root / words[1]).is_file():
        return [f"{line}: no program {words[1]}"]
    return [f"{line}: {problem}" for problem in _argument_problems(root, words[1], words[2:])]


def _argument_problems(root: Path, path: str, words: list[str]) -> Iterator[str]:
    if path == "train/train.py":
        yield from _config_problems(root, words[0], tuple(words[1:]))
        return
    if path == "train/step_time.py":
        if len(words) != 1:
            yield f"expected a directory, got {words}"
        return
    if path == "serve/deploy/ray_serve.py" and importlib.util.find_spec("ray") is None:
        return
    program = _program(root / path)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            if hasattr(program, "COMMANDS"):
                args: Any = tyro.extras.subcommand_cli_from_dict(program.COMMANDS, args=words)
            elif hasattr(program, "parser"):  # one of those that know nothing of tyro
                args = program.parser().parse_args(words)
            else:
                args = tyro.cli(program.Args, args=words)
    except SystemExit:
        if "--help" not in words:
            yield re.sub(r"[\s╭╮╰╯─│]+", " ", printed.getvalue()).strip()
        return
    except ValueError as e:
        yield str(e)
        return
    given = vars(args)
    sets = given.get("set") or given.get("overrides") or ()
    if given.get("config"):
        yield from _config_problems(root, str(given["config"]), sets)
    if given.get("study"):
        yield from _study_problems(root, program, root / given["study"], sets)
    if given.get("model") and not _OWN.search(given["model"]):
        try:
            override(find_model(given["model"]), sets)
        except (ValueError, FileNotFoundError) as e:
            yield str(e)
    robots = (given.get("robot"), *(given.get("robots") or ()))
    for robot in (r for r in robots if r and not _OWN.search(r)):
        try:
            find_robot(robot)
        except ValueError as e:
            yield str(e)


def _config_problems(root: Path, path: str, overrides: Sequence[str]) -> Iterator[str]:
    if _OWN.search(path):
        return
    try:
        override(_load_run(root / path), [o for o in overrides if not o.startswith("[")])
    except (FileNotFoundError, ValueError) as e:
        yield str(e)


def _study_problems(root: Path, program: ModuleType, path: Path, sets: Sequence[str]) -> Iterator[str]:
    try:
        study = program.load_study(path)
    except ValueError as e:
        yield str(e)
        return
    for arm in (arm for part in study.parts.values() for arm in part.arms.values()):
        yield from _config_problems(root, arm.config, (*sets, *arm.set))


@functools.cache
def _load_run(path: Path) -> Any:
    return load_run(path)


@functools.cache
def _program(path: Path) -> ModuleType:
    """Imports a program as a module, which runs nothing of it."""
    spec = importlib.util.spec_from_file_location(f"program_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what they import
        spec.loader.exec_module(module)
    return module
