"""What the documents say holds: examples run, commands exist, links lead somewhere."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
import zarr
from bundles import pointwise_bundle

import wsi_pipeline
from wsi_pipeline.bundle import InputSpec, load_bundle
from wsi_pipeline.cli import COMMANDS, group

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(DOCS.glob("*.md")),
    *sorted((ROOT / "workflows").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.md")),
    *sorted((ROOT / "models").rglob("*.md")),
]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {"training.md"}  # trains for minutes, on data that are not here


def blocks_of(page, *languages):
    return [m for m in FENCE.finditer(page.read_text("utf-8")) if m[1] in languages]


def name_of(page):
    return str(page.relative_to(ROOT))


def pages_with(*languages):
    return [page for page in PAGES if blocks_of(page, *languages)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, slide_path):
    """Return a folder with all that the examples name: slide, bundle, run, grid, GeoJSON."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "slides").mkdir()
    for name in ("slide.svs", "slides/slide.svs"):
        shutil.copyfile(slide_path, folder / name)
    bundle = pointwise_bundle(folder / "models" / "lightmuseg-bcss-demo", mpp=0.5)
    wsi_pipeline.segment(
        folder / "slide.svs",
        model=bundle,
        output=folder / "out",
        precision="fp32",
        outputs=("zarr", "geojson", "overlay", "probability"),
    )
    wsi_pipeline.tile(
        folder / "slide.svs",
        folder / "grids" / "slide.zarr",
        mpp=0.5,
        patch_size=256,
        overlap=64,
        select=wsi_pipeline.SelectOptions(),
    )
    for name in ("outs/spatial", "xenium", "out/corrections"):
        (folder / name).mkdir(parents=True)
    (folder / "he_imagealignment.csv").touch()
    for name in ("annotations.geojson", "roi.geojson", "out/corrections/slide.geojson"):
        shutil.copyfile(folder / "out" / "slide" / "annotations.geojson", folder / name)
    return folder


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_python_examples_run(page, place, tmp_path, monkeypatch):
    text = page.read_text("utf-8")
    lines = [""] * text.count("\n")  # so that a traceback has the page's line numbers
    for block in blocks_of(page, "python"):
        first = text.count("\n", 0, block.start(2))
        code = block[2].splitlines()
        lines[first : first + len(code)] = code
    source = tmp_path / f"{page.stem}.py"
    source.write_text("\n".join(lines), "utf-8")
    compile(source.read_text("utf-8"), source, "exec")
    if page.name in NOT_RUN:
        pytest.skip("trains for minutes, on data that are not here")
    shutil.copytree(place, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    runpy.run_path(str(source), run_name="__main__")


def shell_lines():
    for page in PAGES:
        for block in blocks_of(page, "", "sh", "console"):
            for line in block[2].replace("\\\n", " ").splitlines():
                yield page, line.strip().removeprefix("$ ").split("  #")[0].split(" # ")[0]


@pytest.mark.parametrize(
    ("page", "line"),
    [pytest.param(p, c, id=f"{name_of(p)}: {c}") for p, c in shell_lines() if "wsi-pipeline " in c],
)
def test_commands_parse(page, line, place, monkeypatch):
    monkeypatch.chdir(place)
    program, *arguments = shlex.split(line)
    assert program == "wsi-pipeline"
    command, context = group, group.make_context(program, arguments)
    while isinstance(command, click.Group):
        words = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, words)
        context = command.make_context(name, rest, parent=context)


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {word for _, line in shell_lines() if line.startswith("make ") for word in line.split()}
    named |= set(re.findall(r"`make ([\w -]+)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8")))
    used = {word for words in named for word in words.split() if "=" not in word} - {"make"}
    assert {"demo", "test", "setup"} <= used <= targets


def commands_by_name():
    """Return all commands; those of a group are called by both names."""
    found = {}
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        inner = command.commands if isinstance(command, click.Group) else {"": command}
        found |= {f"{name} {word}".strip(): command for word, command in inner.items()}
    return found


