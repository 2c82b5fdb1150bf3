"""The house: what holds for every script at the top of the repository, whatever its paper."""

import argparse
import ast
import collections
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
THIRD_PARTY = {"torch", "numpy", "tiktoken"}  # what a script may import at its top level
# These two share data, recipe and jobs as text, because scripts never import one another: four forms of data, five of
# tokenizer, three jobs, and then the model, are more than the 900 lines of a script. These may only be lowered.
# iclm_sort.py holds what the paper's five stages need from text to contexts, a BERT encoder, and the experiment.
# safe_rlhf.py holds a Llama with logits and with scores, a judged world, and from it SFT, score models, five methods.
# recaption.py holds the seven stages that the report joins, their six models, and the tool for one's own images.
LINE_LIMIT = {
    "mamba.py": 2595,
    "transformer.py": 1600,
    "constrained_ppo.py": 1346,
    "iclm_sort.py": 1696,
    "safe_rlhf.py": 1459,
    "recaption.py": 1665,
}
MAY_DIFFER = {  # functions and classes with one name and another text in each script, and why
    "Config",  # flags of the script
    "build_parser",  # its jobs
    "Layer",  # method: what stands between the norms
    "read_config",  # names in the folders' config.json
    "read_folder",  # names of the folders' tensors
    "write_folder",  # the same, written
    "Batches",  # only a state can be carried from window to window
    "make_optimizer",  # which parameters decay
    "evaluate",  # only a state can be carried
    "make_model",  # sizes that the flags say
    "Run",  # only a state can be carried, and is saved
    "load_checkpoint",  # the model's class
    "main",  # the same
}
RULE, SHARED = "# -----", "# ----- Shared block"
COMMON_FLAGS = {"--seed", "--device", "--out", "--resume", "--smoke"}

CAPTURED = {"capture_output": True, "text": True, "timeout": 300}

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def test_there_are_scripts() -> None:
    assert SCRIPTS, "no *.py beside README.md: every test below would pass without looking at anything"


# ----- What a script imports


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """First names of the modules that `import a.b` and `from a.b import c` load."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level or node.module.split(".")[0])
    return names


def walk_outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """What runs on import: like ast.walk, but no function body is entered."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from walk_outside_functions(child)


def imported_at_top(script: Path) -> set[str]:
    return imported(walk_outside_functions(ast.parse(script.read_text()))) - set(sys.stdlib_module_names)


@each_script
def test_no_script_imports_another(script: Path) -> None:
    found = imported(ast.walk(ast.parse(script.read_text())))
    assert not found & ({path.stem for path in SCRIPTS} | {"tests", "."})


@each_script
def test_top_level_imports_are_few(script: Path) -> None:
    extra = imported_at_top(script) - THIRD_PARTY
    assert not extra, f"import {sorted(extra)} inside the one function that needs it"


# ----- The shared block


def shared_block(script: Path) -> tuple[int, int] | None:
    """Line indices [start, end) of the text between the block's title and the next rule line, if it has one."""
    lines = script.read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(SHARED)]
    assert len(starts) <= 1, f"{script.name} has {len(starts)} shared blocks"
    if not starts:
        return None
    ends = [i for i in range(starts[0] + 1, len(lines)) if lines[i].startswith(RULE)]
    assert ends, f"{script.name}: no line starting with {RULE!r} ends the shared block"
    return starts[0] + 1, ends[0]


def definitions(script: Path) -> dict[str, tuple[int, str]]:
    """Top-level functions and classes: name -> (line index, its text with decorators)."""
    lines = script.read_text().splitlines()
    found = {}
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            found[node.name] = start, "\n".join(lines[start : node.end_lineno])
    return found


