"""Reads the tokenizer in a GGUF file's metadata as a ``PreTrainedTokenizerFast``.

transformers 5 reads these too, but it ignores ``add_bos_token`` and the file's word splitting, so its tokens differ.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.folder import shorten
from fedmezo_jax.llama.tokenizers.sentencepiece import NORMAL, add_special, begins_with, byte_pairs

_LLAMA3_WORDS = (  # LLaMA 3's own expression, published with its tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _llama3_words() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()])


# How a text is split into words before byte-pair merges, by GGUF's name. LLaMA 3 also uses a word that is a token
# without merging, and puts a begin token before a text unless the file says otherwise (as in llama.cpp).
_WORDS = {
    "gpt-2": _gpt2_words,
    "smollm": _smollm_words,
    "llama-bpe": _llama3_words,
    "llama3": _llama3_words,
    "llama-v3": _llama3_words,
}


def read_gguf_tokenizer(file: Path, meta: Mapping[str, Any]) -> Any:
    """Returns the tokenizer of a LLaMA's GGUF file: sentencepiece's BPE (``llama``) or a byte-level BPE (``gpt2``).

    Args:
        file: the file, for error messages.
        meta: its metadata.

    Raises:
        UserError: the tokenizer is of another kind, or the metadata are incomplete.
    """
    from transformers import PreTrainedTokenizerFast  # takes seconds to import, and most runs never need it here

    settings = {
        name.removeprefix("tokenizer.ggml."): value for name, value in meta.items() if name.startswith("tokenizer.")
    }
    kind, words = settings.get("model"), settings.get("pre")
    if settings.get("add_eos_token"):
        raise UserError(f"{file}: its tokenizer ends every text with a token, which is not supported")
    try:
        tokens = settings["tokens"]
        kinds = settings.get("token_type", [NORMAL] * len(tokens))
        if kind == "llama":
            unknown = tokens[settings.get("unknown_token_id", 0)]
            prefix = settings.get("add_space_prefix", True)
            tokenizer = byte_pairs(tokens, settings["scores"], kinds, unknown=unknown, prefix=prefix)
            adds_begin = settings.get("add_bos_token", True)
        elif kind == "gpt2" and words in _WORDS:
            llama3 = _WORDS[words] is _llama3_words
            tokenizer = _byte_level(tokens, settings["merges"], words, whole_words=llama3)
            add_special(tokenizer, tokens, kinds)
            adds_begin = settings.get("add_bos_token", llama3)
        else:
            raise UserError(
                f"{file}: its tokenizer ({kind}, {words}) is not supported, only llama and gpt2 with "
                f"{', '.join(_WORDS)}; give the model's Hugging Face folder instead"
            )
        special_tokens = {
            f"{role}_token": tokens[settings[f"{key}_token_id"]]
            for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
            if f"{key}_token_id" in settings
        }
        if adds_begin:
            tokenizer.post_processor = begins_with(special_tokens["bos_token"], settings["bos_token_id"])
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{file}: its tokenizer's metadata lack {error}; fetch it again") from None
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = shorten(" ".join(str(error).split()))
        raise UserError(f"{file}: its tokenizer's metadata do not fit together ({reason}); fetch it again") from None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=settings.get("tokenizer.chat_template"),
        model_max_length=meta.get("llama.context_length"),
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )


def _byte_level(tokens: Sequence[str], merges: Sequence[str], words: str, whole_words: bool) -> Tokenizer:
    """GPT-2's byte-pair encoding: bytes as printable characters, merged within words by rank."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = _WORDS[words]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
