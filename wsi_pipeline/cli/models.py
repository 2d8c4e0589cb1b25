"""`wsi-pipeline models`: what bundles there are, what they hold; checkpoints in, programs out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import click

from wsi_pipeline.bundle import FOREIGN, RANDOM_WEIGHTS, Bundle, bundle_table, load_bundle
from wsi_pipeline.cli.options import (
    FOLDER,
    MPP,
    SELECT,
    TISSUE,
    Command,
    Parsed,
    inputs_argument,
    read_model,
)
from wsi_pipeline.errors import BundleError, without_secrets
from wsi_pipeline.files.models import bundles_in, keep_model, model_places, named_models
from wsi_pipeline.options import ProgramFormat


def read_sides(text: str) -> tuple[int, ...]:
    """Return whole numbers above 0, separated by commas."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"{text!r} is not a number of pixels, or several with commas")
    return tuple(map(int, parts))


COSTS = (
    ("parameters", "parameters", 1, ",.0f", ""),
    ("MACs", "macs", 1e9, ",.3f", " G a patch"),
    ("memory", "memory_bytes", 1e6, ",.0f", " MB, one patch in fp32"),
)
"""What is counted of a network: its name, key, unit, format and the unit's name."""
Facts = dict[str, Any]
"""What is said as JSON, too."""
NO_WEIGHTS = "none: `models import` brings some in"
SIDES = Parsed("PX[,PX…]", read_sides)
bundle_argument = click.argument("location", metavar="BUNDLE")
bundle_output_option = click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the bundle; its name becomes the model's.",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")


@click.group("models")
def command() -> None:
    """Show model bundles, try them, and bring weights in or programs out."""


command.command_class = Command


@command.command("list", epilog="wsi-pipeline models list")
@click.argument("folders", metavar="[FOLDER]...", nargs=-1, type=FOLDER)
@click.pass_context
def list_(ctx: click.Context, folders: tuple[Path, ...]) -> None:
    """List bundles.

    FOLDER is a bundle, or has bundles in it. Without: all that `--model NAME` finds,
    NAME being the folder's, in ./models, $WSI_PIPELINE_MODELS, the user's cache and what is
    installed.
    """
    places = folders or model_places()
    paths = [*named_models().values()] if not folders else [*chain(*map(bundles_in, folders))]
    failed = False
    rows = []
    for path in paths:
        try:
            bundle = load_bundle(path, fetch=False)
        except BundleError as error:
            # One that is damaged must not hide the others.
            click.echo(f"Error: {error}", err=True)
            failed = True
            continue
        finds = ", ".join(c.name for c in bundle.classes[1:])
        finds += f"; {' or '.join(bundle.labels)}" if bundle.labels else ""
        size = _weights_size(_weights(bundle))
        rows.append((str(path), bundle.network, bundle.modality, finds, size))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
    looked = ", ".join(map(str, places)) or "models/, which is not here"
    if not paths:
        raise click.ClickException(f"no bundle in {looked}: expected folders with a model.toml")
    click.echo(f"looked in {looked}", err=True)
    ctx.exit(int(failed))


@command.command("add", epilog="wsi-pipeline models add my-model")
@click.argument("location", metavar="BUNDLE|URL")
@click.option("--overwrite", is_flag=True, help="Replace one of the same name.")
def add(location: str, overwrite: bool) -> None:
    """Keep BUNDLE in the user's cache.

    From then on it is found by its name, that of its model.toml, whatever the current folder.
    """
    bundle = read_model(location)
    keep_model(bundle.path, bundle.name, overwrite=overwrite)
    click.echo(bundle.name)


@command.command("show", epilog="wsi-pipeline models show lightmuseg-bcss-demo")
@bundle_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(location: str, as_json: bool) -> None:
    """Show what BUNDLE is and costs.

    Classes, input, where the weights are, and the cost of a patch: parameters and
    multiply-accumulates (MACs: of convolutions and linear layers) are counted, for the network as
    stored and as folded for prediction. Memory is what one patch takes in fp32.
    """
    facts = describe(read_model(location, fetch=False))
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else _as_text(facts))


