"""A LLaMA-2-like tokenizer as transformers 5 saves it, small enough to spell its ids by hand."""

from transformers import LlamaTokenizer

SPECIAL = ("<unk>", "<s>", "</s>")
LETTERS = "▁" + "".join(map(chr, range(33, 127)))
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS])}


def save(folder, **settings):
    """Writes ``tokenizer.json``: Metaspace with ``prepend_scheme`` first, and one token for each character."""
    LlamaTokenizer(vocab=VOCABULARY, merges=[], add_bos_token=True, **settings).save_pretrained(folder)


def spelled(text):
    """Ids of a text without a space before it and without special tokens."""
    tokens = (f"<0x{ord(letter):02X}>" if letter == "\n" else letter for letter in text.replace(" ", "▁"))
    return [VOCABULARY[token] for token in tokens]
