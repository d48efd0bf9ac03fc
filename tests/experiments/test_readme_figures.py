"""The figures in README's table of studies are those of the results files."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def read(name):
    return json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def after(row):
    return f"{row['loss_after']:.3f}"


def after_band(row):
    return f"{after(row)} ± {row['band_90']:.3f}"


def best_rates(rows):
    """Every method at the best rate of its sweep, which must lie inside the sweep."""
    best = [row for row in rows if row.get("best")]
    assert not any(row["at_an_end_of_the_sweep"] for row in best)
    return [f"{after_band(row)} (η = {_rate(row['variant'].split(' = ')[-1])})" for row in best]


def _rate(text):
    mantissa, exponent = f"{float(text):e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if int(exponent) < -2 else f"{float(text):g}"


def single_client(rows):
    trained = {row["variant"]: row for row in rows if row["what"] == "training"}
    same = [after_band(trained[f"{method}, η = 0.0002"]) for method in ("MeZO", "back-propagation, SGD")]
    [at] = [row for row in rows if row["what"] == "estimator" and row["perturbation_scale"] == 1e-3]
    errors = [f"{100 * at[f'{one}_error']:.1f} %" for one in ("two_point", "forward")]
    return [*best_rates(rows), " against ".join(same), *errors]


def surge(rows):
    """For each rate the seeds' first rounds of a surge; how often the guard warned before one, and where none came."""
    first = {}
    for row in rows:
        first.setdefault(row["learning_rate"], []).append(row["first_surge"])
    calm = [row for row in rows if row["first_surge"] is None]
    early = [
        row["first_warning"] is not None and row["first_warning"] < row["first_surge"]
        for row in rows
        if row["first_surge"] is not None
    ]
    return [
        *(f"{_rate(rate)}: {', '.join('none' if t is None else str(t) for t in each)}" for rate, each in first.items()),
        f"before {sum(early)} of the {len(early)} surges",
        f"in {sum(row['first_warning'] is not None for row in calm)} of the {len(calm)} runs without",
    ]


def personalised_rates(rows):
    by = {row["variant"]: row for row in rows}
    one_rate = by.pop("frozen, 1.25 η₀")
    p = f"{one_rate['p_paired']:.1e}".replace("e-0", "e-")
    assert min(row["p_paired"] for row in by.values() if row["p_paired"]) >= 0.08
    return [
        "p ≥ 0.08",
        *(f"{name} {after(by[name])}" for name in ("frozen", "model-diff")),
        f"among the clients {after(by['shuffled'])}",
        f"{after(one_rate)} (p = {p})",
    ]


def effective_rank(rows):
    trained = [row for row in rows if row["state"] == "trained" and row["layer"] == "all"]
    whole = {}
    for row in trained:
        name = row["data"] if row["model"] != "tiny" else "tiny"
        whole.setdefault(name, []).append((row["effective_rank"], row["effective_rank_error"]))
    tiny = [round(row["effective_rank_positive"]) for row in trained if row["model"] == "tiny"]
    positive = [round(row["effective_rank_positive"]) for row in trained if row["model"] != "tiny"]
    return [
        ", ".join(f"{value:.1f} ± {error:.1f}" for value, error in whole["tiny"]),
        *(
            " and ".join(f"{value:.0f} ± {error:.0f}" for value, error in whole[name])
            for name in ("gsm8k", "codealpaca")
        ),
        f"{min(tiny)} to {max(tiny)}, {{}} and {{}}, {{}} and {{}}".format(*positive),
    ]


def theory_constants(rows):
    value = {row["quantity"]: row for row in rows}
    rank = value["r = tr(H₊)/‖H₊‖"]
    step = value["η = 0.001"]
    return [
        f"L = {value['L = ‖H‖, largest on the path']['value']:.0f}",
        *(f"{name} = {value[name]['value']:.2g}" for name in ("c_g", "σ_g²", "c_h", "σ_h²")),
        f"r = {rank['value']:.0f} of {rank['remark'].split('; ')[1]}",
        f"{step['bound']:.4f} at η = 1e-3 where {step['value']:.4f} ± {step['error']:.4f}",
        f"{step['bound_without_rank']:.1f}",
        f"{float(value['η of the rate, (NH)^½(rT)^-½']['remark'].split()[0]):.0e} times".replace("e+0", "e"),
    ]


def heterogeneity_index(rows):
    own = [row for row in rows if row["index"] == "model-diff"]
    assert {row["dirichlet_alpha"] for row in own} == {0.05, 0.2, 1, 10, 100}
    return [f"±{max(abs(row[name]) for row in own for name in ('to_gradient', 'to_label')):.2f}"]


FIGURES = {
    "convergence": best_rates,
    "perturbation_scale": lambda rows: [after_band(row) for row in rows],
    "local_steps": lambda rows: [f"{row['variant'].removeprefix('H = ')}: {after_band(row)}" for row in rows],
    "surge": surge,
    "shared_directions": lambda rows: [after_band(row) for row in rows],
    "personalised_rates": personalised_rates,
    "splitters": lambda rows: [after_band(row) for row in rows],
    "clients": lambda rows: [", ".join(after(row) for row in rows)],
    "batch_size": lambda rows: [", ".join(after_band(row) for row in rows)],
    "lora_rank": lambda rows: [
        *(f"{row['variant']}: {after_band(row)}" for row in rows[:2]),
        f"{rows[2]['loss_after']:.2f}",
    ],
    "single_client": single_client,
    "effective_rank": effective_rank,
    "best_rank": lambda rows: [", ".join(after_band(row) for row in rows)],
    "model_size": lambda rows: [f"{row['loss_before']:.3f} → {after_band(row)}" for row in rows],
    "theory_constants": theory_constants,
    "convergence_rate": lambda rows: [
        f"{row['slope']:+.1f} ± {row['error']:.1f}"
        if row["varied"] == "H"
        else f"{row['slope']:.2f} ± {row['error']:.2f}"
        for row in rows[:3]
    ],
    "task_metrics": lambda rows: [
        " → ".join(f"{row['test_loss']:.3f}" for row in rows),
        "{:.0f} → {:.1f} ± {:.1f} %".format(
            *(100 * x for x in (rows[0]["exact_match"], rows[1]["exact_match"], rows[1]["standard_error"]))
        ),
        "{:.0f} → {:.0f} %".format(*(100 * row["answers_stated"] for row in rows)),
    ],
    "heterogeneity_index": heterogeneity_index,
}
"""Study → the texts that its row of the table must have, made of the rows of its results file."""

SETTINGS = {"0.05", "1.25"}
"""Numbers with decimals in the table that are no results: a Dirichlet α, and a multiple of the learning rate."""


def table():
    """Study → what its row says of ours."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|$", README, re.MULTILINE)
    return {name: ours for name, _, ours in rows}


def test_every_study_of_the_table_is_checked():
    assert set(table()) == {*FIGURES, "communication"}


@pytest.mark.parametrize("name", FIGURES)
def test_a_study_s_figures_are_those_of_its_results(name):
    said = rest = table()[name]
    for text in sorted(FIGURES[name](read(name)), key=len, reverse=True):
        assert text in said
        rest = rest.replace(text, "")
    assert set(re.findall(r"\d+\.\d+", rest)) <= SETTINGS  # no other measured figure is left


@pytest.mark.parametrize("row", read("communication")[2:], ids=lambda row: row["sent"])
def test_the_bytes_of_messages_are_those_of_the_results(row):
    assert f"| {row['uplink_bytes']:,} | {row['downlink_bytes']:,} |" in README
