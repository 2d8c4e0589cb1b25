"""Images, volumes and bundles for them that tests make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

STEPS = (0.3, 0.61)
"""Of the scaled value, where one class ends and the next begins."""


class Steps(torch.nn.Module):
    """A pointwise network: class by the value of the first channel, scaled to [0, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = ((x[:, :1] > 0.3) & (x[:, :1] <= 0.61)).float()
        second = (x[:, :1] > 0.61).float()
        return torch.cat([1 - first - second, first, second], dim=1) * 20


class Around(torch.nn.Module):
    """Logits from means over some pixels around: patches differ where they overlap."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 5:
            mean = torch.nn.functional.avg_pool3d(x[:, :1], 5, 1, 2)
        else:
            mean = torch.nn.functional.avg_pool2d(x[:, :1], 5, 1, 2)
        return torch.cat([0.45 - mean, x[:, :1] - 0.5, mean - 0.45], dim=1) * 20


class Soft(torch.nn.Module):
    """A pointwise network that is nowhere sure."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x[:, :1]
        return torch.cat([0.45 - first, 0.1 - (first - 0.5).abs(), first - 0.55], dim=1) * 5


class Labelled(torch.nn.Module):
    """`Steps` that also says of a patch how bright it is."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        first = ((x[:, :1] > 0.3) & (x[:, :1] <= 0.61)).float()
        second = (x[:, :1] > 0.61).float()
        mean = x.flatten(1).mean(1)
        return {
            "mask": torch.cat([1 - first - second, first, second], dim=1) * 20,
            "label": torch.stack([torch.zeros_like(mean), 10 * (mean - 0.5)], dim=1),
        }


class Enhanced(torch.nn.Module):
    """`Steps` of what the second channel has more than the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more = x[:, 1:2] - x[:, :1]
        first = ((more > 0.3) & (more <= 0.61)).float()
        second = (more > 0.61).float()
        return torch.cat([1 - first - second, first, second], dim=1) * 20


def classify(scaled: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Return what `Steps` says of values in units of full scale."""
    return np.digitize(np.asarray(scaled, np.float32), np.float32(STEPS), right=True).astype("u1")


def scan_bundle(
    folder: Path,
    *,
    modality: str = "volume",
    resolution: str = "spacing_mm = [1.0, 1.0, 1.0]",
    patch_size: tuple[int, ...] = (32, 32, 32),
    overlap: tuple[int, ...] | None = None,
    keys: str = "",
    channels: int = 1,
    program: type[torch.nn.Module] = Steps,
    labels: str = "",
) -> Path:
    """Write a bundle of a pointwise TorchScript program; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    overlap = overlap or tuple(n // 4 for n in patch_size)
    (folder / "model.toml").write_text(
        f"""name = "test-{folder.name}"
modality = "{modality}"
network = "torchscript"
weights = "program.pt"
[input]
{resolution}
channels = {channels}
patch_size = {list(patch_size)}
overlap = {list(overlap)}
mean = {[0.0] * channels}
std = {[1.0] * channels}
{keys}
[output]
activation = "softmax"
classes = [
  {{ name = "Background" }},
  {{ name = "Grey", color = [200, 200, 0] }},
  {{ name = "Bright", color = [200, 0, 0] }},
]
{labels}
""",
        encoding="utf-8",
    )
    torch.jit.script(program()).save(folder / "program.pt")
    return folder


def blobs(shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[np.int16]:
    """Return smooth values from 0 to 1000, int16, of which all classes occur."""
    coarse = np.random.default_rng(seed).random([-(-n // 7) + 1 for n in shape])
    field = torch.nn.functional.interpolate(
        torch.from_numpy(coarse)[None, None],
        scale_factor=7,
        mode="trilinear" if len(shape) == 3 else "bilinear",
    )[0, 0].numpy()
    field = field[tuple(slice(n) for n in shape)]
    low, high = field.min(), field.max()
    return np.rint((field - low) / (high - low) * 1000).astype(np.int16)


def write_series(
    folder: Path, voxels: npt.NDArray[np.int16], *, spacing: tuple[float, float, float], seed: int
) -> None:
    """Write a CT series of (z, y, x) voxels, its files named in no order, rescaled by 2 and -100.

    Args:
        folder: to write into.
        voxels: stored values.
        spacing: (z, y, x) mm.
        seed: of the order.
    """
    folder.mkdir(parents=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    names = np.random.default_rng(seed).permutation(len(voxels))
    for z, (name, pixels) in enumerate(zip(names, voxels, strict=True)):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header = Dataset()
        header.file_meta = meta
        header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        header.StudyInstanceUID, header.SeriesInstanceUID = study, series
        header.FrameOfReferenceUID = frame
        header.PatientID, header.PatientName = "test", "Test^Patient"
        header.PatientBirthDate = header.PatientSex = header.StudyID = ""
        header.StudyDate = header.StudyTime = header.AccessionNumber = ""
        header.ReferringPhysicianName = ""
        header.Modality, header.InstanceNumber = "CT", int(name) + 1
        header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        header.ImagePositionPatient = [-20.0, -30.0, -40.0 + z * spacing[0]]
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        header.PixelSpacing, header.SliceThickness = [spacing[1], spacing[2]], spacing[0]
        header.RescaleSlope, header.RescaleIntercept = "2", "-100"
        header.Rows, header.Columns = pixels.shape
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated = header.BitsStored = 16
        header.HighBit, header.PixelRepresentation = 15, 1
        header.PixelData = pixels.astype("<i2").tobytes()
        header.save_as(folder / f"{name:03d}.dcm", enforce_file_format=True)
