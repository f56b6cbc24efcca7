"""Reading image files: every mode becomes RGB, a broken file becomes a one-line error."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from razorlab.errors import UserError, first_few

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
# What those endings stand for. Pillow goes by content, and some of its formats start other programs (PostScript).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
MIN_SIDE = 8  # pixels; smaller than the smallest data set here, so most likely a stray icon
CHECK_LIMIT = 20_000  # files that are decoded once before a run; a larger set is checked as it is read
CHECKED: ContextVar[bool] = ContextVar("another process of the job has checked the files", default=False)


class UnusableImage(UserError):
    """One file cannot be used. Made from its text alone, as a data worker's exception is made again here.

    ``fault`` is the text without the advice; empty in an exception that came from a data worker.
    """

    fault: str = ""

    @classmethod
    def because(cls, path: Path, reason: str, advice: str) -> UnusableImage:
        """Build the line ``path reason`` and what to do."""
        error = cls(f"{path} {reason}{advice}")
        error.fault = f"{path} {reason}"
        return error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return ``image`` as 8-bit RGB: transparency over white, 16-bit grey scaled, EXIF rotation applied."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def read_image(path: Path) -> Image.Image:
    """Decode one file.

    Raises:
        UnusableImage: the file is missing, damaged, no image, larger than Pillow's safety limit, or below ``MIN_SIDE``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Of what is damaged beyond reading Pillow raises, too; its remarks would be a second line.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            with Image.open(path, formats=FORMATS) as image:
                if min(image.size) < MIN_SIDE:
                    size = f"{image.size[0]}x{image.size[1]} pixels, at least {MIN_SIDE}x{MIN_SIDE} is needed"
                    raise UnusableImage.because(path, f"is too small: {size}", "; remove or replace it")
                return to_rgb(image)
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Warning, Image.DecompressionBombError) as error:
        raise UnusableImage.because(path, f"cannot be read as an image ({error})", ": remove or replace it") from error


@dataclass(frozen=True)
class ImageFiles:
    """Image files, decoded when asked for."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return read_image(self.paths[index])


def check_files(*groups: Sequence[Path]) -> None:
    """Decode every file once, so that damaged ones stop the run before it begins; not where ``CHECKED`` is set.

    Args:
        groups: files; a group of more than ``CHECK_LIMIT`` is left out.

    Raises:
        UserError: names the first five unusable files in order, with the reason of each, and how many there are.
    """
    paths = [path for group in groups if len(group) <= CHECK_LIMIT for path in group]
    if CHECKED.get():
        return

    def fault(path: Path) -> UnusableImage | None:
        try:
            read_image(path)
        except UnusableImage as error:
            return error
        return None

    with ThreadPoolExecutor() as pool:
        faults = [error for error in pool.map(fault, paths) if error is not None]
    if len(faults) == 1:
        raise faults[0]
    if faults:
        named = first_few([error.fault for error in faults])
        raise UserError(f"{len(faults)} of {len(paths)} files cannot be used: {named}; remove or replace them")
