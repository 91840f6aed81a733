"""A model with its processor, and a prompt for it: from what the command line names."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers

from parvts_fx.command.errors import BadInput, because
from parvts_fx.command.prompts import build_inputs
from parvts_fx.command.visuals import read_picture, read_video
from parvts_fx.cost import named
from parvts_fx.options import parse_options


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the commands work on."""

    model: Any
    processor: Any
    inputs: dict[str, Any]
    """What ``generate`` takes, on the model's device, numbers in its dtype; batch 1."""

    pictures: list[Any]
    """As they were read, PIL images; a video's frames are not among them."""

    def text_of(self, ids: torch.Tensor) -> str:
        """Generated ids [tokens] as text."""
        with because("the processor cannot decode the answer"):
            return str(self.processor.batch_decode(ids[None], skip_special_tokens=True)[0]).strip()


def pruning(given: argparse.Namespace) -> dict[str, Any]:
    """The options of parvts_fx that were given.

    Raises:
        ValueError: for one that is out of range.
    """
    names = ("keep_ratio", "keep_tokens", "migration_depth", "stages", "fusion", "score", "merge")
    found = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if found.get("merge") == "none":
        found["merge"] = None
    parse_options(found)
    return found


def processors(given: argparse.Namespace) -> list[str] | None:
    """The processors to predict for, by their names in full; None for all.

    Raises:
        BadInput: one of them is unknown.
    """
    try:
        return [named(name) for name in given.processor or ()] or None
    except ValueError as error:
        raise BadInput("--processor: " + str(error).removeprefix("parvts_fx: processors: ")) from error


def prepare(given: argparse.Namespace) -> Prepared:
    """Read everything; what is cheap to find wrong first.

    Raises:
        BadInput: something cannot be read or does not fit.
    """
    if not given.image and given.video is None:
        raise BadInput("there is nothing to prune: give a picture (--image FILE) or a video (--video FILE)")
    pictures = [read_picture(path) for path in given.image]
    frames = None if given.video is None else read_video(given.video, given.frames)
    device = find_device(given.device)
    model, processor = load(given.model, device, given.dtype, given.trust_remote_code)
    inputs = build_inputs(processor, given.prompt, pictures, frames)
    moved = {name: _moved(held, device, model.dtype) for name, held in inputs.items()}
    return Prepared(model, processor, moved, pictures)


def _moved(held: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(held, torch.Tensor):
        return held
    return held.to(device, dtype) if held.is_floating_point() else held.to(device)


def find_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with because(f"--device {name}"):
        device = torch.device(name)
        torch.zeros(1, device=device)
    return device


def load(name: str, device: torch.device, dtype: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """A model for inference on a device, and its processor.

    Raises:
        BadInput: there is none, or it takes no pictures.
    """
    _check_folder(name)
    what = f"{name} cannot be loaded"
    kind: Any = transformers.AutoModelForImageTextToText
    with because(what):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    try:
        with because(what):
            model, told = kind.from_pretrained(
                name, config=config, trust_remote_code=trust_remote_code, output_loading_info=True,
                dtype=dtype or ("float32" if device.type == "cpu" else "auto"))
    except BadInput as error:
        if "Unrecognized configuration class" in str(error):
            raise BadInput(f'{name} is a model of type "{config.model_type}", which takes no pictures: '
                           "AutoModelForImageTextToText has no class for it") from error
        raise
    if told["missing_keys"]:
        raise BadInput(f"{name} lacks {len(told['missing_keys'])} of the model's weights, {min(told['missing_keys'])} for one")
    with because(f"the processor of {name} cannot be loaded"):
        processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    if not any(hasattr(processor, part) for part in ("image_processor", "video_processor")):
        raise BadInput(f"{name} comes with a tokenizer alone: the processor's files (processor_config.json or "
                       "preprocessor_config.json) are missing")
    return model.eval().requires_grad_(False).to(device), processor


def _check_folder(name: str) -> None:
    """What a loader would say of a folder in many lines, or after asking the hub."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadInput(f"{name} is no model's folder: it has no config.json")
    elif folder.exists():
        raise BadInput(f"{name} is a file; give the folder that holds the model")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name or "/" not in name:
        raise BadInput(f"there is no folder {name}")
