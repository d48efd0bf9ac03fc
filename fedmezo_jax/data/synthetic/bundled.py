"""The ``bundled`` data: short instruction-response pairs in thirteen categories, made by code from a seed.

Every response has the same style ("Answer:~ 5~ +~ 12~ =~ 17": a mark after every word, no full stop), and each category
has its own form of answer. The shipped ``tiny`` model was pretrained on these tasks and others, answered in many styles
(:mod:`pretraining`). All clients of a federation can teach it the common style together, while the forms make clients
with different categories differ.
"""

import random
from collections.abc import Callable

from fedmezo_jax.data.examples import Example
from fedmezo_jax.data.synthetic.words import (
    ADJECTIVES,
    DAYS,
    GOODS,
    KIND_OF,
    KINDS,
    NAMES,
    NOUNS,
    PLURAL,
    SINGULARS,
    UNITS,
    VERBS,
    invented,
    listed,
)
from fedmezo_jax.errors import UserError

MARK = "~"  # follows every word of a response but the last
Task = Callable[[random.Random], tuple[str, str, str]]
_MAX_TRIES = 1000


def _sums(rng: random.Random) -> tuple[str, str, str]:
    giver, other = rng.sample(NAMES, 2)
    things = PLURAL[rng.choice(GOODS)]
    a, b = rng.randint(2, 49), rng.randint(2, 49)
    question = rng.choice(
        [
            f"{giver} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?",
            f"{giver} buys {a} {things} and then {b} more. How many {things} does {giver} have in all?",
        ]
    )
    return question, "", f"{a} + {b} = {a + b} {things}"


def _sorting(rng: random.Random) -> tuple[str, str, str]:
    words = rng.sample(SINGULARS, rng.randint(3, 5))
    instruction = rng.choice(["Sort these words from A to Z.", "Put the words in alphabetical order."])
    return instruction, listed(words), " < ".join(sorted(words))


def _reversing(rng: random.Random) -> tuple[str, str, str]:
    words = rng.sample(SINGULARS, rng.randint(3, 5))
    instruction = rng.choice(["Reverse the order of these words.", "Write the list backwards."])
    return instruction, listed(words), " - ".join(reversed(words))


