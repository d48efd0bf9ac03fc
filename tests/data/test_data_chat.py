"""Chats and prompt styles: which text a tokenizer's template makes of them, and which tokens are learnt."""

import sys

import numpy as np
import pytest
from token_data import make_tokenizer

from fedmezo_jax.data.encode import encode
from fedmezo_jax.data.examples import Chat, Example, Message
from fedmezo_jax.data.prompts import prompt, prompt_ids, render, response
from fedmezo_jax.errors import UserError

# The shapes of template in the wild: ChatML's and LLaMA 3's headers, LLaMA 2's brackets without any header.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}"
    "{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TALK = Chat(
    (
        Message("user", "Sort b, a."),
        Message("assistant", "a, b"),
        Message("user", "Again: d c?"),
        Message("assistant", "c d\nDone."),
    ),
    "",
)


def with_template(template):
    tokenizer = make_tokenizer(pad_token="<pad>", extra_special_tokens={"end_of_turn": "<|im_end|>"})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        (CHATML, ["a, b<|im_end|>", "c d\nDone.<|im_end|>"]),
        (LLAMA3, ["a, b<|eot_id|>", "c d\nDone.<|eot_id|>"]),
        (LLAMA2, [" a, b </s>", " c d\nDone. </s>"]),
    ],
)
def test_a_row_has_the_templates_own_tokens_and_its_labels_are_the_assistants_turns(template, learnt):
    tokenizer = with_template(template)
    rows = encode([TALK], tokenizer, 500).rows
    messages = [message._asdict() for message in TALK.messages]
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)  # the tokenizer's own word
    count = int(rows.label_weights.sum())
    length = rows.label_positions.max() + 2
    assert rows.tokens[0, :length].tolist() == theirs[:length]
    assert tokenizer.decode(theirs[length:]).strip() == ""  # what follows the last label teaches nothing
    places = rows.label_positions[0, :count] + 1
    assert (rows.tokens[0, places] == rows.labels[0, :count]).all()
    turns = np.split(rows.labels[0, :count], np.flatnonzero(np.diff(places) > 1) + 1)
    assert [tokenizer.decode(turn) for turn in turns] == learnt


def test_system_and_tool_turns_and_the_header_are_not_learnt():
    tokenizer = with_template(CHATML)
    chat = Chat((Message("system", "Be brief."), *TALK.messages[:2], Message("tool", "5"), Message("user", "x")), "")
    rows = encode([chat], tokenizer, 500).rows
    assert tokenizer.decode(rows.labels[0, : int(rows.label_weights.sum())]) == "a, b<|im_end|>"


def test_an_opening_turn_of_the_assistant_is_not_learnt():
    tokenizer = with_template(CHATML)
    chat = Chat((Message("assistant", "Hello!"), *TALK.messages[:2]), "")
    only = Chat(chat.messages[:1], "")
    encoded = encode([only, chat], tokenizer, 500)
    assert tokenizer.decode(encoded.rows.labels[0, : int(encoded.rows.label_weights.sum())]) == "a, b<|im_end|>"
    assert (encoded.kept.tolist(), encoded.skipped) == ([1], 1)
    with pytest.raises(UserError, match="no row has anything to learn"):
        encode([only], tokenizer, 500)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    # As reasoning models do: only the last turn of the assistant keeps its mark.
    template = CHATML.replace("m['content']", "('<think>' if loop.last else '') + m['content']")
    with pytest.raises(
        UserError, match=r"^the data: chat 0 \(counted from 0\): .* writes message 1 otherwise once others follow"
    ):
        encode([TALK], with_template(template), 500)
    assert len(encode([Chat(TALK.messages[:2], "")], with_template(template.replace("<think>", "")), 500).kept) == 1