def test_the_shared_block_is_one_text() -> None:
    texts = {}
    for script in SCRIPTS:
        if span := shared_block(script):
            assert span[1] - span[0] <= 80, f"{script.name}: shared block of {span[1] - span[0]} lines, over 80"
            texts[script.name] = "\n".join(script.read_text().splitlines()[slice(*span)]).strip()
    first = next(iter(texts), None)
    assert first, f"no script has a line starting with {SHARED!r}"
    for name, text in texts.items():
        assert text == texts[first], f"the shared blocks of {first} and {name} differ"


def test_one_name_one_text() -> None:
    """A function or class that two scripts have is one text, or takes another name, or is in MAY_DIFFER."""
    helpers = {}
    for script in SCRIPTS:
        start, end = shared_block(script) or (0, 0)
        helpers |= {name: text for name, (line, text) in definitions(script).items() if start <= line < end}
    for script in SCRIPTS:
        for name, (_, text) in definitions(script).items():
            assert text == helpers.get(name, text), f"{script.name}: {name} differs from the shared block's {name}"
    texts = collections.defaultdict(set)
    for script in SCRIPTS:
        for name, (_, text) in definitions(script).items():
            texts[name].add(text)
    differ = {name for name, found in texts.items() if len(found) > 1}
    assert not differ - MAY_DIFFER, f"{sorted(differ - MAY_DIFFER)}: make the texts one, or give one another name"
    assert not MAY_DIFFER - differ, f"{sorted(MAY_DIFFER - differ)}: no longer differ; take them out of MAY_DIFFER"


# ----- Importing does no work

# Calls that only build a value, and so may stand in a constant; besides these, math.* and methods of a literal.
PURE_CALLS = {"Path", "dict", "frozenset", "len", "list", "range", "re.compile", "set", "sorted", "sum", "tuple"}

PROBE = """
import importlib, json, os, random, sys, threading
import numpy, torch

events = []
watched = {"os.fork", "os.mkdir", "os.posix_spawn", "os.putenv", "os.remove", "os.rename", "os.rmdir", "os.system",
           "shutil.rmtree", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "_thread.start_new_thread"}

def watch(event, args):
    written = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if written or event in watched:
        events.append(f"{event} {args[0]!r}"[:200])

def state():
    return {"torch random state": torch.get_rng_state().tolist(),
            "numpy random state": str(numpy.random.get_state()[1].tolist()),
            "random's state": str(random.getstate()),
            "default dtype": str(torch.get_default_dtype()),
            "matmul precision": torch.get_float32_matmul_precision(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "torch threads": torch.get_num_threads(),
            "threads": threading.active_count(),
            "CUDA started": torch.cuda.is_initialized(),
            "working directory": [os.getcwd(), os.listdir()]}

sys.addaudithook(watch)
changed = {}
for name in sys.argv[2:]:
    before = state()
    events.clear()
    importlib.import_module(name)
    did = list(events)
    after = state()
    changed[name] = did + [key for key in before if before[key] != after[key]]
with open(sys.argv[1], "w") as file:
    json.dump(changed, file)
"""


def is_constant(value: ast.AST | None) -> bool:
    calls = [node.func for node in ast.walk(value) if isinstance(node, ast.Call)] if value else []
    return all(
        ast.unparse(func) in PURE_CALLS
        or (isinstance(func, ast.Attribute) and (ast.unparse(func.value) == "math" or is_literal(func.value)))
        for func in calls
    )


def is_literal(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant | ast.Dict | ast.List | ast.Set | ast.Tuple)


@each_script
def test_module_level_holds_only_definitions(script: Path) -> None:
    tree = ast.parse(script.read_text())
    assert ast.get_docstring(tree), "the file opens with a docstring"
    for node in tree.body[1:]:
        definition = isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
        constant = isinstance(node, ast.Assign | ast.AnnAssign) and is_constant(node.value)
        guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        where = f"{script.name}:{node.lineno}: {ast.unparse(node).splitlines()[0]}"
        assert definition or constant or guard, f"{where}\nruns on import; put it into a function"
        assert not guard or len(node.body) == 1, f"{where}\nputs code out of reach of tests; put it into main"