@command.command("check", epilog="wsi-pipeline models check my-model")
@bundle_argument
@click.option("--patch-size", type=SIDES, help="Try smaller patches.  [default: the bundle's]")
def check(location: str, patch_size: tuple[int, ...] | None) -> None:
    """Try BUNDLE on random patches.

    Does it answer as its model.toml says? Shapes and values are checked on the CPU, and that the
    form for prediction equals the network. A bundle without weights gets random ones. What it
    says of its training tissue is read, too.
    """
    from wsi_pipeline.inference.unlike import load_familiar
    from wsi_pipeline.networks.check import try_bundle

    bundle = read_model(location)
    load_familiar(bundle)
    trial = try_bundle(bundle, patch_size=patch_size)
    rows = [("weights", "the bundle's" if trial.has_weights else "none; random ones tried")]
    rows += [(name, _by(shape)) for name, shape in trial.shapes.items()]
    rows.append(("seconds", f"{trial.seconds:.2f}, the first patch"))
    if trial.difference is not None:
        rows.append(("folded", f"{trial.seconds_folded:.2f}, differs by {trial.difference:.1e}"))
    for name, value in rows:
        click.echo(f"{name:<9}{value}")
    click.echo(f"{bundle.name} answers as its model.toml says", err=True)


@command.command(
    "import",
    epilog="wsi-pipeline models import best.pth --like models/nmtnet-ultrasound --output mine",
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@bundle_output_option
@click.option("--like", metavar="BUNDLE", help="A bundle that the new one is like.")
@click.option(
    "--network", metavar="NAME", help="The network, for slides, where no bundle is like it."
)
@click.option("--classes", metavar="NAME,NAME[,…]", help="In the mask's order, background first.")
@click.option("--mpp", type=MPP, help="µm per pixel that it was trained at.")
@click.option("--patch-size", type=SIDES, help="Of its patches; overlaps become a quarter.")
@click.option("--key", help="Where in the checkpoint the tensors are, as `ema.model`.")
@overwrite_option
def import_(
    checkpoint: Path,
    output: Path,
    like: str | None,
    network: str | None,
    classes: str | None,
    mpp: float | None,
    patch_size: tuple[int, ...] | None,
    key: str | None,
    overwrite: bool,
) -> None:
    """Make a bundle of CHECKPOINT.

    It is a .pth, .pt, .safetensors or .onnx file, or nnunet:FOLDER, a result folder of nnU-Net v2
    (for slides with --mpp); no code in it is run. Say what it is: --like a bundle, but for what
    --classes, --mpp and --patch-size say; or --network with --classes and --mpp. Tensors that
    lack, are too many or have another shape are named, and nothing is written. ONNX files of
    `models export` say it themselves, others need --classes and --mpp. Without all that, a file
    is torchvision's MobileNetV2 or ResNet18, and becomes one that training can start from; and a
    folder is a patch classifier of WSInfer, a program, which is run.
    """
    from wsi_pipeline.networks.checkpoints import (
        import_encoder,
        import_model,
        import_onnx,
        import_wsinfer,
        make_template,
    )

    if str(checkpoint).startswith("nnunet:"):
        from wsi_pipeline.networks.nnunet_folder import import_nnunet, parse_location

        folder, own = parse_location(str(checkpoint))
        made = import_nnunet(folder, output, mpp=mpp or own, overwrite=overwrite)
        click.echo(f"{made.name}: for {made.modality}s", err=True)
        click.echo(str(output))
        return
    if like and network:
        raise click.UsageError("--like and --network exclude each other")
    is_onnx = checkpoint.suffix.lower() == ".onnx" or network == "onnx"
    if is_onnx and not like and (classes or mpp):
        network = "onnx"
    is_folder = checkpoint.is_dir()
    if not is_folder and not is_onnx and not like and not network:
        kind, path = import_encoder(checkpoint, output, key=key, overwrite=overwrite)
        click.echo(
            f"{kind.name} without a decoder: no model, but where training {kind.network} may "
            "start from, as train.encoder in a recipe",
            err=True,
        )
        click.echo(str(path))
        return
    if network and not (classes and mpp):
        raise click.UsageError("--network needs --classes and --mpp; or name a bundle with --like")
    template = None
    if like or network:
        template = make_template(
            folder=output,
            like=read_model(like, fetch=False) if like else None,
            network=network,
            classes=None if classes is None else classes.split(","),
            mpp=mpp,
            patch_size=patch_size,
        )
    if is_folder:
        bundle = import_wsinfer(checkpoint, output, overwrite=overwrite)
    elif is_onnx or template is None:
        bundle = import_onnx(checkpoint, template, output, overwrite=overwrite)
    else:
        bundle = import_model(checkpoint, template, output, key=key, overwrite=overwrite)
    logits = "1 logit" if bundle.activation == "sigmoid" else f"{len(bundle.classes)} logits"
    spec = bundle.input
    click.echo(
        f"{bundle.network} with {logits}; taken as trained with mean {list(spec.mean)}, std "
        f"{list(spec.std)}, patches of {_by(spec.patch_size)} px: if not, change model.toml. "
        "The card, README.md, is yours to fill in.",
        err=True,
    )
    click.echo(str(output))


@command.command(
    "init", epilog="wsi-pipeline models init models/nmtnet-ultrasound --output random-nmtnet"
)
@bundle_argument
@bundle_output_option
@click.option(
    "--seed", type=click.IntRange(min=0, max=2**63 - 1), default=0, help="Of the weights."
)
@overwrite_option
def init(location: str, output: Path, seed: int, overwrite: bool) -> None:
    """Make a bundle like BUNDLE with random weights.

    It has learnt nothing: what it marks means nothing. To try files, settings and machines before
    there are weights.
    """
    from wsi_pipeline.networks.checkpoints import init_model

    init_model(read_model(location, fetch=False), output, seed=seed, overwrite=overwrite)
    click.echo(f"{RANDOM_WEIGHTS}: what this model marks means nothing", err=True)
    click.echo(str(output))


@command.command(
    "export", epilog="wsi-pipeline models export my-model --format onnx --output my-model.onnx"
)
@bundle_argument
@click.option("--format", "form", required=True, type=click.Choice(get_args(ProgramFormat)))
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(path_type=Path),
    help="The ONNX file; for torch-export the folder of a new bundle.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="The only one that the program takes.  [default: any]",
)
@overwrite_option
def export(
    location: str, form: ProgramFormat, output: Path, batch_size: int | None, overwrite: bool
) -> None:
    """Write BUNDLE as a program.

    For other runtimes. It takes normalised patches and gives logits: `mask` first, then `label`
    where the network classifies. It is written only if it agrees with the network on random
    patches.
    """
    from wsi_pipeline.networks.program import export_onnx, export_torch

    # it tells each time that torchvision is not here, which nothing here needs
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    write = export_onnx if form == "onnx" else export_torch
    difference = write(read_model(location), output, batch_size=batch_size, overwrite=overwrite)
    click.echo(f"agrees with the network to {difference:.1e} of the largest logit", err=True)
    click.echo(str(output))


