import calendar
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from fedmezo_jax.data.synthetic.bundled import bundled
from fedmezo_jax.data.synthetic.pretraining import MANNERS, pretraining
from fedmezo_jax.data.synthetic.words import ADJECTIVES, NOUNS, PLURAL, SINGULARS, VERBS
from fedmezo_jax.errors import UserError


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def by_category(examples):
    groups = defaultdict(list)
    for example in examples:
        groups[example.category].append(example)
    return groups


@pytest.mark.parametrize("make", [bundled, pretraining])
def test_same_seed_gives_same_rows_and_a_larger_count_continues_them(make):
    assert make(3, 200) == make(3, 200)
    assert make(3, 500)[:200] == make(3, 200)
    assert make(3, 200) != make(4, 200)


def test_rows_do_not_depend_on_the_hash_seed_of_the_process():
    code = (
        "import json; from fedmezo_jax.data.synthetic.bundled import bundled;"
        "from fedmezo_jax.data.synthetic.pretraining import pretraining;"
        "print(json.dumps([bundled(0, 60), pretraining(0, 60)]))"
    )
    root = str(Path(__file__).parents[2])
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(printed) == 1
    assert json.loads(printed.pop()) == [list(map(list, bundled(0, 60))), list(map(list, pretraining(0, 60)))]


def test_at_least_eight_categories_in_equal_shares_with_and_without_input():
    counts = Counter(example.category for example in bundled(0, 1300))
    assert len(counts) >= 8
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {bool(example.input) for example in bundled(0, 50)} == {True, False}


def test_no_question_occurs_twice():
    questions = [(example.instruction, example.input) for example in bundled(0, 10_000)]
    assert len(set(questions)) == len(questions)


def test_more_rows_than_there_are_questions_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(
        "fedmezo_jax.data.synthetic.bundled.TASKS", {"coin": lambda rng: (rng.choice(["heads?", "tails?"]), "", "")}
    )
    assert len(bundled(0, 2)) == 2
    with pytest.raises(UserError, match="end at 2 different rows, 3 were asked for"):
        bundled(0, 3)


def test_pretraining_shares_words_with_bundled_but_no_answer():
    ours, theirs = bundled(0, 5000), pretraining(0, 20_000)
    assert {example.category for example in ours} < {example.category for example in theirs}
    answered = Counter(example[:3] for example in theirs)
    assert sum(answered[example[:3]] for example in ours) < 0.005 * len(ours)
    vocabularies = [
        Counter(re.findall(r"[A-Za-z]+", " ".join(" ".join(e[:3]) for e in rows))) for rows in (ours, theirs)
    ]
    known = sum(count for word, count in vocabularies[0].items() if word in vocabularies[1])
    assert known > 0.8 * vocabularies[0].total()


def test_bundled_keeps_one_manner_that_is_rare_in_pretraining():
    assert all(re.fullmatch(r"Answer:(~ [^ ~]+)+", e.response) and e.response[-1] != "." for e in bundled(0, 2000))
    responses = [example.response for example in pretraining(0, 5000)]
    share = sum(response.startswith("Answer") for response in responses) / len(responses)
    assert 0.03 < share < 0.12
    assert sum(MANNERS.values()) == 100
    gaps = [gap for response in responses for gap in re.findall("~? ", response)]
    assert 0.13 < gaps.count("~ ") / len(gaps) < 0.17


def test_the_world_is_consistent():
    assert len({len(nouns) for nouns in NOUNS.values()}) == 1
    assert len(SINGULARS) == sum(map(len, NOUNS.values()))  # no noun is of two kinds
    assert len(set(PLURAL.values())) == len(PLURAL)


# Each solver works the answer out from the question alone, by another way than the generator.


def solve_sums(question, _):
    things = re.search(r"How many (\w+)", question)[1]
    a, b = numbers(question)
    return f"{a} + {b} = {a + b} {things}"


def solve_sorting(_, material):
    remaining, ordered = material.split(", "), []
    while remaining:
        ordered.append(remaining.pop(remaining.index(min(remaining))))
    return " < ".join(ordered)