def test_importing_does_no_work(tmp_path: Path) -> None:
    """One process imports every script in turn: it writes, prints, starts, connects to and reseeds nothing."""
    (empty := tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "changed.json"), *(script.stem for script in SCRIPTS)],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads((tmp_path / "changed.json").read_text()) == {script.stem: [] for script in SCRIPTS}


# ----- The command line


def flags(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, argparse.Action]]:
    """Every argument of a parser and of its jobs' parsers, but for --help."""
    for action in parser._actions:  # argparse has no public way to list them
        if isinstance(action, argparse._SubParsersAction):
            for job in action.choices.values():
                yield from flags(job)
        elif not isinstance(action, argparse._HelpAction):
            yield parser, action


@each_script
def test_every_flag_has_help_and_shows_its_default(script: Path) -> None:
    found = list(flags(importlib.import_module(script.stem).build_parser()))
    for parser, action in found:
        name = "/".join(action.option_strings) or action.dest
        assert action.help and action.help != argparse.SUPPRESS, f"{name} has no help"
        shown = parser._get_formatter()._expand_help(action)
        assert action.required or "default" in shown, f"{name} does not show its default: {shown}"
    missing = COMMON_FLAGS - {option for _, action in found for option in action.option_strings}
    assert not missing, f"{script.name} lacks {sorted(missing)}, which mean the same in every script"


@each_script
def test_help_and_unknown_flags(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script.stem)
    words = [action for action in module.build_parser()._actions if not action.option_strings and action.choices]
    for first in [[], *([job] for action in words for job in action.choices)]:
        for flag, status in ("--help", 0), ("--no-such-flag", 2):
            with pytest.raises(SystemExit) as exit_:
                module.main([*first, flag])
            output = "".join(capsys.readouterr())
            assert exit_.value.code == status, f"{[*first, flag]} exits {exit_.value.code}: {output}"
            assert flag in output


# ----- Running


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Future]]:
    """A smoke run of each script, as one without matplotlib and without a network has it; two at a time."""
    folder = tmp_path_factory.mktemp("smoke")
    (blocked := folder / "blocked" / "matplotlib").mkdir(parents=True)
    (blocked / "__init__.py").write_text('raise ModuleNotFoundError("No module named matplotlib", name="matplotlib")\n')
    nowhere = dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], "http://127.0.0.1:9")
    env = os.environ | nowhere | {"PYTHONPATH": str(blocked.parent), "OMP_NUM_THREADS": "1"}

    def smoke(script: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
        (cwd := folder / script.stem).mkdir()
        command = [sys.executable, script, "--smoke", "--out", "run"]
        return subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, **CAPTURED), cwd

    with ThreadPoolExecutor(2) as pool:
        yield {script: pool.submit(smoke, script) for script in SCRIPTS}


