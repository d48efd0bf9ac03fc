"""A ``tokenizer.model`` cuts texts as sentencepiece itself does."""

import io
import json

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.registry import load_tokenizer

SENTENCES = [
    "the cat sat on the mat and the dog sat on the log",
    "def add(x, y):\n    return x + y  # 12 and 345",
    "naïve café, 北京 and Zürich: how are you today?",
    "hello world! numbers 1 2 3 4 5 6 7 8 9 0 are here",
]
TEXTS = [
    *SENTENCES,
    "",
    "a",
    " one space before",
    "  two  spaces   three ",
    "tabs\tand\n\nlines",
    "ﬁ ① ² K",
    "猫 is unseen, 🙂 too",
    "2024-11-23 3.14159",
]


def train(folder, **settings):
    """A folder with a small tokenizer of sentencepiece's own making, and that tokenizer."""
    file = io.BytesIO()
    given = {"model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "minloglevel": 2, "hard_vocab_limit": False}
    SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES * 20), model_writer=file, **given | settings)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    return SentencePieceProcessor(model_proto=file.getvalue())


LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
STYLES = {
    "as LLaMA's": LLAMA,
    "normalised, spaces joined": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no space before": LLAMA | {"add_dummy_prefix": False},
}


@pytest.mark.parametrize("style", STYLES)
def test_every_text_is_cut_as_sentencepiece_cuts_it(tmp_path, style):
    theirs = train(tmp_path, **STYLES[style])
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours(text).input_ids == [1, *theirs.encode(text)], text
        assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == theirs.decode(theirs.encode(text))


def test_the_settings_beside_it_are_honoured(tmp_path):
    theirs = train(tmp_path, **LLAMA)
    settings = {"add_bos_token": False, "eos_token": {"content": "</s>"}, "pad_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer(tmp_path)
    assert ours("the cat").input_ids == theirs.encode("the cat")
    assert (ours.bos_token, ours.eos_token, ours.pad_token, ours.unk_token) == ("<s>", "</s>", "<unk>", "<unk>")
    assert ours("the</s>cat").input_ids.count(2) == 1


@pytest.mark.parametrize(
    ("settings", "reason"), [({"model_type": "unigram"}, "byte-pair"), ({"byte_fallback": False}, "byte-pair")]
)
def test_other_kinds_are_refused_with_the_remedy(tmp_path, settings, reason):
    train(tmp_path, **LLAMA | settings)
    with pytest.raises(UserError, match=rf"tokenizer.model: .*{reason}.*tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_damaged_file_is_one_clear_error(tmp_path):
    train(tmp_path, **LLAMA)
    (tmp_path / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes()[:-7])
    with pytest.raises(UserError, match=r"tokenizer.model: is no sentencepiece model"):
        load_tokenizer(tmp_path)


def test_a_text_that_would_be_cut_otherwise_is_refused(tmp_path):
    train(tmp_path, **LLAMA, user_defined_symbols=["12"])  # after which a fast tokenizer would put another space
    with pytest.raises(UserError, match="normalises texts in a way"):
        load_tokenizer(tmp_path)


def test_a_special_token_that_is_no_piece_is_named(tmp_path):
    train(tmp_path, **LLAMA)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    with pytest.raises(UserError, match=r"no piece <pad>, which tokenizer_config.json names"):
        load_tokenizer(tmp_path)