@command.command(
    "quantise", epilog="wsi-pipeline models quantise my-model slides/ --output my-model-int8"
)
@bundle_argument
@inputs_argument
@bundle_output_option
@click.option("--patches", type=click.IntRange(min=2), default=64, help="To be looked at, in all.")
@click.option("--mpp", type=MPP, help="µm per level-0 pixel, for slides that do not say.")
@click.option("--tissue", type=TISSUE, default=SELECT.tissue, help="As in `segment`.")
@overwrite_option
def quantise(
    location: str,
    inputs: tuple[str, ...],
    output: Path,
    patches: int,
    mpp: float | None,
    tissue: str | Path,
    overwrite: bool,
) -> None:
    """Make a bundle like BUNDLE that predicts in 8-bit integers, too.

    For `--precision int8`: on CPUs quicker, and less exact. INPUT are slides, images or volumes as
    BUNDLE is for, of the kinds that it will see: half of some patches tell what values occur in
    the network, and the card says how the classes of the others agree with those of fp32.
    """
    from wsi_pipeline.run.quantise import quantise_model

    same = quantise_model(
        inputs,
        model=location,
        output=output,
        patches=patches,
        overwrite=overwrite,
        mpp=mpp,
        tissue=tissue,
    )
    click.echo(f"{same:.2%} of the pixels keep the class that they have in fp32", err=True)
    click.echo(str(output))


