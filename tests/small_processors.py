"""Folders with a small model of random weights and a processor for it, as a hub would hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.models.builders import BUILDERS
from tests.models.registry import END, IMAGE, START

CHAT = """{% for message in messages %}user {% for part in message['content'] %}{% if part['type'] == 'image' %}PLACE\
{% else %}{{ part['text'] }}{% endif %} {% endfor %}{% endfor %}{% if add_generation_prompt %}answer{% endif %}"""
"""A chat template; PLACE is what stands for a picture."""


def tokenizer(special: dict[str, int], **named: str) -> hf.PreTrainedTokenizerFast:
    """One token a word: "w5" is 5 and so on to 99, but for those given by name; no other word is known.

    Args:
        named: attributes of the tokenizer's own, as ``image_token="<image>"``.
    """
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "user": 5, "answer": 6} | special
    words |= {f"w{number}": number for number in set(range(100)) - set(words.values())}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    model.add_special_tokens(list(special))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left",
        extra_special_tokens=named)


def _llava() -> Any:
    """No chat template: the token stands in front of the text."""
    images = hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return hf.LlavaProcessor(images, tokenizer({"<image>": IMAGE}), patch_size=4, vision_feature_select_strategy="default",
                             num_additional_image_tokens=1)


def _paddleocr_vl() -> Any:
    """Pictures of any size, in patches of 4 x 4 merged two by two."""
    images = hf.PaddleOCRVLImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 32 * 48})
    words = tokenizer({"<image>": IMAGE, "<begin>": START, "<end>": END}, image_token="<image>")
    return hf.PaddleOCRVLProcessor(images, words, chat_template=CHAT.replace("PLACE", "<begin><image><end>"))


def _gemma3() -> Any:
    """Pictures stretched to a square; the prompt's place for one is another token than those of its patches."""
    images = hf.Gemma3ImageProcessor(size={"height": 16, "width": 16})
    words = tokenizer({"<patch>": IMAGE, "<begin>": START, "<end>": END}, image_token="<patch>", boi_token="<begin>",
                      eoi_token="<end>")
    return hf.Gemma3Processor(images, words, chat_template=CHAT.replace("PLACE", "<begin>"), image_seq_length=16)


def _idefics3() -> Any:
    """Pictures in tiles, each with text around it, and a smaller whole."""
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    words = tokenizer({"<image>": IMAGE, "<fake_token_around_image>": START, "<end_of_utterance>": END, "<global-img>": 95,
                       **{f"<row_{row}_col_{column}>": 90 + 2 * row + column - 3 for row in (1, 2) for column in (1, 2)}})
    return hf.Idefics3Processor(images, words, image_seq_len=16, chat_template=CHAT.replace("PLACE", "<image>"))


def _blip() -> Any:
    """No token stands for a picture."""
    return hf.BlipProcessor(hf.BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer({}))


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": _llava, "paddleocr_vl": _paddleocr_vl, "gemma3": _gemma3, "idefics3": _idefics3, "blip": _blip}


def save(name: str, folder: Path) -> Path:
    """One of :data:`tests.models.builders.BUILDERS` with its processor."""
    BUILDERS[name]().model.save_pretrained(folder)
    PROCESSORS[name]().save_pretrained(folder)
    return folder