def section(page, title):
    """Return what stands below a heading of the second level."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)[1]


@pytest.mark.parametrize("name", commands_by_name())
def test_every_option_is_explained_and_no_other(name):
    text = section((DOCS / "command-line.md").read_text("utf-8"), name)
    rows = [line for line in text.splitlines() if line.startswith("| `-")]
    explained = {flag for row in rows for flag in re.findall(r"`(-[\w-]+)`", row.split("|")[1])}
    command = commands_by_name()[name]
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert explained == {flag for option in options for flag in option.opts}
    context = click.Context(command, show_default=True)
    for option in options:
        shown = option.get_help_extra(context).get("default")
        (row,) = (row for row in rows if f"`{option.opts[0]}`" in row.split("|")[1])
        if shown and row.count("`") > 2 and len(row.split("|")) == 5 and "as in" not in row:
            assert row.split("|")[2].strip() == f"`{shown.strip('()')}`"


def test_options_of_all_commands_are_explained():
    head = (DOCS / "command-line.md").read_text("utf-8").split("\n## ")[0]
    for option in group.params:
        assert all(f"`{flag}`" in head for flag in option.opts)


def test_every_key_of_model_toml_is_explained(tmp_path):
    page = DOCS / "models.md"
    text = page.read_text("utf-8")
    (example,) = blocks_of(page, "toml")
    for field in InputSpec.__struct_fields__:
        assert f"| `{field}` |" in text
    table = tomllib.loads(example[2])
    for key in [*table, *table["output"]]:
        assert f"`{key}`" in text or f"`[{key}]`" in text
    (tmp_path / "model.toml").write_text(example[2], "utf-8")
    (tmp_path / "model.safetensors").touch()
    assert load_bundle(tmp_path).name == table["name"]


def test_the_patch_grid_holds_what_its_page_says(place):
    stored = zarr.open_group(place / "grids" / "slide.zarr", mode="r")
    text = (DOCS / "patch-grid.md").read_text("utf-8")
    for title, names in (
        ("Arrays", stored.array_keys()),
        ("Attributes of the group", stored.attrs),
    ):
        told = set(re.findall(r"^\| `(\w+)` \|", section(text, title), re.M))
        assert told == set(names)


def anchors_of(page):
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text("utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index


def test_every_public_name_can_be_imported_and_is_in_the_index():
    index = (DOCS / "index.md").read_text("utf-8")
    for name in wsi_pipeline.__all__:
        assert getattr(wsi_pipeline, name).__name__ == name
        assert f"`{name}`" in index
    assert set(wsi_pipeline.__all__) <= set(dir(wsi_pipeline))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wsi_pipeline.nonsense


def test_the_api_page_is_what_the_docstrings_make():
    made = runpy.run_path(str(ROOT / ".ci" / "write_api.py"))["written"]()
    assert (DOCS / "api.md").read_text("utf-8") == made, "run: make docs"
    assert set(wsi_pipeline.__all__) <= set(re.findall(r"^### (\w+)$", made, re.M))


def test_importing_the_package_imports_nothing_heavy():
    script = "import json, sys, wsi_pipeline; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "wsi_pipeline" in loaded
    assert not loaded & {"numpy", "torch", "dask", "zarr", "click", "shapely"}


def test_versions_and_hooks_agree_with_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    version = project["project"]["version"]
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", version)
    assert citation["license"] == project["project"]["license"]
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    tools = " ".join(project["dependency-groups"]["dev"])
    for hook in hooks["repos"][0]["hooks"]:
        tool = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert tool.replace("lint-imports", "import-linter") in tools


def test_the_pictures_are_small_and_used():
    texts = "".join(page.read_text("utf-8") for page in PAGES)
    for path in (DOCS / "images").iterdir():
        assert path.stat().st_size <= 200_000
        assert f"images/{path.name})" in texts


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_picture_is_told_to_who_does_not_see_it(page):
    shown = re.findall(r"!\[(.*?)\]\(", FENCE.sub("", page.read_text("utf-8")))
    assert all(len(words.split()) > 3 or words == "stages" for words in shown)


def test_the_charts_show_what_is_committed(tmp_path):
    charts = runpy.run_path(str(ROOT / "benchmarks" / "charts.py"))
    shown = charts["draw_peers"](tmp_path / "peers.svg")
    charts["draw_stages"](tmp_path / "stages.svg")
    page = section((DOCS / "benchmarks.md").read_text("utf-8"), "Results")
    for title, (ours, theirs) in shown.items():
        name, size, unit = re.fullmatch(r"(.*?), (?:.*?, )?([\d,]+² px), (\w+)", title).groups()
        assert f"{name}, {size}" in page
        for value in (ours, theirs):
            # as it is rounded in the table
            numbers = [float(n) for n in re.findall(rf"\| ([\d.]+) {unit}\b", page)]
            assert any(value == pytest.approx(number, rel=0.012) for number in numbers)
    readme = (ROOT / "README.md").read_text("utf-8")
    ours, theirs = shown["LightMuSeg, fp32, half tissue, 16,384² px, s"]
    told = f"| time, both in fp32 | {ours:.1f} s | {theirs:.0f} s | **{theirs / ours:.1f} times**"
    assert told in readme
    ours, theirs = shown["LightMuSeg, fp32, half tissue, 16,384² px, GB"]
    assert (
        f"| peak memory | {ours:.2f} GB | {theirs:.1f} GB | **{theirs / ours:.0f} times**" in readme
    )


def test_the_forms_of_issues_have_a_head():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert len(forms) == 3
    for form in forms:
        head = yaml.safe_load(form.read_text("utf-8").split("---")[1])
        assert set(head) == {"name", "about", "labels"}
