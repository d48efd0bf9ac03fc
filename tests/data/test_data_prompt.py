import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_data import make_tokenizer

from fedmezo_jax.data.encode import encode
from fedmezo_jax.data.examples import Example
from fedmezo_jax.data.prompts import prompt
from fedmezo_jax.data.synthetic.bundled import bundled
from fedmezo_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(pad_token="<pad>")


def test_the_template_is_stanford_alpacas():
    assert prompt(Example("Sort.", "b, a", "a, b", "x")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Input:\nb, a\n\n### Response:"
    )
    assert prompt(Example("Sort {x}.", "", "a, b", "x")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort {x}.\n\n### Response:"
    )


def check(encoded, examples, tokenizer, start=""):
    rows = encoded.rows
    assert [leaf.dtype for leaf in rows] == [np.int32, np.int32, np.int32, np.float32]
    assert {len(leaf) for leaf in rows} == {len(encoded.kept)}
    for row, i in enumerate(encoded.kept):
        example, count = examples[i], int(rows.label_weights[row].sum())
        assert count >= 1
        assert rows.label_weights[row].tolist() == [1] * count + [0] * (rows.labels.shape[1] - count)
        labels, positions = rows.labels[row, :count], rows.label_positions[row, :count]
        assert tokenizer.decode(labels) == example.response + "</s>"
        assert (rows.tokens[row, positions + 1] == labels).all()  # each label comes right after its position
        assert (np.diff(positions) == 1).all()
        assert tokenizer.decode(rows.tokens[row, : positions[0] + 1]) == start + prompt(example)
        assert (rows.tokens[row, positions[-1] + 2 :] == tokenizer.convert_tokens_to_ids("<pad>")).all()
        assert (rows.label_positions[row, count:] == 0).all()
        assert (rows.labels[row, count:] == 0).all()


def test_labels_are_the_response_and_the_end_token(tokenizer):
    examples = bundled(1, 100)
    encoded = encode(examples, tokenizer, 500)
    assert encoded.skipped == 0
    assert encoded.kept.tolist() == list(range(100))
    check(encoded, examples, tokenizer)


ANY = make_tokenizer(pad_token="<pad>", clean_up_tokenization_spaces=False)
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=40)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.builds(Example, texts, texts, texts, texts), min_size=1, max_size=5))
def test_any_text_comes_back_from_its_tokens(examples):
    # Text that byte pairs could merge across the boundary, braces, and empty responses are all in here.
    check(encode(examples, ANY, 2000), examples, ANY)


def test_a_begin_token_leads_where_the_tokenizer_adds_one():
    tokenizer = make_tokenizer(begin=True, pad_token="<pad>")
    examples = bundled(1, 20)
    encoded = encode(examples, tokenizer, 500)
    assert (encoded.rows.tokens[:, 0] == 1).all()
    assert (encoded.rows.tokens == 1).sum() == 20  # once a row, not again before the response
    check(encoded, examples, tokenizer, start="<s>")


def test_the_end_token_pads_where_there_is_no_pad_token():
    tokenizer = make_tokenizer()
    rows = encode(bundled(1, 20), tokenizer, 500).rows
    ends = rows.label_positions.max(axis=1) + 1
    assert all((tokens[end:] == 2).all() for tokens, end in zip(rows.tokens, ends, strict=True))
    assert rows.label_weights.sum() == (rows.labels != 0).sum()  # the padding bears no weight


def test_shapes_are_the_longest_row_and_labels_rounded_up_to_eight(tokenizer):
    rows = encode(bundled(1, 50), tokenizer, 1000).rows
    longest = int((rows.tokens != 0).sum(axis=1).max())
    assert rows.tokens.shape[1] == -(-longest // 8) * 8
    assert rows.labels.shape[1] == -(-int(rows.label_weights.sum(axis=1).max()) // 8) * 8
    limited = encode(bundled(1, 50), tokenizer, longest).rows
    assert limited.tokens.shape[1] == longest


def test_rows_that_are_too_long_are_dropped_whole(tokenizer):
    short, long = Example("Hi.", "", "Ho.", ""), Example("Hi.", "", "Ho. " * 200, "")
    examples = [long, short, long, short, short]
    encoded = encode(examples, tokenizer, 150)
    assert encoded.skipped == 2
    assert encoded.kept.tolist() == [1, 3, 4]
    check(encoded, examples, tokenizer)
    assert encoded.rows.labels.shape[1] <= 16  # the dropped responses widen nothing
    exact = int((encoded.rows.tokens[0] != 0).sum())
    assert encode(examples, tokenizer, exact).skipped == 2
    with pytest.raises(UserError, match=rf"no row fits into {exact - 1} tokens \(the shortest has {exact}\)"):
        encode(examples, tokenizer, exact - 1)


def test_nothing_to_encode_and_no_end_token_are_clear_errors(tokenizer):
    with pytest.raises(UserError, match="there are no rows"):
        encode([], tokenizer, 100)
    with pytest.raises(UserError, match="eos_token"):
        encode(bundled(0, 3), make_tokenizer(eos_token=None), 100)


def test_nothing_is_said_about_rows_longer_than_the_models_context(capfd, caplog):
    tokenizer = make_tokenizer(model_max_length=16)
    logger = logging.getLogger("transformers")  # does not propagate to where caplog listens by itself
    logger.addHandler(caplog.handler)
    try:
        encode(bundled(0, 50), tokenizer, 200)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")
