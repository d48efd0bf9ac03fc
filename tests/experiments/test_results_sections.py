"""The tables in the sections of docs/results.md are those of the results files."""

import re

import pytest
from stored_results import ROOT, best_rates, rate_text, read, stored

RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def section_of(title):
    return RESULTS.split(f"\n## {title}\n")[1].split("\n## ")[0]


def tables_of(title):
    """The lines of each table in a section, without its head."""
    tables = re.findall(r"^\|.*\n\|---.*\n((?:\|.*\n)*)", section_of(title), re.MULTILINE)
    return [table.splitlines() for table in tables]


def equal_compute_lines(rows):
    """The lines of a table of methods at equal compute, and its rows by method."""
    by_label, lines = {}, []
    for row, loss in zip(rows, best_rates(rows), strict=True):
        reached = "never" if row["compute_to_its_loss"] is None else f"{row['compute_to_its_loss']:.2f}"
        states = row["hidden_states_to_its_loss"]
        reached += f" | {states:.2f}" if states else " | –"
        label, drop = row["variant"].rpartition(", η = ")[0], f"{row['drop_over_its_drop']:.2f}"
        seconds = row["rounds"] * row["seconds_per_round"]
        run = f"{row['rounds']} | {seconds:.0f}" if seconds >= 10 else f"{row['rounds']} | {seconds:.1f}"
        lines.append(f"| {label} | {run} | {loss} | {drop} | {reached} | {row['numbers_up'] or '–'} |")
        by_label[label] = row
    return lines, by_label


def with_hidden_states(row):
    return row["compute_to_its_loss"] + row["hidden_states_to_its_loss"]


def test_learning_at_equal_compute_is_that_of_the_results():
    lines, by_label = equal_compute_lines([row for row in read("estimators") if row["best"]])
    assert tables_of("Learning at equal compute") == [lines]
    for label, share in (("two-point, last 1", 27), ("two-point, last 2", 8), ("back-propagation, last 2", 46)):
        assert round(1 / by_label[label]["compute_to_its_loss"]) == share
    one, two = (with_hidden_states(by_label[f"two-point, last {n}"]) for n in (1, 2))
    assert f"(1/{1 / one:.0f} and 1/{1 / two:.0f} with the hidden states)" in section_of("Learning at equal compute")
    assert one <= 1 / 10  # the target
    assert all(row["p_paired"] <= 2e-4 for label, row in by_label.items() if "last" in label)


def test_slopes_by_back_propagation_are_those_of_the_results():
    _, slopes = (row for row in read("estimators_backward") if row["best"])
    [loss], section = best_rates([slopes]), section_of("Learning at equal compute")
    loss, _, rate = loss.partition(" (")
    assert f"{loss} ({rate.rstrip(')')}, from {slopes['loss_before']:.3f}, {slopes['seeds']} seeds)" in section
    assert f"{slopes['drop_over_its_drop']:.2f} times the paper's method's drop" in section
    assert f"(paired p = {slopes['p_paired']:.0e})".replace("e-0", "e-") in section
    assert f"its loss after 1/{1 / slopes['compute_to_its_loss']:.0f} of its compute" in section
    assert slopes["compute_to_its_loss"] <= 1 / 10  # the target


def test_the_table_of_projections_is_that_of_the_results():
    lines, by_label = equal_compute_lines([row for row in read("projections") if row["best"]])
    assert tables_of("Which projections")[1] == lines
    section, best = section_of("Which projections"), by_label["up and down, last 1"]
    assert f"{best['drop_over_its_drop']:.1f} times as far as the paper's method** (paired p = 6e-4)" in section
    assert round(best["p_paired"], 4) == 6e-4
    assert f"it is {by_label['q and v, last 2']['drop_over_its_drop']:.1f} times" in section
    two_point, back = by_label["two-point, up and down, last 1"], by_label["back-propagation, up and down, last 1"]
    assert f"end {two_point['loss_after'] - best['loss_after']:.2f} nats higher" in section
    assert f"(p = {by_label['up and down, all layers']['p_paired']:.2f})" in section
    assert f"{back['drop_over_its_drop'] / best['drop_over_its_drop']:.1f} times the drop" in section
    assert f"after 1/{1 / back['compute_to_its_loss']:.0f} of its compute" in section