@each_script
def test_smoke_run_without_matplotlib(script: Path, smoke_runs: dict[Path, Future]) -> None:
    """It ends well, draws nothing and says why, once."""
    done, cwd = smoke_runs[script].result()
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    hints = [line for line in output.splitlines() if "matplotlib" in line]
    assert len(hints) == 1 and "pip install" in hints[0], f"one line should say how to install matplotlib:\n{output}"
    assert [path.name for path in cwd.iterdir()] == ["run"], "it writes outside --out"
    assert not list(cwd.rglob("*.png"))
    rows = [json.loads(line) for line in (cwd / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows and all(isinstance(row, dict) for row in rows)
    result = json.loads((cwd / "run" / "result.json").read_text())
    assert {"config", "argv", "seed", "versions", "device"} <= result.keys()
    assert hashlib.sha256(script.read_bytes()).hexdigest() in result.values(), "result.json lacks the script's sha256"


# ----- What stands in the files


@each_script
def test_sizes_and_docstrings(script: Path) -> None:
    text, limit = script.read_text(), LINE_LIMIT.get(script.name, 900)
    tree = ast.parse(text)
    assert len(text.splitlines()) <= limit, f"{len(text.splitlines())} lines, over {limit}: take something out"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= 60, f"{script.name}:{node.lineno}: {node.name} has {size} lines, over 60"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{script.name}:{node.lineno}: {node.name} has no docstring"


def pins(path: Path) -> set[str]:
    """The `name==version` lines of a requirements file, which holds nothing else."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    found = {line for line in lines if line}
    loose = {line for line in found if not re.fullmatch(r"[\w-]+==[\w.]+", line)}
    assert not loose, f"{path.name} pins nothing exactly in {sorted(loose)}"
    return found


def test_requirements_are_pinned() -> None:
    assert pins(ROOT / "requirements.txt")
    assert pins(ROOT / "tests" / "peers" / "requirements.txt")


@each_script
def test_inline_metadata_agrees_with_requirements(script: Path) -> None:
    """PEP 723: a script runner installs what requirements.txt pins, and all that the script imports at its top."""
    blocks = re.findall(r"(?m)^# /// script$\n((?:^#(?:| .*)$\n)+?)^# ///$", script.read_text())
    assert len(blocks) == 1, f"{script.name} has {len(blocks)} `# /// script` blocks"
    metadata = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in blocks[0].splitlines(True)))
    assert metadata["requires-python"]
    dependencies = set(metadata["dependencies"])
    assert dependencies <= pins(ROOT / "requirements.txt")
    missing = imported_at_top(script) - {dependency.split("==")[0] for dependency in dependencies}
    assert not missing, f"imported and not in the inline metadata: {sorted(missing)}"


def test_ci_runs_the_readme_commands() -> None:
    readme, ci = ROOT / "README.md", ROOT / ".ci" / "run"
    assert readme.is_file(), "README.md is missing"
    assert os.access(ci, os.X_OK), ".ci/run is not executable"
    fenced = "\n".join(re.findall(r"(?ms)^```[^\n]*\n(.*?)^```", readme.read_text()))
    lines = [line.split("  #")[0].strip().removeprefix("$ ") for line in fenced.splitlines()]
    commands = {line for line in lines if line.startswith("pip install -r requirements.txt &&")}
    runs = [line.strip() for line in ci.read_text().splitlines() if not line.strip().startswith("#")]
    for last in "python mamba.py", "python -m pytest":
        assert f"pip install -r requirements.txt && {last}" in commands, f"README.md has no line that ends in {last!r}"
    for command in commands:
        whole = any(line.startswith((f'run "{command}"', f'run "{command} --smoke')) for line in runs)
        assert whole, f".ci/run does not run the README's {command!r}"


def tracked() -> list[Path]:
    """Files that are, or would be, in the repository."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, so there is no list of the repository's files")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_place_on_one_machine() -> None:
    place = re.compile(r"(?<![\w.~-])/(?:home|root|tmp|Users|work)\b")
    found = []
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # a picture
            continue
        found += [f"{path.relative_to(ROOT)}: {line[:120]}" for line in lines if place.search(line)]
    assert not found, "\n".join(found)


def test_output_stays_out_of_the_repository() -> None:
    assert "out/" in (ROOT / ".gitignore").read_text().splitlines()
    assert not [path for path in tracked() if "out" in path.relative_to(ROOT).parts]


def test_the_readmes_tables_are_the_result_files() -> None:
    """And a number that somebody changes there by hand is found."""
    report = importlib.import_module("tests.claims.report")
    readme = (ROOT / "README.md").read_text("utf-8")
    assert readme.count("<!-- end -->") >= 10 and report.renew(readme) == readme
    first = readme.index("| byte trigram |")
    assert report.renew(readme[:first] + readme[first:].replace("2.977", "2.978", 1)) == readme
    empty = "<!-- mamba_sample -->\n<!-- end -->\n\nkept\n\n"  # a new table's place takes nothing that follows
    assert report.renew(empty + readme).endswith("\n\nkept\n\n" + readme)
