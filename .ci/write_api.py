"""Write docs/api.md, the public names as their docstrings tell them: make docs."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wsi_pipeline

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
WIDTH = 100
SECTIONS = {"Args": "Arguments", "Attributes": "Attributes", "Raises": "Raises", "Example": ""}
HEAD = """# API

All names of `wsi_pipeline`, made from their docstrings by `make docs`.
[What they are for](index.md#from-python); [what the words mean](house.md#glossary).
"""


def written() -> str:
    """Return what the page is to hold."""
    names = sorted(wsi_pipeline.__all__, key=str.lower)
    things = {name: getattr(wsi_pipeline, name) for name in names}
    groups: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": []}
    for name, thing in things.items():
        is_error = isinstance(thing, type) and issubclass(thing, Exception)
        kind = "Errors" if is_error else "Classes" if isinstance(thing, type) else "Functions"
        groups[kind].append(name)
    parts = [HEAD]
    for title, members in groups.items():
        parts.append(f"## {title}\n")
        for name in members:
            parts += [f"### {name}\n", *described(things[name])]
    return "\n".join(parts)


def described(thing: Any) -> Iterator[str]:
    """Yield the paragraphs on a public name."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))
    (node,) = ast.parse(source).body
    if isinstance(node, ast.FunctionDef):
        yield code("\n".join([*(f"@{ast.unparse(d)}" for d in node.decorator_list), call(node)]))
        yield from as_markdown(ast.get_docstring(node), {})
        return
    assert isinstance(node, ast.ClassDef)
    if issubclass(thing, Exception):
        yield f"A kind of `{thing.__bases__[0].__name__}`.\n"
    fields = {}
    for n in node.body:
        if isinstance(n, ast.AnnAssign):
            shown = re.sub(r" = field\(default_factory=(\w+)\)$", r" = \1()", ast.unparse(n))
            fields[ast.unparse(n.target)] = shown.removesuffix(" = field(init=False)")
    yield from as_markdown(ast.get_docstring(node), fields)
    members = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"]
    if members:
        yield "Members:\n"
        yield "".join(map(member, members))


def member(node: ast.FunctionDef) -> str:
    """Return the line of a method or property."""
    is_property = any("property" in ast.unparse(d) for d in node.decorator_list)
    shown = f"{node.name}: {ast.unparse(node.returns)}" if is_property else call(node, wide=True)  # type: ignore[arg-type]
    summary = (ast.get_docstring(node) or "").partition("\n\n")[0]
    return f"- `{shown}` – {' '.join(summary.split())}\n"


def call(node: ast.FunctionDef, *, wide: bool = False) -> str:
    """Return a signature as its source has it, an argument a line where it is long."""
    if node.args.args and node.args.args[0].arg in ("self", "cls"):
        del node.args.args[0]
    # A comma outside brackets ends an argument.
    parts = re.split(r", (?![^\[(]*[\])])", ast.unparse(node.args))
    parts = [re.sub(r"^(\w+: [^=]+)=", r"\1 = ", part) for part in parts]
    end = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    whole = f"{node.name}({', '.join(parts)}){end}"
    if wide or len(whole) <= WIDTH:
        return whole
    return "\n".join([f"{node.name}(", *(f"    {part}," for part in parts), f"){end}"])


def as_markdown(docstring: str | None, fields: dict[str, str]) -> Iterator[str]:
    """Yield the paragraphs of a docstring: sections become lists, examples code.

    Args:
        fields: what the source says of an attribute, by its name.
    """
    title = None
    for piece in re.split(rf"^({'|'.join(SECTIONS)}):\n", docstring or "", flags=re.M):
        body = textwrap.dedent(piece).strip("\n")
        if piece in SECTIONS:
            title = piece
        elif title == "Example":
            yield code(body)
        elif title:
            yield f"{SECTIONS[title]}:\n"
            entries = [" ".join(e.split()).partition(": ") for e in re.split(r"\n(?! )", body)]
            yield "".join(f"- `{fields.get(name, name)}` – {text}\n" for name, _, text in entries)
        elif body:
            yield f"{body}\n"


def code(text: str) -> str:
    return f"```py\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(written(), "utf-8")