def test_the_table_of_candidates_is_that_of_the_results():
    rows, [lines] = read("candidates"), tables_of("Other directions and steps")
    for line, row in zip(lines, rows, strict=True):
        loss = f"{row['loss_after']:.3f} ± {row['band_90']:.3f} (η = {rate_text(row['learning_rate'])})"
        p = "–" if row["p_paired"] is None else f"{row['p_paired']:.2g}"
        assert line == f"| {row['candidate']} | {row['rounds']} | {loss} | {row['drop_over_the_recipes']:.2f} | {p} |"
    assert all(row["rates_tried"] >= 3 for row in rows)
    assert max(row["drop_over_the_recipes"] for row in rows) < 1.02
    behind = [row["candidate"] for row in rows if row["p_paired"] is not None and row["p_paired"] < 0.05]
    assert behind == ["block-guided directions, t = 1.2", "ConMeZO, t = 1.35", "server momentum"]


def test_what_the_automatic_rate_reaches_is_that_of_the_results():
    rows, section = read("automatic_rate"), section_of("Without a rate to tune")
    [lines] = tables_of("Without a rate to tune")
    for line, row in zip(lines, rows, strict=True):
        setting = f"{row['layers']} | {row['lora_rank']} | {row['local_steps']} | {row['loss_auto']:.3f}"
        fixed = f"{row['loss_best_fixed']:.3f} (η = {rate_text(row['best_fixed_rate'])})"
        assert line == f"| {setting} | {fixed} | {row['share_of_the_drop']:.2f} ± {row['band_90']:.2f} |"
    least = min(row["share_of_the_drop"] for row in rows)
    assert (
        f"keeps {100 * least:.0f} % of the best fixed rate's loss drop or more** in all {len(rows)} settings" in section
    )
    assert least >= 0.8  # the target
    assert all(row["worst_auto"] < row["loss_before"] for row in rows)
    rates = [row["best_fixed_rate"] for row in rows]
    assert f"by a factor of {max(rates) / min(rates):g} between" in section
    [real] = read("automatic_rate_smollm2")
    losses = f"falls from {real['loss_before']:.3f} to {real['loss_auto']:.3f}, and to {real['loss_best_fixed']:.3f}"
    rate, share = f"(η = {rate_text(real['best_fixed_rate'])})", f"a share of {real['share_of_the_drop']:.2f}"
    assert f"{losses} at the best fixed rate {rate}, {share}" in section
    assert real["share_of_the_drop"] >= 0.8  # the target


@pytest.mark.parametrize(
    ("name", "options", "numbers"),
    [
        ("smollm2_gsm8k_forward", "", "300"),
        ("smollm2_gsm8k", " --estimator backward-gradient --directions 100", "3,000"),
    ],
)
def test_the_last_layer_of_a_real_model_is_that_of_the_results(name, options, numbers):
    row, lora = read(name)
    losses = f"{row['loss_before']:.3f} | {row['loss_after']:.3f}"
    recipe, passes = f"--layers last:1 --local-steps 30{options}", f"{row['forward_passes']:,}"
    section, drop = section_of("A real model"), row["loss_before"] - row["loss_after"]
    assert f"| `{recipe}` | {losses} | {passes} | 1 of 30 | {numbers} |" in section
    assert stored(name)["command"].endswith(f"--layers last:1{options}")
    assert f"{drop:.3f} in 15 rounds" in section or f"a drop of {drop:.3f}" in section
    if options:
        assert drop > 0.4  # the target
        assert f"{row['uplink_bytes']:,} bytes a round, where its adapter would be {lora['uplink_bytes']:,}" in section


def test_methods_at_equal_compute_on_a_real_model_are_those_of_the_results():
    rows, section = read("estimators_smollm2"), section_of("A real model")
    lines, by_label = equal_compute_lines([row for row in rows if row["best"]])
    assert lines in tables_of("A real model")
    slopes = by_label["backward gradient, n = 40, up and down, last 1"]
    back = by_label["back-propagation, up and down, last 1"]
    ours, drop = f"{slopes['compute_to_its_loss']:.2f}", f"{slopes['drop_over_its_drop']:.2f}"
    states, total = f"{slopes['hidden_states_to_its_loss']:.2f}", f"{with_hidden_states(slopes):.2f}"
    assert f"take another {states}, once: a single run is ahead by less, {total} of that compute" in section
    tangents = by_label["forward gradient, n = 10, up and down, last 1"]
    assert f"need {tangents['compute_to_its_loss']:.2f} of the compute" in section
    assert with_hidden_states(tangents) > 1
    assert f"for {ours} of its compute**, and {drop} times its drop" in section
    assert slopes["compute_to_its_loss"] <= 1 / 3  # the targets
    assert slopes["drop_over_its_drop"] >= 1.5
    assert f"{slopes['compute_to_its_loss'] / back['compute_to_its_loss']:.1f} times sooner" in section
    assert f"{back['drop_over_its_drop'] / slopes['drop_over_its_drop']:.1f} times the drop" in section
    of_paper = {row["variant"].rpartition(" = ")[2]: row["loss_after"] for row in rows if row["numbers_up"] == 10}
    assert f"ends at {of_paper['0.00175']:.3f} with half" in section
    of_best = {
        row["variant"].rpartition(" = ")[0]: float(row["variant"].rpartition(" = ")[2]) for row in rows if row["best"]
    }
    for method, best in of_best.items():
        twice = next(row for row in rows if row["variant"] == f"{method} = {2 * best:g}")
        assert twice["loss_after"] > twice["loss_before"], method


