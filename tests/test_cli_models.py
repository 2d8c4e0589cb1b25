"""`wsi-pipeline models`: exit codes, what is printed where, and what is written."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bundles import pointwise_bundle, small_unet_bundle
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.cli.models import command
from wsi_pipeline.networks import NETWORKS, build
from wsi_pipeline.networks.encoders import ResNet18

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "lightmuseg-bcss-demo"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["models", *(str(a) for a in arguments)])


def one_line_error(result: Result) -> str:
    """Return the message of a command that failed as it should."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small bundle with random weights and three classes."""
    return small_unet_bundle(tmp_path_factory.mktemp("models") / "small")


@pytest.mark.parametrize("name", command.commands)
def test_every_subcommand_has_help(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert f"models {name}" in result.stdout


def test_help_needs_no_torch() -> None:
    lines = [
        "import sys",
        "sys.modules['torch'] = None",  # importing it fails
        "from wsi_pipeline.cli import main",
        "main()",
    ]
    for arguments in (["models", "--help"], ["models", "import", "--help"], ["models", "list"]):
        script = [sys.executable, "-c", "\n".join(lines), *arguments]
        done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr


# -- list -------------------------------------------------------------------------------------


def test_list_finds_the_bundles_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("list")
    assert result.exit_code == 0, result.output
    names = sorted(p.parent.name for p in ROOT.glob("models/*/model.toml"))
    lines = result.stdout.splitlines()
    assert [Path(line.split()[0]).name for line in lines] == names
    assert str(ROOT / "models") in result.stderr
    (demo,) = (line for line in lines if "bcss-demo" in line)
    for word in ("lightmuseg", "slide", "Tumor", "13.4 MB"):
        assert word in demo
    (mri,) = (line for line in lines if "nmtnet-mri" in line)
    assert "Tumor; Benign or Malignant" in mri
    assert mri.endswith("no weights")


def test_list_takes_bundles_and_folders_of_bundles(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(invoke("list", bundle).stdout.splitlines()) == 1
    assert len(invoke("list", bundle.parent, DEMO).stdout.splitlines()) == 2
    pointwise_bundle(tmp_path / "models" / "mine", mpp=0.5)
    monkeypatch.chdir(tmp_path)
    lines = invoke("list").stdout.splitlines()
    assert lines[0].startswith(str(Path("models") / "mine"))
    assert len(lines) == 1 + len(list(ROOT.glob("models/*/model.toml")))


def test_list_names_broken_bundles_and_goes_on(tmp_path: Path) -> None:
    pointwise_bundle(tmp_path / "good", mpp=0.5)
    toml = pointwise_bundle(tmp_path / "bad", mpp=0.5) / "model.toml"
    toml.write_text(toml.read_text("utf-8").replace("mpp =", "mmp ="), "utf-8")
    result = invoke("list", tmp_path)
    assert result.exit_code == 1
    assert [Path(line.split()[0]).name for line in result.stdout.splitlines()] == ["good"]
    assert f"Error: {toml}: unknown input.mmp" in result.stderr


def test_list_of_nothing_says_where_it_looked(tmp_path: Path) -> None:
    assert f"no bundle in {tmp_path}" in one_line_error(invoke("list", tmp_path))
    assert invoke("list", tmp_path / "nowhere").exit_code == 2


def test_list_and_show_fetch_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    toml = pointwise_bundle(tmp_path / "far", mpp=0.5) / "model.toml"
    far, digest = (tmp_path / "far" / "program.pt").as_uri(), "0" * 64
    entry = f'weights = {{ url = "{far}", sha256 = "{digest}" }}'
    toml.write_text(toml.read_text("utf-8").replace('weights = "program.pt"', entry), "utf-8")
    assert invoke("list", tmp_path).stdout.rstrip().endswith("not fetched yet")
    facts = json.loads(invoke("show", tmp_path / "far", "--json").stdout)
    assert facts["weights"] == {"path": None, "url": far, "bytes": None, "sha256": digest}
    assert not (tmp_path / "cache").exists()


# -- show -------------------------------------------------------------------------------------


def test_show_tells_sizes_costs_and_weights() -> None:
    result = invoke("show", DEMO)
    assert result.exit_code == 0, result.output
    digest = hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest()
    for words in (
        "7,052,381; folded 5,147,509",  # the specification's counts
        "1.218 G a patch; folded 1.003",
        "3 × 256 × 256 px",
        "1 µm/px",
        "Background, Tumor",
        str(DEMO / "model.safetensors"),
        digest,
    ):
        assert words in result.stdout


def test_show_as_json_holds_the_same() -> None:
    facts = json.loads(invoke("show", ROOT / "models" / "mm3d-unet-dcemri", "--json").stdout)
    assert facts["cost"]["stored"]["parameters"] == 7_027_268
    assert round(facts["cost"]["stored"]["macs"] / 1e9, 1) == 371.5
    assert facts["input"]["spacing_mm"] == [1.0, 1.0, 1.0]
    assert facts["output"]["labels"] == ["No tumor", "Tumor"]
    assert set(facts["weights"].values()) == {None}


def test_show_says_what_is_not_counted_and_what_lacks(tmp_path: Path) -> None:
    program = invoke("show", pointwise_bundle(tmp_path, mpp=0.5)).stdout
    assert "a program: not counted" in program
    assert "brings some in" in invoke("show", ROOT / "models" / "nmtnet-mri").stdout
    assert "no bundle at" in one_line_error(invoke("show", tmp_path / "nowhere"))


# -- check ------------------------------------------------------------------------------------


def test_check_says_that_a_bundle_answers(bundle: Path) -> None:
    result = invoke("check", bundle)
    assert result.exit_code == 0, result.output
    assert "1 × 3 × 32 × 32" in result.stdout
    assert "the bundle's" in result.stdout
    assert "answers as its model.toml says" in result.stderr


def test_check_tries_bundles_without_weights_on_smaller_patches() -> None:
    folder = ROOT / "models" / "mm3d-unet-dcemri"
    result = invoke("check", folder, "--patch-size", "8,8,16")
    assert result.exit_code == 0, result.output
    assert "random ones tried" in result.stdout
    assert "1 × 2 × 8 × 8 × 16" in result.stdout
    assert "takes 3 multiples of 8" in one_line_error(invoke("check", folder, "--patch-size", "12"))
    for wrong in ("0", "8,", "big", "-8"):
        assert invoke("check", folder, "--patch-size", wrong).exit_code == 2


def test_check_fails_where_the_answer_is_another(tmp_path: Path) -> None:
    toml = pointwise_bundle(tmp_path, mpp=0.5) / "model.toml"
    text = toml.read_text("utf-8")
    toml.write_text(text.replace('  { name = "Stroma", color = [150, 200, 150] },\n', ""), "utf-8")
    assert "answers with mask (1, 3, 256, 256)" in one_line_error(invoke("check", tmp_path))


# -- import -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of a trainer: LightMuSeg with one logit, wrapped and nested."""
    torch.manual_seed(0)
    state = {f"module.{n}": t for n, t in NETWORKS["lightmuseg"](classes=1).state_dict().items()}
    path = tmp_path_factory.mktemp("checkpoints") / "best.pth"
    torch.save({"epoch": 9, "state_dict": state}, path)
    return path


def test_import_by_network(tmp_path: Path, checkpoint: Path) -> None:
    arguments = (
        "import", checkpoint, "--network", "lightmuseg", "--classes", "Background, Tumor",
        "--mpp", "0.5", "--patch-size", "64", "--output", tmp_path / "mine",
    )  # fmt: skip
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "mine")
    assert "1 logit" in result.stderr
    assert "change model.toml" in result.stderr
    assert load_bundle(tmp_path / "mine").classes[1].name == "Tumor"
    assert invoke("check", tmp_path / "mine").exit_code == 0
    assert "is there already" in one_line_error(invoke(*arguments))
    assert invoke(*arguments, "--overwrite").exit_code == 0


def test_import_like_a_bundle(tmp_path: Path, checkpoint: Path) -> None:
    result = invoke("import", checkpoint, "--like", DEMO, "--output", tmp_path / "mine")
    assert result.exit_code == 0, result.output
    mine, demo = load_bundle(tmp_path / "mine"), load_bundle(DEMO)
    assert (mine.input, mine.classes, mine.activation) == (
        demo.input,
        demo.classes,
        demo.activation,
    )
    assert mine.weights_sha256 != demo.weights_sha256


def test_import_of_what_does_not_fit_names_it_and_writes_nothing(
    tmp_path: Path, checkpoint: Path
) -> None:
    output = tmp_path / "mine"
    result = invoke("import", checkpoint, "--like", ROOT / "models/swish-unet-breast", "-o", output)
    assert "missing inc.double_conv.0.weight" in one_line_error(result)
    result = invoke("import", checkpoint, "--key", "ema", "--like", DEMO, "-o", output)
    assert "does under state_dict" in one_line_error(result)
    result = invoke("import", tmp_path / "no.pth", "--like", DEMO, "-o", output)
    assert "No such file" in one_line_error(result)
    assert not output.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--network", "lightmuseg"],
        ["--network", "lightmuseg", "--mpp", "0.5"],
        ["--network", "lightmuseg", "--like", DEMO],
        ["--like", DEMO, "--mpp", "0"],
        ["--like", DEMO, "--patch-size", "1.5"],
    ],
)
def test_import_wants_one_description(
    tmp_path: Path, checkpoint: Path, options: list[object]
) -> None:
    result = invoke("import", checkpoint, *options, "--output", tmp_path / "mine")
    assert result.exit_code == 2