def describe(bundle: Bundle) -> Facts:
    """Count what a bundle's network costs; return all that is known of it, ready for JSON."""
    return {
        "path": str(bundle.path),
        **bundle_table(bundle),
        "weights": _weights(bundle),
        **({"encoder": {"network": e.network, **_weights(e)}} if (e := bundle.encoder) else {}),
        "cost": None if bundle.network in FOREIGN or bundle.encoder else _cost(bundle),
    }


def _weights(bundle: Bundle) -> Facts:
    path, origin = bundle.weights_path, bundle.weights_origin
    return {
        "path": str(path) if path else None,
        "url": without_secrets(origin.url) if origin else None,
        "bytes": path.stat().st_size if path else None,
        "sha256": origin.sha256 if origin else bundle.weights_sha256 or None,
    }


def _cost(bundle: Bundle) -> dict[str, dict[str, int]]:
    """Return parameters, MACs and bytes of a patch, as stored and as folded for prediction."""
    import torch

    from wsi_pipeline.networks import create
    from wsi_pipeline.networks.cost import count_macs, count_parameters, peak_memory
    from wsi_pipeline.networks.fold import for_inference

    with torch.device("meta"):
        network = create(bundle)
    size = (bundle.input.channels, *bundle.input.patch_size)
    forms = {"stored": network, "folded": for_inference(network, device="meta")}
    return {
        name: {
            "parameters": count_parameters(module),
            "macs": count_macs(module, size),
            "memory_bytes": peak_memory(module, size),
        }
        for name, module in forms.items()
    }


def _as_text(facts: Facts) -> str:
    """Return the facts as lines for people."""
    spec, output, weights, cost = (facts[part] for part in ("input", "output", "weights", "cost"))
    encoder = facts.get("encoder")
    options = ", ".join(f"{key} = {value}" for key, value in facts["network_options"].items())
    resolution = (
        f"{spec['mpp']:g} µm/px"
        if "mpp" in spec
        else f"brought to {_by(spec['fit'])} px"
        if "fit" in spec
        else f"{_by(spec['spacing_mm'])} mm"
        if "spacing_mm" in spec
        else "pixels as they are"
    )
    size = f"{spec['channels']} × {_by(spec['patch_size'])} px"
    costs = [("cost", "a program: not counted")]
    if cost:
        costs = [
            (name, f"{stored / of:{form}}{unit}; folded {folded / of:{form}}")
            for name, key, of, form, unit in COSTS
            for stored, folded in [(cost["stored"][key], cost["folded"][key])]
        ]
    place = weights["url"] or weights["path"]
    classes = [info["name"] for info in output.get("classes", ())]
    rows = [
        ("name", facts["name"]),
        ("network", facts["network"] + (f" ({options})" if options else "")),
        ("modality", f"{facts['modality']}, {resolution}"),
        ("input", f"{size}, overlap {_by(spec['overlap'])} px"),
        ("scaled by", f"mean {spec['mean']}, std {spec['std']}, after [0, 1]"),
        ("output", f"{output['activation']}: {', '.join(classes) or 'one label a patch'}"),
        ("labels", ", ".join(output.get("labels", ()))),
        ("tta", facts.get("tta")),
        ("limits", facts.get("limits")),
        *costs,
        ("weights", f"{place}, {_weights_size(weights)}" if place else NO_WEIGHTS),
        ("sha256", weights["sha256"]),
        ("encoder", encoder and f"{encoder['network']}, {encoder['url'] or encoder['path']}"),
    ]
    return "\n".join([facts["path"], *(f"  {name:<12}{value}" for name, value in rows if value)])


def _weights_size(weights: Facts) -> str:
    if weights["bytes"] is not None:
        return f"{weights['bytes'] / 1e6:.1f} MB"
    return "not fetched yet" if weights["url"] else "no weights"


def _by(sizes: Sequence[float]) -> str:
    return " × ".join(f"{size:g}" for size in sizes)