def test_a_template_that_refuses_a_chat_is_named_with_its_reason():
    tokenizer = with_template(LLAMA2)
    with pytest.raises(UserError, match=r"chat 1 \(counted from 0\): .*refuses the chat \(the user must begin\)"):
        encode([TALK, Chat((Message("assistant", "Hello."),), "")], tokenizer, 500)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999)|list %}{% for i in r %}{% for j in r %}{% if i == j %}x{% endif %}{% endfor %}"
        "{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ lipsum(10**9) }}",
    ],
)
def test_a_template_that_would_run_for_ages_is_refused(template):
    before = sys.gettrace()
    with pytest.raises(UserError, match=r"chat 0 .*chat template takes more than 1,000,000 steps"):
        encode([TALK], with_template(template), 500)
    assert sys.gettrace() is before


def test_a_long_template_and_a_long_chat_are_within_the_limit():
    """Compiling a template does not count, and a thousand messages are no trouble."""
    long = "".join(f"{{% if {i} == -1 %}}{{{{ bos_token + '{i}' }}}}{{% endif %}}" for i in range(2000))
    talk = Chat(tuple(Message("user", "Hi.") for _ in range(1000)), "")
    assert render(talk, with_template(long + CHATML)).text == "<|im_start|>user\nHi.<|im_end|>\n" * 1000


def test_a_tokenizer_without_a_template_names_the_remedy():
    tokenizer = make_tokenizer()
    for call in (
        lambda: encode([TALK], tokenizer, 500),
        lambda: encode([Example("a", "", "b", "")], tokenizer, 500, style="chat"),
        lambda: prompt_ids([Example("a", "", "b", "")], tokenizer, "chat"),
    ):
        with pytest.raises(
            UserError, match=r"^the tokenizer has no chat template.*chat_template\.jinja into its folder, or choose"
        ):
            call()


def test_a_template_that_writes_the_date_writes_the_same_one_every_day():
    # LLaMA 3.2's: the date is asked of the clock unless it is given.
    date = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y %H:%M:%S.%f') %}{% endif %}"
        "{{ date_string }}"
    )
    tokenizer = with_template(date + CHATML)
    assert render(TALK, tokenizer).text.startswith("26 Jul 2024<|im_start|>")


SORT, NAME = Example("Sort.", "b, a", "a, b", ""), Example("Name {x}.", "", "x", "")


@pytest.mark.parametrize(
    ("style", "example", "before", "after"),
    [
        ("plain", SORT, "Sort.\nb, a\n", "a, b"),
        ("plain", NAME, "Name {x}.\n", "x"),
        ("question-answer", SORT, "Question: Sort.\nb, a\nAnswer:", " a, b"),
        ("question-answer", NAME, "Question: Name {x}.\nAnswer:", " x"),
        ("chat", SORT, "<|im_start|>user\nSort.\n\nb, a<|im_end|>\n<|im_start|>assistant\n", "a, b"),
        ("chat", NAME, "<|im_start|>user\nName {x}.<|im_end|>\n<|im_start|>assistant\n", "x"),
    ],
)
def test_prompt_styles(style, example, before, after):
    tokenizer = with_template(CHATML)
    rows = encode([example], tokenizer, 500, style=style).rows
    length = int(rows.label_positions.max()) + 2
    count = int(rows.label_weights.sum())
    end = "<|im_end|>" if style == "chat" else "</s>"
    assert tokenizer.decode(rows.tokens[0, :length]) == before + after + end
    assert tokenizer.decode(rows.labels[0, :count]) == after + end
    assert tokenizer.batch_decode(prompt_ids([example], tokenizer, style)) == [before]
    if style != "chat":
        assert (prompt(example, style), response(example, style)) == (before, after)


def test_the_first_token_of_all_is_no_label_as_nothing_predicts_it():
    tokenizer = make_tokenizer(pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}"
    rows = encode([Chat(TALK.messages[:2], "")], tokenizer, 500).rows
    whole = tokenizer("a, b")["input_ids"]
    assert rows.labels[0, : int(rows.label_weights.sum())].tolist() == whole[1:]
    assert rows.label_positions.min() == 0
