"""The tokenizer in a GGUF file's metadata, as a ``PreTrainedTokenizerFast``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fedmezo_jax.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # GGUF's token types
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


# How a text is cut into words before byte-pair merges, by GGUF's name for it. LLaMA 3 also takes a word that is a token
# of its own without merging, and begins a text with a token, whether or not the file says so (as in llama.cpp).
_WORDS = {
    "gpt-2": _gpt2_words,
    "smollm": _smollm_words,
    "llama-bpe": _llama3_words,
    "llama3": _llama3_words,
    "llama-v3": _llama3_words,
}


def read_gguf_tokenizer(file: Path, meta: Mapping[str, Any]) -> Any:
    """The tokenizer of a LLaMA's GGUF: sentencepiece's byte-pair merges (``llama``) or a byte-level BPE (``gpt2``).

    Raises ``UserError`` naming the kind where it is another, and where the metadata lack a part.
    """
    from transformers import PreTrainedTokenizerFast  # takes seconds to import, and most runs never need it here

    own = {name.removeprefix("tokenizer.ggml."): value for name, value in meta.items() if name.startswith("tokenizer.")}
    kind, words = own.get("model"), own.get("pre")
    if own.get("add_eos_token"):
        raise UserError(f"{file}: its tokenizer ends every text with a token, which is not supported")
    try:
        tokens = own["tokens"]
        kinds = own.get("token_type", [_NORMAL] * len(tokens))
        if kind == "llama":
            unknown = tokens[own.get("unknown_token_id", 0)]
            prefix = own.get("add_space_prefix", True)
            tokenizer = _sentencepiece(tokens, own["scores"], kinds, unknown, prefix)
            starts = own.get("add_bos_token", True)
        elif kind == "gpt2" and words in _WORDS:
            llama3 = _WORDS[words] is _llama3_words
            tokenizer = _byte_level(tokens, own["merges"], words, whole_words=llama3)
            starts = own.get("add_bos_token", llama3)
        else:
            raise UserError(
                f"{file}: its tokenizer ({kind}, {words}) is not supported, only llama and gpt2 with "
                f"{', '.join(_WORDS)}; give the model's Hugging Face folder instead"
            )
        named = {
            f"{role}_token": tokens[own[f"{key}_token_id"]]
            for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
            if f"{key}_token_id" in own
        }
        for wanted, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)):
            added = [token for token, found in zip(tokens, kinds, strict=True) if found == wanted]
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
        if starts:
            tokenizer.post_processor = _begins_with(named["bos_token"], own["bos_token_id"])
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{file}: its tokenizer's metadata lack {error}; fetch it again") from None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=own.get("tokenizer.chat_template"),
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )


def _byte_level(tokens: Sequence[str], merges: Sequence[str], words: str, whole_words: bool) -> Tokenizer:
    """GPT-2's byte-pair encoding: bytes as printable characters, merged within words by rank."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = _WORDS[words]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], unknown: str, prefix: bool
) -> Tokenizer:
    """sentencepiece's byte-pair encoding: the neighbours whose joint piece scores highest merge first.

    Spaces are ▁, one leads the text (``prefix``), and what no piece covers falls back to bytes.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == _NORMAL}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        if token in normal:
            cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
            known = [(first, second) for first, second in cuts if first in normal and second in normal]
            merges += [(-score, vocab[first], vocab[second], first, second) for first, second in known]
    merges.sort(key=lambda merge: merge[0])
    bpe = models.BPE(
        vocab=vocab,
        merges=[merge[3:] for merge in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    lead = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*lead, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return tokenizer


def _begins_with(token: str, index: int) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, index)]
    )
