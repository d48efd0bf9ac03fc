"""A model folder's tokenizer is its ``tokenizer.json``, word for word."""

import subprocess
import sys

import pytest
from gguf_files import TOKENS, small_weights, write_gguf

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.gguf_folder import convert_gguf
from fedmezo_jax.llama.registry import load_tokenizer


@pytest.fixture
def tokenizer_folder(tmp_path):
    convert_gguf(write_gguf(tmp_path / "model.gguf", small_weights()), tmp_path / "out")
    return tmp_path / "out"


def test_a_tokenizer_is_its_file_whatever_class_is_named_beside_it(tokenizer_folder, capfd):
    before = load_tokenizer(tokenizer_folder)("yell 20").input_ids
    config = tokenizer_folder / "tokenizer_config.json"
    written = config.read_text()
    for name in ("LlamaTokenizer", "GPT2Tokenizer"):
        config.write_text(written.replace("PreTrainedTokenizerFast", name))
        assert load_tokenizer(tokenizer_folder)("yell 20").input_ids == before
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_needs_no_torch_and_says_nothing(tokenizer_folder):
    program = (
        "import sys; sys.modules['torch'] = None; from fedmezo_jax.llama.registry import load_tokenizer; "
        "print(load_tokenizer(sys.argv[1])('20').input_ids)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tokenizer_folder)], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout == f"{[TOKENS.index('2'), TOKENS.index('0')]}\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        ("{", "is not valid JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "is no tokenizer"),
        ('{"version": "1.0", "model": {"type": "Zoo"}}', "is no tokenizer"),
    ],
)
def test_a_broken_tokenizer_is_one_clear_error(tmp_path, content, reason):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=rf"tokenizer.json: {reason}"):
        load_tokenizer(tmp_path)