def test_import_of_an_encoder_says_that_it_is_no_model(tmp_path: Path) -> None:
    torch.save(ResNet18().state_dict(), tmp_path / "resnet18.pth")
    result = invoke("import", tmp_path / "resnet18.pth", "--output", tmp_path / "encoder")
    assert result.exit_code == 0, result.output
    assert "no model" in result.stderr
    assert "nmtnet" in result.stderr
    assert len(load_file(result.stdout.strip())) == 120


# -- init -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nmtnet-ultrasound", "swish-unet-breast"])
def test_init_writes_random_weights_with_which_every_class_occurs(
    tmp_path: Path, name: str
) -> None:
    arguments = ("init", ROOT / "models" / name, "--output")
    for folder in ("a", "b"):
        result = invoke(*arguments, tmp_path / folder)
        assert result.exit_code == 0, result.output
        assert "means nothing" in result.stderr
    first, second = (load_bundle(tmp_path / folder) for folder in ("a", "b"))
    assert (first.name, first.temperature, first.features_path) == ("a", 1, None)
    assert first.input == load_bundle(ROOT / "models" / name).input
    assert first.weights_sha256 == second.weights_sha256
    assert "learnt nothing" in (tmp_path / "a" / "README.md").read_text("utf-8")
    torch.manual_seed(1)
    with torch.inference_mode():
        noise = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 16) * 4 - 2, 64)
        answer = build(first).module(noise)
    mask = (answer["mask"] if isinstance(answer, dict) else answer)[0]
    chosen = mask.argmax(0) if len(mask) > 1 else mask[0] > 0
    assert 0.05 < chosen.float().mean() < 0.95
    assert "is there already" in one_line_error(invoke(*arguments, tmp_path / "a"))


