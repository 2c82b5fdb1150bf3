"""The tables of the three READMEs, made from the result files: `python tests/claims/report.py`.

Each stands between `<!-- NAME -->` and `<!-- end -->` in README.md, tests/claims/README.md or
tests/bench/README.md. NAME is a result file whose program makes the table, or a function, here or
in tests/bench/tables.py; in `NAME:PART` PART is its argument. The column of lines in README.md's
first table is counted anew too. With `--check` nothing is written, and the exit status is 1 where a
README differs.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = ROOT / "tests/claims/results"
READMES = (ROOT / "README.md", ROOT / "tests/claims/README.md", ROOT / "tests/bench/README.md")
sys.path[:0] = [str(ROOT), str(CLAIMS.parent)]

import constrained_claims  # noqa: E402
import iclm_claims  # noqa: E402
import mamba_claims  # noqa: E402
import safe_claims  # noqa: E402
import transformer_claims  # noqa: E402
from _claims import markdown  # noqa: E402

from tests.bench import tables  # noqa: E402


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


# ----- tests/claims -------------------------------------------------------------------------------

TABLES = {}  # by name of the result file
for program in (mamba_claims, transformer_claims):
    TABLES |= {claim.name: claim.table for claim in program.CLAIMS.values()}
TABLES["safe_rlhf_claims"] = safe_claims.table
TABLES["in_context_pretraining"] = lambda result: iclm_claims.table(result["summary"])


def constrained_rlhf(part: str) -> str:
    return constrained_claims.tables(read(CLAIMS / "constrained_rlhf.json")["claims"])[part]


def sample(script: str, lines: int = 12) -> str:
    """The first lines of what the default run of that script writes."""
    text = read(CLAIMS / f"{script}_default.json")["sample"]
    return "\n".join(["```text", *text.splitlines()[:lines], "```"])


def recaption() -> str:
    """What captioners say and models draw in two default runs: seed 0 / seed 1."""
    keys = ("clip_score", "binding", "count", "shape", "colour", "size", "texture", "place")
    runs, rows = [read(CLAIMS / f"recaption_seed_{seed}.json") for seed in (0, 1)], []
    tables = [{"captioner": run["captioners"]} | run["models"] for run in runs]
    for model, names in tables[0].items():
        for name in names:
            cells = []
            for key in keys:
                values = [table[model][name].get(key) for table in tables]
                cells.append(" / ".join(f"{value:.2f}" for value in values if value is not None))
            rows.append([model, name.replace("_", " "), *cells])
    return markdown(["", "prompts", "CLIP score", *keys[1:]], rows, left=2)


# ----- The READMEs --------------------------------------------------------------------------------


def renew(text: str) -> str:
    """A README with every table made anew. Raises KeyError for a name that has none."""

    def fill(found: re.Match) -> str:
        name, *parts = found[1].split(":")
        if name in TABLES:
            table = TABLES[name](read(CLAIMS / f"{name}.json"))
        else:
            table = (globals().get(name) or getattr(tables, name))(*parts)
        return f"<!-- {found[1]} -->\n{table}\n<!-- end -->"

    def lines(found: re.Match) -> str:
        return f"{found[1]}{len((ROOT / found[2]).read_text('utf-8').splitlines()):,} |"

    text = re.sub(r"(?m)^(\| \[`(\w+\.py)`\]\(\2\) \| [^|]* \| )[\d,]+ \|", lines, text)
    return re.sub(r"<!-- ([\w:-]+) -->\n(?:(?!<!-- ).*\n)*<!-- end -->", fill, text)


def main(argv: list[str] | None = None) -> int:
    """Renew the three READMEs, or with --check only compare. Returns 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, differs = parser.parse_args(argv).check, False
    for path in READMES:
        text = path.read_text("utf-8")
        if not check:
            path.write_text(renew(text), "utf-8")
        elif renew(text) != text:
            differs = True
            print(f"{path.relative_to(ROOT)} differs: run python tests/claims/report.py")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