def test_three_seeds_on_a_real_model_are_those_of_the_results():
    rows = read("estimators_smollm2_seeds")
    best = [row for row in rows if row["best"]]
    lines, by_label = equal_compute_lines(best)
    assert lines in tables_of("A real model")
    assert {row["seeds"] for row in best} == {3}
    assert not any(row["at_an_end_of_the_sweep"] for row in rows)
    slopes = by_label["backward gradient, n = 40, up and down, last 1"]
    assert f"(paired p = {slopes['p_paired']:.3f})" in section_of("A real model")
    assert slopes["compute_to_its_loss"] <= 1 / 3  # the targets
    assert slopes["drop_over_its_drop"] >= 1.5
    assert all(round(row["loss_before"], 3) == 1.789 for row in best)


def test_methods_on_codealpaca_are_those_of_the_results():
    rows, section = read("estimators_smollm2_codealpaca"), section_of("A real model")
    best = [row for row in rows if row["best"]]
    lines, by_label = equal_compute_lines(best)
    assert lines in tables_of("A real model")
    assert not any(row["at_an_end_of_the_sweep"] for row in rows)
    slopes = by_label["backward gradient, n = 40, up and down, last 1"]
    assert slopes["seeds"] == 3
    assert "and the best run with three (`estimators --preset smollm2 --data codealpaca" in section
    assert f"clear seed by seed (paired p = {slopes['p_paired']:.0e})".replace("e-0", "e-") in section
    assert slopes["compute_to_its_loss"] <= 1 / 3  # the targets
    assert slopes["drop_over_its_drop"] >= 1.5
    of_paper = {row["variant"].rpartition(" = ")[2]: row for row in rows if row["numbers_up"] == 10}
    assert of_paper["0.0035"]["loss_after"] > of_paper["0.0035"]["loss_before"]


def test_a_run_on_codealpaca_is_that_of_the_results():
    row, _ = read("smollm2_codealpaca")
    section, before, after = section_of("A real model"), row["loss_before"], row["loss_after"]
    assert f"falls from {before:.3f} to" in section
    assert f"{after:.3f} after 15, a drop of {before - after:.3f}" in section
    assert f"| test loss (nats/token) | {before:.3f} | {after:.3f} |" in section


def attack_lines(rows, names):
    """The lines of a table of attacks by rules of these names, and its rows by attack and rule."""
    left = {}
    for row in rows:
        name = row["attack"] + (", rates by losses" if (row["attack"], row["rates"]) == ("none", "by losses") else "")
        name += f", {row['liars']} of {row['clients']}" if row["liars"] and row["clients"] == 8 else ""
        left.setdefault(name, {})[row["aggregation"]] = row
    lines = [f"{name} | " + " | ".join(f"{of[rule]['drop_left']:.2f}" for rule in names) for name, of in left.items()]
    return [f"| {line} |" for line in lines], left


