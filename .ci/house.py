"""What the house has won and must not lose, in figures: make house.

Each gate has the limit that holds today and the aim beside it, and says what to do where it is
missed. Who betters a figure sets its limit in GATES to the new one, in the same commit. Who has a
reason to raise one raises it there, and gives the reason in the commit's message.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "wsi_pipeline"
LONG = 450
"""Lines of a module from which on it says why."""
LIGHT = ("evaluation", "report", "viewer", "run.again", "run.opened")
"""Rooms whose modules, all of them, are imported without what is in HEAVY."""
HEAVY = ("torch", "dask", "distributed")

# figure: limit today, aim, what to do where it is missed
GATES = {
    "lines": (42_264, 27_000, "delete what the change makes needless; use what is there"),
    "modality branches": (
        0, 0, "let a SourceRun differ, or a table by modality, as KINDS and OUTPUTS",
    ),
    "single-use private helpers, % of functions": (
        14, 15, "inline what names no concept and has no test",
    ),
    "own-line comments, % of lines": (
        2, 2, "say why, in a sentence on a line of its own, where the code cannot",
    ),
    "long modules without a reason": (
        0, 0, f"above {LONG} lines: divide by nouns, or say 'Long because …' in the docstring",
    ),
    "heavy modules": (
        0, 0, f"{', '.join(LIGHT)} load {', '.join(HEAVY)}: import in the function that needs it",
    ),
    "Any in signatures of cli": (0, 0, "name the type, or each option"),
}  # fmt: skip
AT_LEAST = "own-line comments, % of lines"
"""The one figure of which more is better."""


def figures() -> dict[str, tuple[float, list[str]]]:
    """Return each figure by its name, and where it comes from."""
    files = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")])
    sources = {path: path.read_text("utf-8") for path in files}
    trees = {path: ast.parse(text) for path, text in sources.items()}
    shown = {path: str(path.relative_to(PACKAGE)) for path in sources}
    lines = sum(len(text.splitlines()) for text in sources.values())

    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    uses = Counter(n.id for n in nodes if isinstance(n, ast.Name))
    uses += Counter(n.attr for n in nodes if isinstance(n, ast.Attribute))
    single = [n.name for n in functions if re.match("_(?!_)", n.name) and uses[n.name] <= 1]

    branch = re.compile(r"isinstance\([^)]*\bSlide\b|modality\s*(?:==|!=)")
    branches = [
        f"{shown[path]}: {line.strip()}"
        for path, text in sources.items()
        if "sources" not in path.parts
        for line in text.splitlines()
        for _ in branch.findall(line)
    ]
    long = [
        f"{shown[path]}: {len(text.splitlines())}"
        for path, text in sources.items()
        if len(text.splitlines()) > LONG
        and "Long because" not in (ast.get_docstring(trees[path]) or "")
    ]
    anys = [
        f"{shown[path]}: {node.name}"
        for path, tree in trees.items()
        if path.parent.name == "cli"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for note in annotations_of(node)
        if any(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(note))
    ]
    heavy = heavy_modules()
    return {
        "lines": (lines, []),
        "modality branches": (len(branches), branches),
        "single-use private helpers, % of functions": (100 * len(single) / len(functions), single),
        AT_LEAST: (100 * sum(map(own_line_comments, sources.values())) / lines, []),
        "long modules without a reason": (len(long), long),
        "heavy modules": (len(heavy), heavy),
        "Any in signatures of cli": (len(anys), anys),
    }


def annotations_of(node: ast.FunctionDef) -> list[ast.expr]:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
    return [note for note in (*(a.annotation for a in every), node.returns) if note]


def own_line_comments(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [t for t in tokens if t.type == tokenize.COMMENT]
    return sum(t.line.strip().startswith("#") for t in comments)


def heavy_modules() -> list[str]:
    """Return the modules of LIGHT that load any of HEAVY."""
    names = []
    for room in LIGHT:
        modules = sorted((PACKAGE / room.replace(".", "/")).glob("*.py"))
        names += [f"wsi_pipeline.{room}.{p.stem}" for p in modules if p.stem != "__init__"]
        names += [] if modules else [f"wsi_pipeline.{room}"]
    if not loaded_by(names):
        return []
    return [f"{name}: {', '.join(found)}" for name in names if (found := loaded_by([name]))]


def loaded_by(names: list[str]) -> list[str]:
    """Return what of HEAVY modules load in a Python of their own."""
    script = f"import sys, {', '.join(names)}; print(*{{*{HEAVY}}} & {{*sys.modules}})"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, text=True, cwd=PACKAGE.parent
    )
    return sorted(done.stdout.split())


def main() -> int:
    missed = False
    for name, (figure, where) in figures().items():
        limit, aim, mend = GATES[name]
        sign, good = ("≥", figure >= limit) if name == AT_LEAST else ("≤", figure <= limit)
        print(f"{name}: {figure:,.6g} (limit {sign} {limit:,g}, aim {aim:,g})")
        if not good:
            print(f"  MISSED: {mend}", *(f"    {place}" for place in where), sep="\n")
            missed = True
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
