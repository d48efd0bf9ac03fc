"""sentencepiece's byte-pair tokenizers as fast ones: from ``tokenizer.model``, or from the like parts of a GGUF.

transformers 5 reads a ``tokenizer.model`` too, but it puts no ``<s>`` before a text and gives a special token without a
piece a new id beyond the embedding.
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
    """The tokenizer of a LLaMA folder that has ``tokenizer.model`` alone, as open_llama's.

    Args:
        file: sentencepiece's own format.
        settings: ``tokenizer_config.json``: ``add_bos_token``, ``chat_template`` and the special tokens' names are
            honoured.

    Returns:
        A ``PreTrainedTokenizerFast``.

    Raises:
        UserError: the file is damaged, is no byte-pair model, or cuts a probing text otherwise than its copy does.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from transformers import PreTrainedTokenizerFast

    with opened(file) as stream:
        data = stream.read()
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(data)  # pyright: ignore[reportAttributeAccessIssue]
        own = SentencePieceProcessor(model_proto=data)
    except Exception as error:  # protobuf's and sentencepiece's
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
            unknown=pieces[own.unk_id()],
            prefix=rules.add_dummy_prefix,
            first=([normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else [])
            + (
                [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
                if rules.remove_extra_whitespaces
                else []
            ),
        )
        same = tokenizer.encode(_PROBE, add_special_tokens=False).ids == own.encode(_PROBE)
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = shorten(" ".join(str(error).split()))
        raise UserError(f"{file}: its parts do not fit together ({reason}); fetch it again") from None
    if not same:
        raise UserError(f"{file}: it normalises texts in a way that is not supported; {_REMEDY}")
    named = {"unk_token": pieces[own.unk_id()]}
    for role, index in {"bos": own.bos_id(), "eos": own.eos_id(), "pad": own.pad_id()}.items():
        given = settings.get(f"{role}_token") or (pieces[index] if index >= 0 else None)
        given = given.get("content") if isinstance(given, Mapping) else given
        if given is not None and not isinstance(given, str):
            raise UserError(f"{file.with_name('tokenizer_config.json')}: {role}_token must be a text; fetch it again")
        if given:
            named[f"{role}_token"] = given
    known = tokenizer.get_vocab()
    if unknown := [name for name in named.values() if name not in known]:
        raise UserError(f"{file}: has no piece {shorten(', '.join(unknown))}, which tokenizer_config.json names")
    if settings.get("add_bos_token", True) and "bos_token" in named:
        index = tokenizer.token_to_id(named["bos_token"])
        tokenizer.post_processor = begins_with(named["bos_token"], index)  # pyright: ignore[reportArgumentType]
    template = settings.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{file.with_name('tokenizer_config.json')}: chat_template must be a text; fetch it again")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **named,
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
    """sentencepiece's byte-pair encoding: the neighbours whose joint piece scores highest merge first.

    Spaces are ▁, one leads the text (``prefix``), and what no piece covers falls back to bytes. ``first`` is what is
    done to a text before.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        if token in normal:
            cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
            known = [(left, right) for left, right in cuts if left in normal and right in normal]
            merges += [(-score, vocab[left], vocab[right], left, right) for left, right in known]
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
    """Makes control, unknown and user-defined pieces tokens of their own, found in a text before anything else is."""
    for wanted, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
        added = [token for token, found in zip(tokens, kinds, strict=True) if found == wanted]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])


def begins_with(token: str, index: int) -> processors.PostProcessor:
    """Puts one token before every text."""
    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, index)]
    )
