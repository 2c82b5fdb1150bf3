"""The house: what holds for every script at the top of the repository, whatever its paper."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.claims import report

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
MOST_LINES = {  # of a script; they may only shrink
    "mamba.py": 1316,
    "transformer.py": 1002,
    "constrained_ppo.py": 792,
    "iclm_sort.py": 792,
    "safe_rlhf.py": 903,
    "recaption.py": 877,
}
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def imports(node: ast.AST, functions: bool) -> set[str]:
    """First names of the modules that are imported: on top, and maybe in functions too."""
    names = set()
    if isinstance(node, ast.Import):
        names = {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        names = {node.module.split(".")[0]}
    if functions or not isinstance(node, ast.FunctionDef):
        for child in ast.iter_child_nodes(node):
            names |= imports(child, functions)
    return names


@each_script
def test_few_packages_are_imported_at_the_top_and_no_other_script(script: Path) -> None:
    tree = ast.parse(script.read_text("utf-8"))
    top = imports(tree, functions=False) - sys.stdlib_module_names
    assert top <= {"torch", "numpy", "tiktoken"}
    assert not imports(tree, functions=True) & {path.stem for path in SCRIPTS}


def test_importing_does_no_work(tmp_path: Path) -> None:
    """Nothing is printed, written or drawn from the random state."""
    program = "import torch; before = torch.get_rng_state(); import {}; "
    program += "assert torch.equal(before, torch.get_rng_state())"
    names = ", ".join(path.stem for path in SCRIPTS)
    command = [sys.executable, "-B", "-c", program.format(names)]
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@each_script
def test_length(script: Path) -> None:
    lines = script.read_text("utf-8").splitlines()
    assert len(lines) <= MOST_LINES[script.name], "cut scope, not line breaks"


def test_ci_runs_the_readmes_commands() -> None:
    readme, ci = ((ROOT / name).read_text("utf-8") for name in ("README.md", ".ci/run"))
    commands = re.findall(r"(?m)^pip install -r requirements.txt && .*", readme)
    assert len(commands) == 2
    for command in commands:
        assert f'run "{command}' in ci


def test_the_tables_are_the_result_files() -> None:
    for path in report.READMES:
        text = path.read_text("utf-8")
        assert report.renew(text) == text