def test_init_of_a_program_is_refused(tmp_path: Path) -> None:
    bundle = pointwise_bundle(tmp_path / "program", mpp=0.5)
    result = invoke("init", bundle, "--output", tmp_path / "out")
    assert "is a program" in one_line_error(result)


# -- export -----------------------------------------------------------------------------------


def test_export_writes_a_bundle_that_check_passes(tmp_path: Path, bundle: Path) -> None:
    output = tmp_path / "program"
    result = invoke("export", bundle, "--format", "torch-export", "--output", output)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(output)
    assert "agrees with the network to" in result.stderr
    assert invoke("check", output).exit_code == 0
    assert "is there already" in one_line_error(
        invoke("export", bundle, "--format", "torch-export", "--output", output)
    )


@pytest.mark.slow
def test_export_to_onnx_talks_of_nothing_else(tmp_path: Path, bundle: Path) -> None:
    arguments = ["export", bundle, "--format", "onnx", "--output", tmp_path / "network.onnx"]
    program = [sys.executable, "-m", "wsi_pipeline", "models", *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "network.onnx")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_export_of_no_network_is_refused(tmp_path: Path) -> None:
    untrained = ROOT / "models" / "nmtnet-mri"
    for form in ("onnx", "torch-export"):
        result = invoke("export", untrained, "--format", form, "--output", tmp_path / "out")
        assert "has no weights" in one_line_error(result)
    assert invoke("export", DEMO, "--output", tmp_path / "out").exit_code == 2
