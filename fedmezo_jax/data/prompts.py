"""Turns examples into text: four prompt styles for instructions, and the tokenizer's own template for chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, cast

from fedmezo_jax.data.examples import Chat, Example, Message
from fedmezo_jax.data.step_limit import TooManySteps, limit_steps
from fedmezo_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Style: TypeAlias = Literal["alpaca", "plain", "question-answer", "chat"]
"""How an instruction becomes a prompt.

alpaca: Stanford Alpaca's template, the paper's. The response follows "### Response:".
plain: the instruction, the input under it if there is one, and a line break before the response.
question-answer: "Question: ...", and the response after "Answer:". For base models and short answers.
chat: a user's turn, answered by the assistant, in the chat template of the tokenizer. For chat models.
"""

_MOST_STEPS = 1_000_000  # common templates take about 60 steps per message
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def prompt(example: Example, style: Style = "alpaca") -> str:
    """Returns the text before the response, in any style but ``chat``; an empty input is left out."""
    if style == "alpaca":
        template = _ALPACA_WITH_INPUT if example.input else _ALPACA
        return template.format(instruction=example.instruction, input=example.input)
    question = "\n".join(filter(None, (example.instruction, example.input)))
    return f"{question}\n" if style == "plain" else f"Question: {question}\nAnswer:"


def response(example: Example, style: Style = "alpaca") -> str:
    """Returns the text after :func:`prompt`."""
    return f" {example.response}" if style == "question-answer" else example.response


def as_chat(example: Example) -> Chat:
    """Returns a chat of two turns: the user's instruction and input, and the assistant's response."""
    question = "\n\n".join(filter(None, (example.instruction, example.input)))
    return Chat((Message("user", question), Message("assistant", example.response)), example.category)


class Rendered(NamedTuple):
    """A chat as one text.

    Attributes:
        text: the conversation in the tokenizer's template, with the begin token if the tokenizer has one.
        spans: start and end in ``text`` of each assistant turn, including its end-of-turn mark.
    """

    text: str
    spans: list[tuple[int, int]]


def render(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """Puts a chat into the tokenizer's chat template and finds the assistant's turns in it.

    A turn is the text that the template adds for it, without the header that asks the assistant to answer. If the
    assistant opens the chat, this first turn answers nothing and is left out of the spans.

    Raises:
        UserError: the tokenizer has no chat template; or the template refuses the chat, or rewrites earlier turns as
            the chat grows, so that the turns cannot be located.
    """
    text, spans = templated(tokenizer, chat.messages), []
    for turn, message in enumerate(chat.messages):
        if message.role == "assistant" and turn > 0:
            before = templated(tokenizer, chat.messages[:turn], ask=True)
            after = templated(tokenizer, chat.messages[: turn + 1]).rstrip()
            if not (text.startswith(before) and text.startswith(after) and len(before) <= len(after)):
                raise UserError(
                    f"the tokenizer's chat template writes message {turn} otherwise once others follow, so the "
                    "assistant's tokens cannot be told apart: split the chat there, or mend chat_template.jinja"
                )
            spans.append((len(before), len(after)))
    return Rendered(text, spans)


def prompt_ids(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, style: Style) -> list[list[int]]:
    """Returns the token ids of each example's prompt. Training, generation and scoring share them."""
    if style == "chat":  # the template writes the begin token itself
        return token_ids(
            [templated(tokenizer, as_chat(example).messages[:1], ask=True) for example in examples], tokenizer
        )
    return text_ids([prompt(example, style) for example in examples], tokenizer)


def text_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Returns the token ids of texts that will be continued.

    The begin token comes first if the tokenizer is set to add one. It is added as an id: written into the text, it
    would keep some tokenizers from putting a space before the first word. No end token is added, even if the tokenizer
    is set to add one, because the text continues.
    """
    start = begin(tokenizer)
    return [[*start, *ids] for ids in token_ids(texts, tokenizer)]


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Returns the token ids of texts, without begin and end tokens."""
    if not texts:
        return []  # the tokenizer refuses an empty list
    # verbose=False: the model's context is checked elsewhere, with an error or a count instead of a warning.
    encoding = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return cast(list[list[int]], encoding["input_ids"])


def begin(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Returns the begin token's id if the tokenizer is set to add one before a text, and else an empty list."""
    # Tokenise a text to find out: each family of tokenizers keeps this setting in a different place. The text is not
    # empty because some tokenizers use one token for begin and end, and would then add it at the end only.
    return [token for token in tokenizer("a")["input_ids"][:1] if token == tokenizer.bos_token_id]


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ``UserError`` with the remedy where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, which chat data and --prompt-style chat need: put the model's "
            "chat_template.jinja into its folder, or choose another prompt style for data with instructions"
        )


def templated(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], ask: bool = False, unfinished: bool = False
) -> str:
    """Returns the turns in the tokenizer's chat template, as text.

    Args:
        tokenizer: has the template.
        messages: the turns, in order.
        ask: whether the header of the assistant's next turn follows.
        unfinished: whether the last turn is left open, to be gone on with.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the chat.
    """
    check_template(tokenizer)
    turns = [message._asdict() for message in messages]
    try:
        # Some templates write today's date. Tokens must not change from day to day, so the date is fixed.
        options = {"tokenize": False, "date_string": "26 Jul 2024"}
        options |= {"add_generation_prompt": ask, "continue_final_message": unfinished}
        text = limit_steps(lambda: tokenizer.apply_chat_template(turns, **options), _MOST_STEPS)
    except TooManySteps:
        raise UserError(
            f"the tokenizer's chat template takes more than {_MOST_STEPS:,} steps for one chat: it may never end; "
            "mend chat_template.jinja"
        ) from None
    except ImportError:
        raise  # Jinja is missing, so the chat is not at fault
    except Exception as error:  # templates raise Jinja's errors and any that their code causes
        raise UserError(f"the tokenizer's chat template refuses the chat ({' '.join(str(error).split())})") from None
    assert isinstance(text, str)
    return text
