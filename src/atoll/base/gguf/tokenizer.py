"""The tokenizer that a GGUF file describes: vocabulary, merges, and the name of a rule by which text is cut before them."""

from __future__ import annotations

from typing import Any

from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from atoll.base.gguf.header import BROKEN, Header, unreadable
from atoll.base.load import load_tokenizer
from atoll.errors import TokenizerError
from atoll.units import counted

_BYTE_LEVEL_CUTS = ("gpt-2", "qwen2", "smollm")
"""Those that transformers' reader has, and smollm, for which it takes GPT-2's. Others it takes for GPT-2's, too, or lacks what llama.cpp
does beside them (llama-bpe and tekken take a whole word that is a token, whatever the merges say).

Source: llama.cpp, llama_vocab::impl::load and llm_tokenizer_bpe.
"""

_SPACE = "\u2581"


def read_tokenizer(header: Header, other: str | None) -> PreTrainedTokenizerBase:
    """The file's tokenizer; or `other`, a folder or hub id, whose vocabulary must be the file's.

    Raises: TokenizerError.
    """
    tokenizer = load_tokenizer(other) if other is not None else _of_file(header)
    tokens = header.fields.get("tokenizer.ggml.tokens") or []
    strange = [token for token, number in tokenizer.get_vocab().items() if not _is(tokens, number, token)]
    if strange or not tokens:
        raise TokenizerError(
            "the tokenizer has not the vocabulary of the GGUF file", where=other or str(header.file),
            got=f"{strange[0]!r} and {len(strange) - 1} more tokens that the file has not" if tokens else "no tokens in the file",
            expected=f"the {counted(len(tokens), 'token')} of {header.file.name}",
            do="give the model's own tokenizer files with --tokenizer DIR",
        )  # fmt: skip
    return tokenizer


def _of_file(header: Header) -> PreTrainedTokenizerBase:
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in header.fields.items()}
    kind, cut = fields.get("model"), fields.get("pre")
    byte_level, pieces = kind == "gpt2" and cut in _BYTE_LEVEL_CUTS, kind == "llama" and fields.get("add_space_prefix", True) is True
    if not byte_level and not pieces:
        about = "" if kind == "llama" else f", tokenizer.ggml.pre = {cut!r}"
        about += ", without a space before the text" if kind == "llama" else ""
        raise _unknown(header, f"tokenizer.ggml.model = {kind!r}{about}")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(header.file.parent), gguf_file=header.file.name, trust_remote_code=False)
        if pieces:
            # Before every text, as sentencepiece and llama.cpp do it; the reader leaves it out where a space is there already.
            tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
            tokenizer.backend_tokenizer.pre_tokenizer = None
        elif cut == "smollm":
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    except BROKEN as problem:
        raise unreadable(header.file, problem) from None
    except Exception as problem:
        # The tokenizers library raises the bare Exception class for merges of tokens that are not there; anything else goes up.
        if type(problem) is not Exception:
            raise
        raise unreadable(header.file, problem) from None
    if begins != bool(fields.get("add_bos_token", pieces)) or fields.get("add_eos_token"):
        raise _unknown(header, f"a text that begins {'with' if begins else 'without'} a token of its own, or ends with one")
    return tokenizer


def _unknown(header: Header, got: str) -> TokenizerError:
    return TokenizerError(
        "the tokenizer of the GGUF file is not known well enough to be made anew", where=str(header.file), got=got,
        expected=f"llama, or gpt2 with pre = {', '.join(_BYTE_LEVEL_CUTS)}", do="give the model's own tokenizer files with --tokenizer DIR",
    )  # fmt: skip


def _is(tokens: Any, number: int, token: str) -> bool:
    return number < len(tokens) and tokens[number] == token