def _comparing(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.sample(range(10, 1000), 2)
    things = PLURAL[rng.choice(GOODS)]
    question = rng.choice([f"Which is more, {a} {things} or {b} {things}?", f"Compare {a} {things} with {b} {things}."])
    return question, "", f"{max(a, b)} > {min(a, b)}"


def _units(rng: random.Random) -> tuple[str, str, str]:
    large, large_symbol, small, small_symbol, factor = rng.choice(UNITS)
    amount = rng.randint(2, 99)
    thing = rng.choice(SINGULARS)
    question = rng.choice(
        [f"Convert {amount} {large} to {small}.", f"The {thing} takes {amount} {large}. How many {small} is that?"]
    )
    return question, "", f"{amount} {large_symbol} = {amount * factor} {small_symbol}"


def _dates(rng: random.Random) -> tuple[str, str, str]:
    name, day, later = rng.choice(NAMES), rng.randrange(7), rng.randint(1, 9)
    thing = rng.choice(GOODS)
    question = rng.choice(
        [
            f"Today is {DAYS[day]}. {name} gets a {thing} in {later} days. On which day is that?",
            f"{name} sold the {thing} on a {DAYS[day]} and got the money {later} days later. Which day was it then?",
        ]
    )
    return question, "", f"{DAYS[day]} + {later} = {DAYS[(day + later) % 7]}"


def _tables(rng: random.Random) -> tuple[str, str, str]:
    things = rng.sample(GOODS, rng.randint(3, 4))
    prices = rng.sample(range(2, 100), len(things))
    pick = rng.randrange(len(things))
    question = rng.choice([f"What is the price of a {things[pick]}?", f"How many coins does a {things[pick]} cost?"])
    table = " | ".join(f"{thing}: {price}" for thing, price in zip(things, prices, strict=True))
    return question, table, f"{things[pick]} = {prices[pick]} coins"


def _counting(rng: random.Random) -> tuple[str, str, str]:
    word, *others = rng.sample(SINGULARS, 3)
    times = rng.randint(1, 4)
    words = [word] * times + rng.choices(others, k=rng.randint(2, 6 - times))
    rng.shuffle(words)
    question = rng.choice([f"How often does {word} occur in the list?", f"Count the word {word}."])
    return question, listed(words), f"{times} x {word}"


def _plurals(rng: random.Random) -> tuple[str, str, str]:
    words = rng.sample(SINGULARS, rng.randint(2, 3))
    instruction = rng.choice(["Give the plural of each noun.", "Write these nouns in the plural."])
    return instruction, listed(words), " and ".join(PLURAL[word] for word in words)


def _translation(rng: random.Random) -> tuple[str, str, str]:
    words = [rng.choice(ADJECTIVES), *rng.sample(SINGULARS, 2)]
    foreign = dict(zip(words, invented(rng, 3), strict=True))
    adjective, noun = words[0], rng.choice(words[1:])
    instruction = f"Translate {adjective} {noun} with the word list."
    rng.shuffle(words)
    return instruction, listed([f"{word} = {foreign[word]}" for word in words]), f"{foreign[adjective]} {foreign[noun]}"


def _groups(rng: random.Random) -> tuple[str, str, str]:
    kinds = rng.sample(KINDS, 3)
    noun = rng.choice(tuple(NOUNS[rng.choice(kinds)]))
    choice = f"{kinds[0]}, {kinds[1]} or {kinds[2]}"
    question = rng.choice([f"Is {noun} in the group {choice}?", f"Choose the group of the word {noun}: {choice}."])
    return question, "", f"{noun} is in {KIND_OF[noun]}"


def _sequences(rng: random.Random) -> tuple[str, str, str]:
    start, step, shown = rng.randint(1, 99), rng.randint(2, 12), rng.randint(3, 5)
    terms = [start + step * i for i in range(shown + 1)]
    instruction = rng.choice(["Continue the sequence of numbers.", "Which number comes next?"])
    return instruction, listed(terms[:-1]), f"{terms[-2]} + {step} = {terms[-1]}"


def _grammar(rng: random.Random) -> tuple[str, str, str]:
    name, verb = rng.choice(NAMES), rng.choice(tuple(VERBS))
    end = f"the {rng.choice(ADJECTIVES)} {rng.choice(SINGULARS)}"
    instruction = rng.choice(["Put the sentence into the past tense.", "Say that it happened yesterday."])
    return instruction, f"{name} {verb} {end}.", f"yesterday {name} {VERBS[verb]} {end}"


TASKS: dict[str, Task] = {
    "sums": _sums,
    "sorting": _sorting,
    "reversing": _reversing,
    "comparing": _comparing,
    "units": _units,
    "dates": _dates,
    "tables": _tables,
    "counting": _counting,
    "plurals": _plurals,
    "translation": _translation,
    "groups": _groups,
    "sequences": _sequences,
    "grammar": _grammar,
}


def bundled(seed: int, count: int) -> list[Example]:
    """Returns ``count`` instruction-response pairs; no question occurs twice, and the categories take turns.

    The same arguments give the same list; a larger ``count`` continues it.

    Raises:
        UserError: a category has run out of different questions (above about eighty thousand examples).
    """
    rng = random.Random(f"fedmezo bundled {seed}")
    categories = tuple(TASKS)
    examples: list[Example] = []
    seen: set[tuple[str, str]] = set()
    while len(examples) < count:
        category = categories[len(examples) % len(categories)]
        for _ in range(_MAX_TRIES):
            instruction, material, answer = TASKS[category](rng)
            if (instruction, material) not in seen:
                break
        else:
            raise UserError(f"the bundled data end at {len(examples)} different rows, {count} were asked for")
        seen.add((instruction, material))
        examples.append(Example(instruction, material, f"Answer: {answer}".replace(" ", f"{MARK} "), category))
    return examples
