"""A prompt as a model's processor writes it, whatever the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from parvts_fx.command.errors import BadInput, because

KINDS = ("image", "video")


def build_inputs(processor: Any, prompt: str, pictures: Sequence[Any], frames: Any = None) -> dict[str, Any]:
    """What ``generate`` takes, for one prompt.

    By the processor's chat template where it has one: a message of the pictures, the video, and the text. Without one, or where
    the template writes nothing for a picture, the processor's own tokens for them stand in front of the text. Where the text says
    by itself where they stand, nothing is put in front.

    Args:
        pictures: PIL images.
        frames: a video, uint8 [frames, height, width, 3].

    Raises:
        BadInput: the prompt has more or fewer places than there are pictures, or the processor takes no such prompt.
    """
    given = {"image": len(pictures), "video": int(frames is not None)}
    missing = {kind: count for kind, count in given.items() if count}
    for kind in KINDS:
        token = token_of(processor, kind)
        places = prompt.count(token) if token else 0
        if places and places != given[kind]:
            raise BadInput(f"the prompt has {places} place{'s'[:places != 1]} for {kind}s ({token}), and {given[kind]} "
                           f"{'is' if given[kind] == 1 else 'are'} given")
        if places:
            missing.pop(kind)
    with because("the processor does not take this prompt"):
        text = _by_template(processor, prompt, missing) if getattr(processor, "chat_template", None) else (
            _with_places(processor, prompt, missing))
        visuals = ({"images": [list(pictures)]} if pictures else {}) | ({"videos": [frames]} if frames is not None else {})
        begin = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
        plain = {"add_special_tokens": False} if begin and text.startswith(begin) else {}
        made = dict(processor(text=[text], return_tensors="pt", **visuals, **plain))
        if "input_ids" not in made or len(made["input_ids"]) != 1:
            raise BadInput("the processor makes no ids [1, tokens] of a prompt")
    return made


def token_of(processor: Any, kind: str) -> str | None:
    """What stands for a picture or a video in a text, where the processor says so."""
    for holder in (processor, getattr(processor, "tokenizer", None)):
        token = getattr(holder, f"{kind}_token", None)
        if token:
            return str(token)
    return None


def _with_places(processor: Any, prompt: str, missing: Mapping[str, int]) -> str:
    """The text behind as many tokens as pictures and videos; a processor that names no token places them by itself."""
    tokens = [token for kind, count in missing.items() for token in [token_of(processor, kind)] * count if token]
    return "".join(f"{token}\n" for token in tokens) + prompt


def _by_template(processor: Any, prompt: str, missing: Mapping[str, int]) -> str:
    from jinja2 import TemplateError  # transformers renders templates with it

    entries = [{"type": kind} for kind, count in missing.items() for _ in range(count)]
    try:
        text = _rendered(processor, [*entries, {"type": "text", "text": prompt}])
        if not entries or text != _rendered(processor, [{"type": "text", "text": prompt}]):
            return text
    except (TemplateError, TypeError):  # it wants messages that are plain text
        pass
    try:
        return _rendered(processor, _with_places(processor, prompt, missing))
    except TemplateError as error:
        raise ValueError(f"its chat template fails: {error}") from error


def _rendered(processor: Any, content: Any) -> str:
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
