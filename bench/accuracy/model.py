"""The model: Hugging Face's LLaVA classes at a small size, and its processor, both built in code."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from bench.accuracy.questions import BEGIN, END, IMAGE_TOKEN, PAD, UNKNOWN, vocabulary
from bench.accuracy.scenes import IMAGE, PATCH

LAYERS, WIDTH, HEADS, MLP = 8, 128, 4, 352
TEMPLATE = """{% for message in messages %}{% if message['role'] == 'user' %}USER:{% else %}ASSISTANT:{% endif %}\
{% if message['content'] is string %} {{ message['content'] }} {% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}{% endfor %} {% endif %}{% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
"""What :func:`prompt` writes, for messages of which the first holds the picture and a question."""

MEAN = STD = 0.5
"""How pixels in 0..1 are normalised, the same for each channel."""


def build_model(layers: int = LAYERS, width: int = WIDTH) -> transformers.LlavaForConditionalGeneration:
    """An untrained model; seed torch before."""
    config = transformers.LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, image_size=IMAGE, patch_size=PATCH, initializer_factor=1.0),
        text_config=dict(
            model_type="llama", hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 32, vocab_size=len(vocabulary()),
            max_position_embeddings=512, initializer_range=0.05, pad_token_id=PAD, bos_token_id=BEGIN,
            eos_token_id=END),
        image_token_index=IMAGE_TOKEN, vision_feature_layer=-1, vision_feature_select_strategy="default")
    model = transformers.LlavaForConditionalGeneration._from_config(config)
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, bos_token_id=BEGIN, eos_token_id=END)
    return model


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words to ids, one token a word, with ``<s>`` in front; padding on the left."""
    words = vocabulary()
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[UNKNOWN]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"{words[BEGIN]} $A", special_tokens=[(words[BEGIN], BEGIN)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=words[PAD], bos_token=words[BEGIN], eos_token=words[END],
        unk_token=words[UNKNOWN], additional_special_tokens=[words[IMAGE_TOKEN]], padding_side="left")


def build_processor() -> transformers.LlavaProcessor:
    """The tokenizer, and pictures to normalised pixels."""
    words = vocabulary()
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}, image_mean=[MEAN] * 3,
        image_std=[STD] * 3)
    return transformers.LlavaProcessor(
        image_processor=images, tokenizer=build_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=words[IMAGE_TOKEN], chat_template=TEMPLATE)


def prompt(question: str) -> str:
    """LLaVA's format; the processor turns ``<image>`` into one token a patch."""
    return f"USER: <image> {question} ASSISTANT:"
