"""Tokenizers out of GGUF metadata: sentencepiece's merges against its algorithm, LLaMA 3's words by hand."""

import unicodedata
from itertools import pairwise

import pytest
from gguf_files import SPECIAL, byte_alphabet
from weight_files import shapes_of, weights_of, write_gguf_model

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.gguf_folder import convert_gguf
from fedmezo_jax.llama.registry import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
WORDS = "▁the ▁cat ▁sat on ▁a mat he at th ca sa ma ▁t ▁c ▁s ▁m ▁th ▁ca ▁sa ▁ma an ana nan ▁▁ aa".split()  # noqa: SIM905
LETTERS = list("▁thecasonmibyxyz.,12")
PIECES = [
    *(("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)),
    *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
    *((word, -float(rank), NORMAL) for rank, word in enumerate(WORDS)),
    *((letter, -1000.0 - rank, NORMAL) for rank, letter in enumerate(dict.fromkeys(LETTERS))),
    ("<|user|>", 0.0, USER),
]
TOKENS = [piece for piece, _, _ in PIECES]


def sentencepiece(text):
    """Its algorithm: while any neighbours join to a piece, join those of the highest score, the leftmost first."""
    scores = {piece: score for piece, score, kind in PIECES if kind == NORMAL}
    symbols = list(text.replace(" ", "▁"))
    while True:
        joined = [(scores.get(a + b), -i) for i, (a, b) in enumerate(pairwise(symbols))]
        best = max((pair for pair in joined if pair[0] is not None), default=None)
        if best is None:
            break
        i = -best[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    found = []
    for symbol in symbols:
        known = [symbol] if symbol in scores else [f"<0x{byte:02X}>" for byte in symbol.encode()]
        found += [TOKENS.index(piece) for piece in known]
    return found


def write_model(tmp_path, tokens, kinds, **settings):
    def metadata(writer):
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        for name, value in settings.items():
            getattr(writer, f"add_{name}")(value)

    raw = shapes_of(2, True, False, False) | {"vocab_size": len(tokens)}
    write_gguf_model(tmp_path / "model.gguf", raw, weights_of(raw), metadata=metadata)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    return load_tokenizer(tmp_path / "out")


def write_sentencepiece(tmp_path, **settings):
    kinds, scores = [kind for *_, kind in PIECES], [score for _, score, _ in PIECES]
    given = {"tokenizer_model": "llama", "token_scores": scores, "unk_token_id": 0} | settings
    return write_model(tmp_path, TOKENS, kinds, **given)


TEXTS = [
    "the cat sat on a mat",
    "banana nanana ananas",
    "aaa aaaa aaaaa",
    "  two  spaces ",
    "the ÿé 猫 cat\n\tthe",
    "xyz.,12",
    "x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_sentencepiece_s(tmp_path, text):
    tokenizer = write_sentencepiece(tmp_path)
    found = tokenizer(text).input_ids
    assert found == [1, *sentencepiece(" " + text)]
    assert tokenizer.decode(found, skip_special_tokens=True) == text
    assert tokenizer("").input_ids == [1]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_the_settings_of_a_sentencepiece_tokenizer_are_honoured(tmp_path):
    tokenizer = write_sentencepiece(tmp_path, add_bos_token=False, add_space_prefix=False)
    assert tokenizer("the cat").input_ids == sentencepiece("the cat")
    assert tokenizer.decode(tokenizer(" cat").input_ids) == " cat"


def test_special_pieces_stand_for_themselves(tmp_path):
    tokenizer = write_sentencepiece(tmp_path)
    found = tokenizer("<s>the</s><|user|>cat").input_ids
    user = TOKENS.index("<|user|>")
    assert found == [1, 1, *sentencepiece(" the"), 2, user, *sentencepiece(" cat")]
    assert "<|user|>" in tokenizer.decode(found, skip_special_tokens=True)


def test_the_tokens_are_those_of_transformers_llama_tokenizer(tmp_path):
    """Built by transformers' own class from the same vocabulary and merges in the order of sentencepiece's scores."""
    from transformers import LlamaTokenizer

    ranked = [(word[:i], word[i:]) for word in WORDS for i in range(1, len(word))]
    normal = {piece for piece, _, kind in PIECES if kind == NORMAL}
    merges = [pair for pair in ranked if set(pair) <= normal]
    theirs = LlamaTokenizer(vocab={token: i for i, token in enumerate(TOKENS)}, merges=merges)
    ours = write_sentencepiece(tmp_path)
    for text in TEXTS[:3] + TEXTS[4:]:
        assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids


# Byte-level

BYTES = byte_alphabet()
MERGES = ["Ġ t", "Ġt h", "1 2", "12 3", "123 4", "l l", "e ll", "' s", "Ġ Ġ", "o k"]
BPE = [*SPECIAL, *BYTES, *(merge.replace(" ", "") for merge in MERGES), "Ġwhole", "whole"]


def write_byte_level(tmp_path, split, **settings):
    kinds = [CONTROL] * len(SPECIAL) + [NORMAL] * (len(BPE) - len(SPECIAL))
    given = {"tokenizer_model": "gpt2", "tokenizer_pre": split, "token_merges": MERGES} | settings
    return write_model(tmp_path, BPE, kinds, **given)


def pieces(tokenizer, text):
    return [BPE[i] for i in tokenizer(text).input_ids]


def test_llama_3_cuts_numbers_in_threes_and_takes_whole_words(tmp_path):
    for split in ("llama-bpe", "llama3", "llama-v3"):
        (tmp_path / split).mkdir()
        tokenizer = write_byte_level(tmp_path / split, split)
        assert pieces(tokenizer, "tell 1234'S  ok") == [
            *["<s>", "t", "ell", "Ġ", "123", "4", "'", "S", "Ġ", "Ġ", "ok"],
        ]
        assert pieces(tokenizer, "the whole") == ["<s>", "t", "h", "e", "Ġwhole"]
        assert pieces(tokenizer, "a\n\n b!\n") == ["<s>", "a", "Ċ", "Ċ", "Ġ", "b", "!", "Ċ"]
        assert (
            tokenizer.decode(tokenizer("the whole ÿ猫 12345").input_ids, skip_special_tokens=True)
            == "the whole ÿ猫 12345"
        )


def test_smollm3_cuts_numbers_in_threes_and_merges_whole_words_too(tmp_path):
    tokenizer = write_byte_level(tmp_path, "smaug-bpe")
    assert pieces(tokenizer, "tell 1234'S ok") == ["t", "ell", "Ġ", "123", "4", "'", "S", "Ġ", "ok"]
    assert pieces(tokenizer, "a whole") == ["a", *"Ġwhole"]


def test_qwen_s_tokens_are_those_of_transformers_qwen_tokenizer(tmp_path):
    """Built by transformers' own class from the same vocabulary and merges."""
    from transformers import Qwen2Tokenizer

    theirs = Qwen2Tokenizer({token: i for i, token in enumerate(BPE)}, [tuple(m.split(" ")) for m in MERGES])
    ours = write_byte_level(tmp_path, "qwen2")
    for text in ("tell 1234'S  ok", "the  whole", "e\u0301t\u00e9 12!\n\n b\n", "ÿ猫 the\r\n'll", " \t x"):
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == unicodedata.normalize("NFC", text)


def test_mistral_s_byte_level_words_end_where_capitals_begin(tmp_path):
    tokenizer = write_byte_level(tmp_path, "tekken")
    assert pieces(tokenizer, "tell1234'S") == ["<s>", "t", "ell", "1", "2", "3", "4", "'", "S"]
    assert pieces(tokenizer, "a whole") == ["<s>", "a", "Ġwhole"]
    words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("anHTMLPage /\n/x l'Été")]
    assert words == ["an", "HTMLPage", "Ġ/Ċ/", "x", "Ġl", "'ÃītÃ©"]


def test_gpt_2_cuts_numbers_whole_and_adds_no_begin_token(tmp_path):
    tokenizer = write_byte_level(tmp_path, "gpt-2")
    assert pieces(tokenizer, "tell 1234's whole") == ["t", "ell", "Ġ", "1234", "'s", *"Ġwhole"]


@pytest.mark.parametrize(("split", "begins"), [("smollm", True), ("llama-bpe", False)])
def test_a_begin_token_is_added_where_the_file_says_so(tmp_path, split, begins):
    tokenizer = write_byte_level(tmp_path, split, add_bos_token=begins)
    assert pieces(tokenizer, "ok") == ["<s>", "ok"][not begins :]
    assert (
        pieces(tokenizer, "1234")
        == ["<s>", *(["1", "2", "3", "4"] if split == "smollm" else ["123", "4"])][not begins :]
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"add_eos_token": True}, "ends every text with a token"),
        (
            {"tokenizer_pre": "deepseek-coder"},
            r"\(gpt2, deepseek-coder\) is not supported, only llama and gpt2 with gpt-2",
        ),
        ({"tokenizer_model": "t5"}, r"\(t5, llama-bpe\) is not supported"),
        ({"tokenizer_model": "llama"}, "metadata lack 'scores'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, settings, named):
    with pytest.raises(UserError, match=named):
        write_byte_level(tmp_path, "llama-bpe", **settings)
    assert not (tmp_path / "out").exists()
