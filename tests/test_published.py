"""The published numbers: complete, each with its source, and the disagreements among them are really there."""

import pytest

from umm_kit import published


@pytest.mark.parametrize("name", published.NAMES)
def test_every_value_has_a_source_and_no_twin(name):
    table = published.load(name)
    assert table.notna().all().all() and table.value.dtype == float
    assert table.source.str.fullmatch(r"DIVA (Fig\. \d+|Table \d+|Tables 7 and 8|App\. B\.2)").all()
    keys = [c for c in table.columns if c not in ("value", "uncertainty", "source", "how")]
    assert not table.duplicated(keys).any()
    with pytest.raises(ValueError, match=r"'fig3'; there are diva_fig2, diva_settings, diva_tables"):
        published.load("fig3")


def test_readings_by_eye_say_how_sure():
    table = published.load("diva_fig2")
    assert (table.how == "read by eye").all() and (table.uncertainty > 0).all()
    shares = table[table.panel != "effective_rank_increment_pct"]
    assert shares.value.between(0, 1).all() and table.layer.between(0, 23).all()
    assert table[table.panel == "effective_rank_increment_pct"].value.between(40, 80).all()
    assert table.groupby("panel").series.nunique().to_dict() == {
        "gradient_conflict": 2, "reconstruction_residual": 3, "effective_rank_increment_pct": 3, "high_frequency_energy_ratio": 2,
    }  # fmt: skip


def test_tables_name_themselves():
    table = published.load("diva_tables")
    assert (table.how == "printed").all()
    assert (table.source == "DIVA Table " + table.table.astype(str)).all()
    base = table[(table.table == 1) & (table.config == "base")]
    assert base.groupby("model").size().to_dict() == {"Liquid": 8, "Nexus-Gen": 8, "Show-o": 8}


def test_settings_are_of_three_models_and_two_stages():
    table = published.load("diva_settings")
    wide = table.query("stage != 'both'").pivot(index=["stage", "model"], columns="setting", values="value")
    assert len(wide) == 6 and wide.notna().all().all() and (wide.per_device_train_batch_size == 6).all()
    assert (wide.max_steps > wide.warmup_steps).all() and wide.learning_rate["2", "Show-o"] == 3e-5


def cell(table, model, config, metric="GenEval"):
    rows = published.load("diva_tables").query("table == @table and model == @model and config == @config and metric == @metric")
    return f"{rows.value.item():.2f}"


def test_disagreements_are_in_the_tables():
    known = published.disagreements().set_index("what")
    assert (known.value_a != known.value_b).all() and known.notna().all().all() and known.index.is_unique
    for config, first, second in (("base", 1, 2), ("DIVA", 1, 2), ("DIVA", 3, 4)):
        row = known.loc[f"GenEval of Show-o, {config}"]
        name = {3: "DIVA Mixed 200K", 4: "lambda_uni=0.6"}
        assert row.value_a == cell(first, "Show-o", name.get(first, config))
        assert row.value_b == cell(second, "Show-o", name.get(second, config))
    assert known.loc["GenEval of Liquid, DIVA"].value_a == cell(1, "Liquid", "DIVA")


@pytest.mark.parametrize("config", ["base", "DIVA"])
def test_geneval_is_not_the_mean_of_its_categories(config):
    """GenEval's overall score is by definition the mean of its six categories."""
    table = published.load("diva_tables").query("table == 9 and config == @config")
    row = published.disagreements().set_index("what").loc[f"GenEval of Show-o, {config}, against its categories"]
    assert len(table) == 6 and row.value_b == f"{table.value.mean():.3f}" and row.value_a == cell(1, "Show-o", config)


@pytest.mark.parametrize(("ability", "drawing"), [("understanding", False), ("generation", True)])
def test_the_headlines_are_not_the_mean_of_their_table(ability, drawing):
    table = published.load("diva_tables").query("table == 1")
    wide = table.pivot_table(index=["model", "metric"], columns="config", values="value")
    mine = wide[wide.index.get_level_values("metric").isin(["GenEval", "DPG-Bench", "WISE"]) == drawing]
    known = published.disagreements().set_index("what")
    row = known.loc[f"gain in {ability} (%), over all benchmarks and models"]
    assert len(mine) == (9 if drawing else 15) and row.value_b == f"{100 * (mine.DIVA / mine.base - 1).mean():.2f}"
