"""Reads the tokenizer in a GGUF file's metadata as a ``PreTrainedTokenizerFast``.

transformers 5 reads these too, but it ignores ``add_bos_token`` and the file's word splitting, so its tokens differ.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.folder import shorten
from fedmezo_jax.llama.tokenizers.sentencepiece import NORMAL, add_special, begins_with, byte_pairs


class _Words(NamedTuple):
    """How a text is split into words before byte-pair merges.

    Attributes:
        split: a regular expression whose matches are words, published with the tokenizer; None for GPT-2's.
        single_digits: whether digits are cut apart first.
        composed: whether characters are composed first (Unicode's NFC).
        whole: whether a word that is a token is used without merging.
        begins: whether a text starts with a begin token unless the file says otherwise.
    """

    split: str | None = None
    single_digits: bool = False
    composed: bool = False
    whole: bool = False
    begins: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGNS_AND_BLANKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS_AND_BLANKS}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SIGNS_AND_BLANKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By GGUF's name; ``whole`` and ``begins`` as in llama.cpp.
_WORDS = {
    "gpt-2": _Words(),
    "smollm": _Words(single_digits=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _Words(_LLAMA3, whole=True, begins=True)),
    "smaug-bpe": _Words(_LLAMA3),  # SmolLM3's
    "qwen2": _Words(_QWEN2, composed=True),  # Qwen2's to Qwen3's
    "tekken": _Words(_TEKKEN, whole=True, begins=True),  # Mistral's from NeMo on
}


def read_gguf_tokenizer(file: Path, meta: Mapping[str, Any]) -> Any:
    """Returns the tokenizer of a GGUF file: sentencepiece's BPE (``llama``) or a byte-level BPE (``gpt2``).

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
            tokenizer = _byte_level(tokens, settings["merges"], _WORDS[words])
            add_special(tokenizer, tokens, kinds)
            adds_begin = settings.get("add_bos_token", _WORDS[words].begins)
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
        model_max_length=meta.get(f"{meta.get('general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )


def _byte_level(tokens: Sequence[str], merges: Sequence[str], words: _Words) -> Tokenizer:
    """GPT-2's byte-pair encoding: bytes as printable characters, merged within words by rank."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=words.whole))
    if words.composed:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if words.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if words.split is not None:
        steps.append(pre_tokenizers.Split(Regex(words.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.split is None))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
