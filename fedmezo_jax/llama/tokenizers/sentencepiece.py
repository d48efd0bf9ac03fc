"""Converts sentencepiece's byte-pair tokenizers (``tokenizer.model``, or the same parts of a GGUF file) to fast ones.

transformers 5 reads a ``tokenizer.model`` too, but it puts no ``<s>`` before a text, and gives a special token without
a piece a new id beyond the embedding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.folder import opened, shorten

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of pieces; GGUF has the same numbers
_BYTE_PAIR = 2
_PROBE = "  The  ﬁrst ①², naïve 猫 was\n\t1234.50 € (x+y)! "


def read_tokenizer_model(file: Path, settings: Mapping[str, Any]) -> Any:
    """Reads the tokenizer of a LLaMA folder that has only ``tokenizer.model``, such as open_llama's.

    Args:
        file: a file in sentencepiece's format.
        settings: the contents of ``tokenizer_config.json``, of which ``add_bos_token``, ``chat_template`` and the names
            of special tokens are used.

    Returns:
        A ``PreTrainedTokenizerFast``.

    Raises:
        UserError: the file is damaged or not a byte-pair model, or the converted tokenizer splits a test text
            differently.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from transformers import PreTrainedTokenizerFast

    with opened(file) as stream:
        data = stream.read()
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(data)  # pyright: ignore[reportAttributeAccessIssue]
        processor = SentencePieceProcessor(model_proto=data)
    except Exception as error:  # protobuf and sentencepiece raise different types
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: is no sentencepiece model that can be read ({reason}); fetch it again") from None
    if model.trainer_spec.model_type != _BYTE_PAIR or not model.trainer_spec.byte_fallback:
        raise UserError(f"{file}: only byte-pair models that fall back to bytes are supported; {_REMEDY}")
    if settings.get("add_eos_token"):
        raise UserError(f"{file}: a tokenizer that ends every text with a token is not supported")
    pieces = [piece.piece for piece in model.pieces]
    rules = model.normalizer_spec
    try:
        tokenizer = byte_pairs(
            pieces,
            [piece.score for piece in model.pieces],
            [piece.type for piece in model.pieces],
            unknown=pieces[processor.unk_id()],
            prefix=rules.add_dummy_prefix,
            first=([normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else [])
            + (
                [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
                if rules.remove_extra_whitespaces
                else []
            ),
        )
        agrees = tokenizer.encode(_PROBE, add_special_tokens=False).ids == processor.encode(_PROBE)
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = shorten(" ".join(str(error).split()))
        raise UserError(f"{file}: its parts do not fit together ({reason}); fetch it again") from None
    if not agrees:
        raise UserError(f"{file}: it normalises texts in a way that is not supported; {_REMEDY}")
    special_tokens = {"unk_token": pieces[processor.unk_id()]}
    for role, index in {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}.items():
        token = settings.get(f"{role}_token") or (pieces[index] if index >= 0 else None)
        token = token.get("content") if isinstance(token, Mapping) else token
        if token is not None and not isinstance(token, str):
            raise UserError(f"{file.with_name('tokenizer_config.json')}: {role}_token must be a text; fetch it again")
        if token:
            special_tokens[f"{role}_token"] = token
    vocabulary = tokenizer.get_vocab()
    if unknown := [name for name in special_tokens.values() if name not in vocabulary]:
        raise UserError(f"{file}: has no piece {shorten(', '.join(unknown))}, which tokenizer_config.json names")
    if settings.get("add_bos_token", True) and "bos_token" in special_tokens:
        index = tokenizer.token_to_id(special_tokens["bos_token"])
        tokenizer.post_processor = begins_with(special_tokens["bos_token"], index)  # pyright: ignore[reportArgumentType]
    template = settings.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{file.with_name('tokenizer_config.json')}: chat_template must be a text; fetch it again")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )


_REMEDY = "open it with transformers, save_pretrained the tokenizer, and put its tokenizer.json into the folder"


def byte_pairs(
    tokens: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    unknown: str,
    prefix: bool,
    first: Sequence[normalizers.Normalizer] = (),
) -> Tokenizer:
    """Returns sentencepiece's byte-pair encoding: the neighbours whose joint piece has the highest score merge first.

    Spaces become ▁. Text that no piece covers falls back to bytes.

    Args:
        tokens: the pieces, [n]; a piece's index is its id.
        scores: score of each piece, [n].
        kinds: kind of each piece (``NORMAL``, ``CONTROL``, ...), [n].
        unknown: the piece for unknown text.
        prefix: whether a space is put before the text.
        first: normalizers that are applied to a text before these.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        if token in normal:
            cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
            mergeable = [(left, right) for left, right in cuts if left in normal and right in normal]
            merges += [(-score, vocab[left], vocab[right], left, right) for left, right in mergeable]
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
    tokenizer.normalizer = normalizers.Sequence([*first, *lead, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    add_special(tokenizer, tokens, kinds)
    return tokenizer


def add_special(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Adds control, unknown and user-defined pieces as tokens that are recognised in a text before all others."""
    for kind, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
        added = [token for token, token_kind in zip(tokens, kinds, strict=True) if token_kind == kind]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])


def begins_with(token: str, index: int) -> processors.PostProcessor:
    """Returns a post-processor that puts one token before every text."""
    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, index)]
    )