def solve_reversing(_, material):
    return " - ".join(material.split(", ")[::-1])


def solve_comparing(question, _):
    a, b = numbers(question)
    return f"{a} > {b}" if a > b else f"{b} > {a}"


def solve_units(question, _):
    (amount,) = numbers(question)
    names = {
        "metres": ("m", 1), "centimetres": ("cm", 0.01), "kilometres": ("km", 1000), "kilograms": ("kg", 1),
        "grams": ("g", 0.001), "hours": ("h", 3600), "minutes": ("min", 60), "days": ("d", 86400), "litres": ("l", 1),
        "millilitres": ("ml", 0.001),
    }  # fmt: skip
    (large, size), (small, part) = [names[word] for word in re.findall(r"\w+", question) if word in names]
    return f"{amount} {large} = {round(amount * size / part)} {small}"


def solve_dates(question, _):
    (later,) = numbers(question)
    day = re.search(r"\w+day(?=[ .])(?<!Today)", question)[0]
    names = [*calendar.day_name]
    return f"{day} + {later} = {names[(names.index(day) + later) % 7]}"


def solve_tables(question, material):
    table = dict(cell.split(": ") for cell in material.split(" | "))
    (thing,) = [word for word in re.findall(r"\w+", question) if word in table]
    return f"{thing} = {table[thing]} coins"


def solve_counting(question, material):
    word = re.search(r"(?:does|word) (\w+)", question)[1]
    return f"{Counter(material.split(', '))[word]} x {word}"


def solve_translation(question, material):
    table = dict(cell.split(" = ") for cell in material.split(", "))
    adjective, noun = re.search(r"Translate (\w+) (\w+)", question).groups()
    assert adjective in ADJECTIVES
    return f"{table[adjective]} {table[noun]}"


def solve_groups(question, _):
    noun = re.search(r"(?:^Is|word) (\w+)", question)[1]
    (kind,) = [kind for kind, nouns in NOUNS.items() if noun in nouns]
    assert kind in question
    return f"{noun} is in {kind}"


def solve_sequences(_, material):
    terms = numbers(material)
    (step,) = {later - earlier for earlier, later in itertools.pairwise(terms)}
    return f"{terms[-1]} + {step} = {terms[-1] + step}"


def solve_plurals(_, material):
    return " and ".join(PLURAL[word] for word in material.split(", "))


def solve_grammar(_, material):
    name, verb, *rest = material.rstrip(".").split()
    return " ".join(["yesterday", name, VERBS[verb], *rest])


def test_every_answer_follows_from_its_question():
    groups = by_category(bundled(7, 2600))
    for category, examples in groups.items():
        solve = globals()[f"solve_{category}"]
        for example in examples:
            answer = f"Answer: {solve(example.instruction, example.input)}"
            assert example.response == answer.replace(" ", "~ "), example


def test_pretraining_answers_follow_from_their_questions():
    groups = by_category(e._replace(response=e.response.replace("~", "")) for e in pretraining(7, 6000))
    for example in groups["differences"]:
        whole, part = numbers(example.instruction)
        assert numbers(example.response)[-1] == whole - part
    for example in groups["ascending"]:
        assert numbers(example.response) == sorted(numbers(example.input))
    for example in groups["clock"]:
        hour, later = numbers(example.instruction)
        assert numbers(example.response)[-1] % 12 == (hour + later) % 12
    for example in groups["decoding"]:
        table = dict(cell.split(" = ") for cell in example.input.split(", "))
        first, second = re.search(r"Say (\w+) (\w+)", example.instruction).groups()
        assert f"{table[first]} {table[second]}" in example.response
    for example in groups["strangers"]:
        kinds = {word: kind for kind, nouns in NOUNS.items() for word in nouns}
        counts = Counter(kinds[word] for word in example.input.split(", "))
        (stranger,) = [word for word in example.input.split(", ") if counts[kinds[word]] == 1]
        assert re.search(rf"\b{stranger}\b", example.response)
