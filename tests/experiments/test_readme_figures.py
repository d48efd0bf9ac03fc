"""The figures in the README, in the documents and in the index of experiments are those of the results files."""

import re

import pytest
from stored_results import ROOT, after, after_band, best_rates, rate_text, read, stored

from fedmezo_jax.run.config import RunConfig

README, STUDIES, SCALING, PERFORMANCE, INDEX = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/results.md", "docs/scaling.md", "docs/performance.md", "experiments/README.md")
)


def single_client(rows):
    trained = {row["variant"]: row for row in rows if row["what"] == "training"}
    same = [after_band(trained[f"{method}, η = 0.0002"]) for method in ("MeZO", "back-propagation, SGD")]
    [at] = [row for row in rows if row["what"] == "estimator" and row["perturbation_scale"] == 1e-3]
    errors = [f"{100 * at[f'{one}_error']:.1f} %" for one in ("two_point", "forward")]
    return [*best_rates(rows), " against ".join(same), *errors]


def divergence(rows):
    """For each rate the seeds' first rounds of divergence; how often a warning came before one, and where none came."""
    first = {}
    for row in rows:
        first.setdefault(row["learning_rate"], []).append(row["first_divergence"])
    calm = [row for row in rows if row["first_divergence"] is None]
    early = [
        row["first_warning"] is not None and row["first_warning"] < row["first_divergence"]
        for row in rows
        if row["first_divergence"] is not None
    ]
    return [
        *(
            f"{rate_text(rate)}: {', '.join('none' if t is None else str(t) for t in each)}"
            for rate, each in first.items()
        ),
        f"before {sum(early)} of the {len(early)} divergences",
        f"in {sum(row['first_warning'] is not None for row in calm)} of the {len(calm)} runs without one",
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


def answers(rows):
    matches = (rows[0]["exact_match"], rows[1]["exact_match"], rows[1]["standard_error"])
    return [
        " → ".join(f"{row['test_loss']:.3f}" for row in rows),
        "{:.0f} → {:.1f} ± {:.1f} %".format(*(100 * x for x in matches)),
    ]


def heterogeneity_index(rows):
    own = [row for row in rows if row["index"] == "model-diff"]
    assert {row["dirichlet_alpha"] for row in own} == {0.05, 0.2, 1, 10, 100}
    return [f"±{max(abs(row[name]) for row in own for name in ('to_gradient', 'to_label')):.2f}"]


FIGURES = {
    "convergence": best_rates,
    "perturbation_scale": lambda rows: [after_band(row) for row in rows],
    "local_steps": lambda rows: [f"{row['variant'].removeprefix('H = ')}: {after_band(row)}" for row in rows],
    "divergence": divergence,
    "shared_directions": lambda rows: [after_band(row) for row in rows],
    "personalised_rates": personalised_rates,
    "partitioners": lambda rows: [after_band(row) for row in rows],
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
        *answers(rows),
        "{:.0f} → {:.0f} %".format(*(100 * row["answers_stated"] for row in rows)),
    ],
    "heterogeneity_index": heterogeneity_index,
}
"""Study → the texts that its row of the table must have, made of the rows of its results file."""

SETTINGS = {"0.05", "1.25"}
"""Numbers with decimals in the table that are no results: a Dirichlet α, and a multiple of the learning rate."""


MIB = 2**20


def memory(rows):
    """MiB at the peak of a step, a forward pass and back-propagation."""
    peak = {(row["what"], row["precision"]): f"{row['peak_bytes'] / MIB:.0f}" for row in rows}
    kinds = (("backprop", "bfloat16"), ("backprop_checkpointed", "bfloat16"), ("fedmezo", "paired"))
    return {name: peak[name] for name in (*kinds, ("fedmezo", "bfloat16"), ("forward", "bfloat16"))}


def memory_in_short(rows):
    plain, checkpointed, paired, _, forward = memory(rows).values()
    return [f"step {paired} MiB", f"forward pass {forward}", f"back-propagation {plain} (checkpointed {checkpointed})"]


def bytes_in_short(rows):
    sent = {row["sent"]: row for row in rows}
    coefficients = sent["coefficients, per-client directions"]
    return [
        f"{coefficients['uplink_bytes']} up and {coefficients['downlink_bytes']} down",
        f"{sent['LoRA, float16']['uplink_bytes']:,} each way",
    ]


def speed_in_short(rows):
    ratios = {kind: [row["speedup_over_peer_bfloat16"] for row in rows if row["dtype"] == kind] for kind in DTYPES}
    return [
        f"{min(ratios['paired']):.2f} to {max(ratios['paired']):.2f} times as fast in `paired`",
        f"{min(ratios['float32']):.2f} to {max(ratios['float32']):.2f} times in float32",
    ]


