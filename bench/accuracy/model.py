"""The model: Hugging Face's LLaVA classes at a small size, and its processor, both built in code."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from bench.accuracy.questions import BEGIN, END, IMAGE_TOKEN, PAD, UNKNOWN
from bench.accuracy.scenes import IMAGE, PATCH
from bench.accuracy.tasks import TIDY, Task

LAYERS, WIDTH, HEADS, MLP = 8, 128, 4, 352
TEMPLATE = """{% for message in messages %}{% if message['role'] == 'user' %}USER:{% else %}ASSISTANT:{% endif %}\
{% if message['content'] is string %} {{ message['content'] }} {% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}{% endfor %} {% endif %}{% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
"""What :func:`prompt` writes for the task "tidy", for messages of which the first holds the picture and a question."""

MEAN = STD = 0.5
"""How pixels in 0..1 are normalised, the same for each channel."""


def build_model(
    layers: int = LAYERS, width: int = WIDTH, task: Task = TIDY
) -> transformers.LlavaForConditionalGeneration:
    """An untrained model; seed torch before."""
    config = transformers.LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, image_size=IMAGE, patch_size=PATCH, initializer_factor=1.0),
        text_config=dict(
            model_type="llama", hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 32, vocab_size=len(task.words),
            max_position_embeddings=512, initializer_range=0.05, pad_token_id=PAD, bos_token_id=BEGIN,
            eos_token_id=END),
        image_token_index=IMAGE_TOKEN, vision_feature_layer=-1, vision_feature_select_strategy="default")
    model = transformers.LlavaForConditionalGeneration._from_config(config)
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, bos_token_id=BEGIN, eos_token_id=END)
    return model


@torch.no_grad()
def take_over(model: transformers.LlavaForConditionalGeneration, folder: Path) -> None:
    """Weights of a trained model whose words are this model's first ones; what it has for further words stays."""
    held = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        weight[:len(held[name])] = held[name]


def build_tokenizer(task: Task = TIDY) -> transformers.PreTrainedTokenizerFast:
    """Words to ids, one token a word, with ``<s>`` in front; padding on the left."""
    words = task.words
    tokenizer = Tokenizer(WordLevel(dict(task.ids), unk_token=words[UNKNOWN]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"{words[BEGIN]} $A", special_tokens=[(words[BEGIN], BEGIN)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=words[PAD], bos_token=words[BEGIN], eos_token=words[END],
        unk_token=words[UNKNOWN], additional_special_tokens=[words[IMAGE_TOKEN]], padding_side="left")


def build_processor(task: Task = TIDY) -> transformers.LlavaProcessor:
    """The tokenizer, and pictures to normalised pixels."""
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}, image_mean=[MEAN] * 3,
        image_std=[STD] * 3)
    return transformers.LlavaProcessor(
        image_processor=images, tokenizer=build_tokenizer(task), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=task.words[IMAGE_TOKEN], chat_template=TEMPLATE)


def prompt(question: str) -> str:
    """A prompt of the task "tidy"."""
    return TIDY.prompt(question)
