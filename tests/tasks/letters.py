"""A tokenizer of single letters for the tiny random models: 96 ids, padding is the unknown token, id 0, as in the real small models."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]


def letters_tokenizer(
    *, begin: bool = True, end: bool = False, eos: str | None = "</s>", pad: str | None = "<unk>"
) -> PreTrainedTokenizerFast:
    """One token a letter; `begin` and `end` say what the tokenizer adds of itself."""
    letters = [*SPECIAL, " ", "\n", *string.ascii_letters, *string.digits, *"->[],.:;'!?(){}#/_=+*"]
    tokenizer = Tokenizer(WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    single = ("<s> " if begin else "") + "$A" + (" </s>" if end else "")
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token=pad, bos_token="<s>", eos_token=eos, additional_special_tokens=SPECIAL[3:]
    )
    made.chat_template = CHATML
    return made
