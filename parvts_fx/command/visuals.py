"""Pictures and videos from files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parvts_fx.command.errors import BadInput, because, first_line

_READERS = {"pyav": "av", "torchcodec": "torchcodec", "decord": "decord", "opencv": "cv2"}
"""What transformers calls the libraries that it reads videos with, and what they are imported as."""


def read_picture(path: Path) -> Any:
    """A PIL image, RGB, turned as its camera was held.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise BadInput("pictures need Pillow: pip install pillow") from error
    if not path.is_file():
        raise BadInput(f"there is no picture {path}")
    with because(f"the picture {path} cannot be read", (OSError, ValueError, SyntaxError, Image.DecompressionBombError)):
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")


def read_video(path: Path, count: int) -> np.ndarray:
    """Evenly spread frames, uint8 [frames, height, width, 3]: of a folder's pictures in the order of their names, of a moving
    picture that Pillow reads, or of a file that a library for videos reads.

    Raises:
        BadInput: it cannot be read, or no library at hand reads such files.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise BadInput(f"the folder {path} holds no frames")
        return _stacked([read_picture(file) for file in _spread(files, count)], path)
    if not path.is_file():
        raise BadInput(f"there is no video {path}")
    moving = _moving_picture(path, count)
    if moving is not None:
        return moving
    reader = next((name for name, module in _READERS.items() if importlib.util.find_spec(module)), None)
    if reader is None:
        raise BadInput(f"no library at hand reads the video {path}: install one (pip install av), or give a folder of frames")
    with because(f"the video {path} cannot be read"):
        from transformers import video_utils

        read: Any = video_utils.load_video  # its annotation knows no paths
        frames, _ = read(str(path), num_frames=count, backend=reader)
    return np.asarray(frames)


def _moving_picture(path: Path, count: int) -> np.ndarray | None:
    """The frames of a GIF and the like; None for what is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            frames = []
            for number in _spread(range(getattr(image, "n_frames", 1)), count):
                image.seek(number)
                frames.append(image.convert("RGB"))
    except UnidentifiedImageError:
        return None
    except (OSError, ValueError) as error:
        raise BadInput(f"the video {path} cannot be read: {first_line(error)}") from error
    return _stacked(frames, path)


def _spread(held: Sequence[Any], count: int) -> list[Any]:
    return [held[round(place)] for place in np.linspace(0, len(held) - 1, min(count, len(held)))]


def _stacked(frames: Sequence[Any], path: Path) -> np.ndarray:
    if len({frame.size for frame in frames}) > 1:
        raise BadInput(f"the frames of {path} differ in size")
    return np.stack([np.asarray(frame) for frame in frames])


def as_seen(pictures: Sequence[Any], inputs: dict[str, Any], processor: Any) -> list[Any]:
    """Pictures as the model sees them, [height, width, 3] in 0..1: cut out or stretched by the processor.

    The pixels that it made, where they are one [3, height, width] a picture, brought back to 0..1; else the pictures themselves,
    of which tokens can be told only where the processor keeps their shape.
    """
    pixels = inputs.get("pixel_values")
    given = [np.asarray(picture) / 255 for picture in pictures]
    if not isinstance(pixels, torch.Tensor):
        return given
    if pixels.dim() == 5 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.dim() != 4 or pixels.shape[0] != len(pictures) or pixels.shape[1] != 3:
        return given
    if "image_sizes" in inputs or "pixel_attention_mask" in inputs and not bool(inputs["pixel_attention_mask"].all()):
        return given  # padded to one size: what stands beside the picture has no tokens
    images = getattr(processor, "image_processor", None)
    normalised = getattr(images, "do_normalize", False)
    told = {name: getattr(images, name, None) if normalised else None for name in ("image_mean", "image_std")}
    mean, std = (np.asarray(plain if told[name] is None else told[name], dtype=np.float32).reshape(-1, 1, 1)
                 for name, plain in (("image_mean", 0.0), ("image_std", 1.0)))
    return [np.clip(each * std + mean, 0, 1).transpose(1, 2, 0) for each in pixels.float().cpu().numpy()]