def test_what_attacks_leave_is_that_of_the_results():
    section = section_of("Clients that lie")
    heads = [line for line in section.splitlines() if line.startswith("| attack |")]
    files = [read(name) for name in ("attacks", "attacks_of_eight", "attacks_smollm2")]
    tables = [attack_lines(rows, re.findall(r"`([\w-]+)`", head)) for rows, head in zip(files, heads, strict=True)]
    assert tables_of("Clients that lie") == [lines for lines, _ in tables]
    ten, eight, real = (left for _, left in tables)
    rules = ten["none"]
    least = {rule: [min(of[rule]["drop_left"] for of in left.values()) for left in (ten, eight)] for rule in rules}
    assert f"keeps {least['polar-krum'][0]:.2f} of the loss drop or more" in section
    assert f"leaves at least {least['polar-krum'][1]:.2f} of it with eight clients" in section
    assert f"`multi-krum` leaves {least['multi-krum'][1]:.2f} under plain sign flips by two" in section
    for rule in ("multi-krum", "polar-krum"):
        flipped = ten["sign flip"][rule]
        assert f"loses {100 * (1 - flipped['drop_left']):.1f} ± {100 * flipped['band_90']:.1f} %" in section
    assert min(of["polar-krum"]["drop_left"] for of in ten.values()) >= 0.95  # the target, at 20 % of liars
    assert ten["none"]["polar-krum"]["drop_left"] >= 0.95
    fresh = [row["drop_left"] for row in read("attacks_fresh_seeds") if row["aggregation"] == "polar-krum"]
    assert f"with seeds 5 to 9 it keeps {int(100 * min(fresh)) / 100:.2f} or more" in section
    assert min(fresh) >= 0.95
    clean = real["none"]["mean"]
    assert f"from {clean['loss_before']:.3f} to {clean['loss_after']:.3f}" in section
    assert f"take {100 * (1 - real['sign flip']['mean']['drop_left']):.0f} % of the mean's loss drop" in section
    assert real["sign flip"]["polar-krum"]["drop_left"] >= 0.95
    assert min(of["drop_left"] for rule, of in real["sign flip"].items() if "krum" in rule) >= 0.9
    assert max(of["drop_left"] for rule, of in real["sign flip"].items() if "krum" not in rule) <= 0.55


def test_the_ceiling_of_few_layers_is_that_of_the_results():
    [lines] = tables_of("The ceiling of few layers")
    for line, row in zip(lines, read("ceiling"), strict=True):
        assert not row["at_an_end_of_the_sweep"]
        loss = f"{row['lowest_loss']:.3f} ± {row['band_90']:.3f} (η = {rate_text(row['learning_rate'])})"
        paired = "–" if row["p_paired"] is None else f"{row['p_paired']:.2g}"
        assert line == f"| {row['trained']} | {loss} | {row['after_rounds']} | {paired} |"


def test_what_privacy_costs_is_that_of_the_results():
    lines, real_lines, shadow_lines = tables_of("What privacy costs")
    rows, real_rows, shadow_rows = read("privacy_utility"), read("privacy_utility_smollm2"), read("shadow_models")

    def with_band(row, name, form, unit=""):
        scale = 100 if unit else 1
        band = row[f"{name}_band_90"]
        return f"{scale * row[name]:{form}}{'' if band is None else f' ± {scale * band:{form}}'}{unit}"

    for line, row in zip(lines + real_lines, rows + real_rows, strict=True):
        lost = "–" if row["epsilon"] is None else with_band(row, "drop_lost", ".1f", " %")
        aucs = " | ".join(with_band(row, name, ".2f") for name in ("auc_adapter", "auc_ledger"))
        epsilon = "∞" if row["epsilon"] is None else f"{row['epsilon']:g}"
        expected = f"| {row['clients']:,} | {epsilon} | {row['seeds']} | {row['loss_after']:.3f} | {lost} | {aucs} |"
        assert line == expected
        assert row["auc_ledger"] == 1 if row["epsilon"] is None else row["auc_ledger"] <= 0.52
    for line, row in zip(shadow_lines, shadow_rows, strict=True):
        epsilon = "∞" if row["epsilon"] is None else f"{row['epsilon']:g}"
        aucs = " | ".join(with_band(row, name, ".3f") for name in ("auc_threshold", "auc_shadow"))
        assert line == f"| {epsilon} | {row['loss_after']:.3f} | {aucs} |"
        assert row["auc_shadow"] + row["auc_shadow_band_90"] < 0.51


def test_what_forgetting_leaves_is_that_of_the_results():
    [lines] = tables_of("Forgetting a client")
    rows = {(row["partition"], row["adapter"]): row for row in read("forgetting")}
    compared = {key: row for key, row in rows.items() if key[1] != "never there"}
    for line, ((partition, adapter), row) in zip(lines, compared.items(), strict=True):
        gap, distance, auc = (
            f"{row[key]:{form}} ± {row[f'{key}_band_90']:{form[-3:]}}"
            for key, form in (("client_gap", "+.3f"), ("distance", ".2f"), ("auc", ".2f"))
        )
        assert line == f"| {partition} | {adapter} | {gap} | {distance} | {auc} |"
    left_out = {partition: row for (partition, adapter), row in rows.items() if adapter == "left out in a replay"}
    assert all(row["client_gap"] < -row["client_gap_band_90"] for row in left_out.values())
    never = [row["seconds"] for (_, adapter), row in rows.items() if adapter == "never there"]
    section = section_of("Forgetting a client")
    assert f"{left_out['iid']['seconds']:.1f} seconds" in section
    assert f"took {min(never):.0f} to {max(never):.0f}" in section