DTYPES = ("paired", "float32")


def learning_in_short(rows):
    """The published method, the default recipe's steps and back-propagation, each at its best rate."""
    of = dict(zip([row["variant"].rpartition(", η")[0] for row in rows if row["best"]], best_rates(rows), strict=True))
    chosen = ("two-point, all layers", "up and down, last 1", "back-propagation, up and down, last 1")
    return [f"{rows[0]['loss_before']:.3f}", *(of[name] for name in chosen)]


def real_model_in_short(rows):
    forward = read("smollm2_gsm8k_forward")[0]
    assert forward["loss_before"] == rows[0]["loss_before"]
    return [f"{forward['loss_before']:.3f} → {after(forward)} with", f", {after(rows[0])} with `--estimator backward"]


IN_SHORT = {
    "Learning": ("projections", learning_in_short),
    "A real model": ("smollm2_gsm8k", real_model_in_short),
    "Memory": ("memory_a100", memory_in_short),
    "Communication": ("communication", bytes_in_short),
    "Speed": ("step", speed_in_short),
}
"""Row of the README's results → its results file, and the texts that it must have."""


def table():
    """Study → what its row says of the measurements here."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|$", STUDIES, re.MULTILINE)
    return {name: here for name, _, here in rows}


def check(said, texts):
    """Every text is there, and no other measured figure is left."""
    rest = said
    for text in sorted(texts, key=len, reverse=True):
        assert text in said
        rest = rest.replace(text, "")
    assert set(re.findall(r"\d+\.\d+", rest)) <= SETTINGS


def test_every_study_of_the_table_is_checked():
    assert set(table()) == {
        *FIGURES,
        "attacks",
        "communication",
        "estimators",
        "forgetting",
        "privacy_utility",
    }  # these have tables of their own


@pytest.mark.parametrize("name", FIGURES)
def test_a_study_s_figures_are_those_of_its_results(name):
    check(table()[name], FIGURES[name](read(name)))


def test_every_result_of_the_readme_is_checked():
    results = README.split("\n## Results\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", results, re.MULTILINE))
    assert list(rows) == ["question", *IN_SHORT]
    for name, (file, texts) in IN_SHORT.items():
        check(rows[name], texts(read(file)))


@pytest.mark.parametrize("row", read("communication")[2:], ids=lambda row: row["sent"])
def test_the_bytes_of_messages_are_those_of_the_results(row):
    assert f"| {row['uplink_bytes']:,} | {row['downlink_bytes']:,} |" in SCALING


def test_the_memory_of_the_paper_s_model_is_that_of_the_results():
    plain, checkpointed, paired, narrow, forward = memory(read("memory_a100")).values()
    row = f"| {plain} (checkpointed {checkpointed}) | {paired} paired; {narrow} in plain bfloat16 | forward {forward} |"
    assert row in SCALING


@pytest.mark.parametrize("row", read("step"), ids=lambda row: f"{row['clients']}x{row['length']}-{row['dtype']}")
def test_the_times_of_a_round_are_those_of_the_results(row):
    setting = f"{row['clients']} × {row['batch']} × {row['length']}, {row['rank']}"
    line = next(line for line in PERFORMANCE.splitlines() if line.startswith(f"| {setting} | {row['dtype']} |"))
    cells = [re.sub(r" \(.*\)", "", cell.strip()) for cell in line.split("|")[3:-1]]  # in brackets: an earlier run
    ratios = [row[name] for name in ("step_over_two_forwards", "speedup_over_peer", "speedup_over_peer_bfloat16")]
    expected = [f"{row['seconds']:.2f}", f"{100 * row['share_of_peak']:.0f} %", *(f"{ratio:.2f}" for ratio in ratios)]
    assert cells == expected


def test_the_cost_of_directions_is_that_of_the_results():
    section = PERFORMANCE.split("\n## Directions\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    rows = [("all", row) for row in read("directions")] + [("last 6", row) for row in read("directions_last6")]
    for line, (layers, row) in zip(lines, rows, strict=True):
        cost = f"{row['seconds']:.2f} | {row['in_forward_passes']:.1f} | {row['over_two_point']:.2f}"
        named = f"{layers} | `{row['estimator']}` | {row['directions']}"
        assert line == f"| {named} | {cost} | {row['temporary_bytes'] / 2**20:.1f} |"
        assert row["estimator"] == "two-point" or row["directions"] == 1 or row["over_two_point"] <= 0.55


def test_the_minutes_of_the_index_are_those_of_the_results():
    rows = re.findall(
        r"^\| `python -m experiments\.(?:studies|benchmarks)\.(\w+).*\| ([\d.]+) \|$", INDEX, re.MULTILINE
    )
    assert {name for name, _ in rows} >= set(FIGURES)
    for name, minutes in rows:
        measured = stored(name)["seconds"] / 60
        assert minutes == (f"{measured:.0f}" if measured > 0.5 else f"{measured:.2f}"), name


def test_the_first_figures_of_the_readme_are_those_of_the_results():
    bullets = README.split("```mermaid")[0]
    paired = next(row for row in read("memory_a100") if row["precision"] == "paired")
    default = next(row for row in read("memory_default") if row["what"] == "forward_gradient")
    sent = {row["sent"]: row["uplink_bytes"] for row in read("communication")}
    assert f"takes {100 * (paired['over_forward'] - 1):.1f} % more memory" in bullets
    assert f"takes {default['over_forward']:.2f} of the memory of a forward pass" in bullets
    assert f"is {sent['coefficients, per-client directions']} bytes a round" in bullets
    assert f"would be {sent['LoRA, float16'] / 1e6:.0f} MB" in bullets
    run = RunConfig()
    assert f"the {run.clients * run.rounds * run.local_steps:,} local steps" in bullets
    smallest, *_, largest = read("scale")
    times = f"among {largest['clients']:,} takes {largest['over_smallest']:.2f} times as long as one among"
    assert f"{times} {smallest['clients']}." in bullets


def rounded(text, value):
    """Whether a number in the text is the value, rounded to as many digits as it has."""
    decimals = len(text.partition(".")[2])
    return text.replace(",", "") == f"{value:.{decimals}f}"


def test_the_plans_are_those_of_the_results():
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in SCALING.splitlines() if "| clients=" in line]
    plans = iter(("plan_3b_a100", "plan_3b_v5e", "plan_7b_a100", "plan_8b_h100", "plan_70b_h100"))
    meshes = {}
    for title, mesh, at_once, gibibytes, gigabytes, seconds in cells:
        if title:
            name = next(plans)
            meshes = {row["mesh"]: row for row in read(name)}
            [devices, clients] = re.match(r"[\w-]+, ([\w:-]+), (\d+)", title).groups()
            assert re.search(rf"--topology {devices} --clients {clients}\b", stored(name)["command"])
        row = meshes[mesh]
        assert rounded(gibibytes, row["peak_bytes_per_chip"] / 2**30)
        if not row["fits"]:
            assert (at_once, gigabytes, seconds) == ("does not fit", "", "")
            continue
        fit = f" ({row['most_clients_per_chip']:.0f} would fit)" if "fit" in at_once else ""
        assert at_once == f"{row['clients_at_once']}{fit}"
        assert rounded(gigabytes, row["collective_bytes_per_round"] / 1e9)
        assert rounded(seconds, row["roofline_seconds_per_round"])
    assert next(plans, None) is None


@pytest.mark.parametrize("precision", ["paired", "float32", "bfloat16"])
def test_the_errors_of_the_projected_gradient_are_those_of_the_results(precision):
    rows = [row for row in read("precision") if (row["estimator"], row["precision"]) == ("two-point", precision)]
    errors = [100 * row["error"] for row in rows]
    title = {"bfloat16": "plain bfloat16"}.get(precision, precision)
    [line] = [line for line in PERFORMANCE.splitlines() if line.startswith(f"| {title} | ") and "%" in line]
    for cell, error in zip(line.split("|")[2:-1], errors, strict=True):
        assert rounded(cell.strip(" %"), error)


@pytest.mark.parametrize("name", ["precision_eight_bit", "precision_eight_bit_smollm2"])
def test_the_errors_of_eight_bit_products_are_those_of_the_results(name):
    columns = (
        *(("two-point", precision) for precision in ("float32", "paired", "bfloat16")),
        ("forward-gradient", "bfloat16"),
        ("derivative", "float32"),
    )
    table = PERFORMANCE.split(f"[{name}.json]")[1].split("\n\n")[1].splitlines()
    rows = read(name)
    for base, products in dict.fromkeys((row["base"], row["products"]) for row in rows):
        own = {
            (row["estimator"], row["precision"]): 100 * row["error"]
            for row in rows
            if (row["base"], row["products"]) == (base, products)
        }
        [line] = [line for line in table if line.startswith(f"| {base} | {products} | ")]
        for cell, column in zip(line.split("|")[3:-1], columns, strict=True):
            assert rounded(cell.strip(" %"), own[column])
        assert own["forward-gradient", "bfloat16"] < 5
        assert products == "eight-bit" or own["two-point", "paired"] < 5
