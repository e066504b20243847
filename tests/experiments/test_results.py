"""Results from records that were made up, so that every number is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from made_up_records import (
    GAIN,
    NOISE,
    SEEDS,
    distance_to,
    experiment_document,
    falling_loss,
    made_up_board,
    row_of,
)
from rankwise.errors import ConfigError
from rankwise.experiments.board import Board
from rankwise.experiments.cells import Cell
from rankwise.experiments.config import make_experiment
from rankwise.experiments.result_tables import markdown, save_results, terminal_table
from rankwise.experiments.results import Results, make_results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return make_results(made_up_board(tmp_path_factory.mktemp("results")))


def test_rows_hold_mean_interval_and_tests(results: Results) -> None:
    assert results.finished == results.cells == 2 * 3 * 3 * (3 + 5)
    row = row_of(results, "water-fill")
    expected = [8 + n - g for n, g in zip(NOISE, GAIN, strict=True)]
    assert list(row.values.values()) == pytest.approx(expected)
    assert row.summary.mean == pytest.approx(sum(expected) / 5)
    assert row.learning_rate == 1e-2
    assert not row.at_edge
    assert row.rates["0.001"] == 3.0 and math.isnan(row.rates["0.1"])
    differences = [-gain for gain in GAIN]
    test = stats.ttest_1samp(differences, 0.0)
    assert row.against.difference.mean == pytest.approx(-0.5)
    assert row.against.t_p == pytest.approx(test.pvalue)
    low, high = test.confidence_interval()
    assert (row.against.difference.low, row.against.difference.high) == pytest.approx((low, high))
    assert row.against.wilcoxon_p == 0.0625
    assert row.against.wins == 5
    # the smaller p of two in its table, and the smallest of two methods at six tables
    assert row.against.holm_p == pytest.approx(2 * test.pvalue)
    assert row.holm_all == pytest.approx(12 * test.pvalue)
    assert row.others["perplexity"]["0"] == pytest.approx(math.exp(expected[0]))
    assert row.peak_memory_mib == 104.0


def test_every_seed_is_listed_with_the_median_and_the_worst(results: Results) -> None:
    values = list(row_of(results, "lora").values.values())
    text = markdown(results)
    section = text.split("## Seed by seed: one, r = 8\n")[1].split("\n## ")[0]
    cells = next(line for line in section.splitlines() if line.startswith("| lora |")).split(" | ")
    assert section.splitlines()[1] == "| method | median | worst | 0 | 1 | 2 | 3 | 4 |"
    assert cells[1:3] == [f"{sorted(values)[2]:.4f}", f"{max(values):.4f}"]  # a loss
    assert cells[3:] == [*(f"{v:.4f}" for v in values[:4]), f"{values[4]:.4f} |"]


def test_ranks_and_blocks_are_listed_where_modules_differ(tmp_path: Path) -> None:
    board = made_up_board(tmp_path)
    for path in board.folder.glob("one--water-fill--r8--*seed[01]*.json"):
        planned = {"ranks": {"x": 4, "y": 9}, "blocks": {"x": 2, "y": 32}}
        path.write_text(json.dumps(json.loads(path.read_text()) | planned))
    results = make_results(Board(board.config))
    ranks, blocks = (getattr(row_of(results, "water-fill"), name) for name in ("ranks", "blocks"))
    # two seeds of five have two modules, the others one of rank 8 and y left out
    assert (ranks.mean, ranks.min, ranks.max) == (pytest.approx(50 / 10), 0, 9)
    assert (blocks.mean, blocks.min, blocks.max) == (17, 2, 32)
    text = markdown(results)
    assert "## Ranks and blocks over the modules: one, r = 8\n" in text
    assert "| water-fill | 5.0 (0 to 9) | 17.0 (2 to 32) |" in text
    assert "modules: one, r = 4" not in text  # equal ranks, no blocks
    assert row_of(results, "lora").blocks is None


def test_what_is_not_matched_or_not_available_is_said(results: Results) -> None:
    assert row_of(results, "ia3").matched is False
    assert row_of(results, "nola").status.startswith("not available")
    for text in (terminal_table(results), markdown(results)):
        assert "ia3: not matched, -80.0% of the budget" in text
        assert "nola: not available: no kept library" in text
        assert "1,600†" in text


def test_a_size_that_differs_between_seeds_is_said_with_both_ends(tmp_path: Path) -> None:
    board = made_up_board(tmp_path)
    (cell, *_) = board.finals(next(g for g in board.groups if g.method.name == "lora"))
    document = json.loads(board.path(cell).read_text())
    document["size"] |= {"parameters": document["size"]["budget"] * 95 // 100, "matched": False}
    board.path(cell).write_text(json.dumps(document))
    text = terminal_table(make_results(Board(board.config)))
    assert "lora: not matched, -5.0% to +0.0% of the budget" in text


def test_mean_ranks_and_pooled_comparisons(results: Results) -> None:
    assert results.mean_ranks["8"] == {"water-fill": 1.0, "lora": 2.0, "ia3": 3.0}
    pooled = next(p for p in results.pooled if p.rank == 8 and p.against.method == "water-fill")
    assert pooled.tasks == ["one", "two"]
    assert pooled.against.difference.count == 10
    assert pooled.against.t_p == pytest.approx(
        stats.ttest_1samp([-gain for gain in GAIN] * 2, 0.0).pvalue
    )
    assert "| water-fill | -0.5000 |" in markdown(results)
    assert "10 of 10" in markdown(results)


def test_the_one_number(results: Results) -> None:
    trade = next(t for t in results.trades if t.task == "one" and t.label == "water-fill")
    assert trade.target == pytest.approx(8 + sum(NOISE) / 5)
    # from 9.5 at 4,000 to 7.5 at 8,000 parameters, 8 lies three quarters of the way
    assert trade.needed == pytest.approx(4000 * 2**0.75)
    assert trade.low is not None and trade.high is not None
    assert trade.low < trade.needed < trade.high < 8000
    assert "parameters for the result of lora at r = 8" in markdown(results)


def test_results_survive_as_json(results: Results, tmp_path: Path) -> None:
    paths = save_results(results, tmp_path)
    assert [path.name for path in paths] == ["results.md", "results.json"]
    document = json.loads(paths[1].read_text())
    assert document["rows"][1]["rates"] == {"0.001": 3.0, "0.01": 2.0, "0.1": None}
    assert document["experiment"]["budgets"] == [4, 8, 16]
    assert document["trades"][0]["label"] == "water-fill"
    assert document["hardware"] == ["a fast one"]
    assert "**2.0000**" in paths[0].read_text()  # the chosen rate in the appendix


def test_a_best_rate_at_the_edge_is_marked(tmp_path: Path) -> None:
    board = made_up_board(tmp_path, learning_rates=[1e-2, 1e-1])
    row = row_of(make_results(board), "lora")
    assert row.at_edge
    assert "0.01!" in terminal_table(make_results(board))


@pytest.mark.parametrize(
    ("best", "extend", "searched", "chosen", "at_edge"),
    [
        (1e-2, 5, [1e-3, 1e-2, 1e-1], 1e-2, False),
        (1e-4, 0, [1e-3, 1e-2, 1e-1], 1e-3, True),
        (1e-4, 1, [1e-4, 1e-3, 1e-2, 1e-1], 1e-4, True),
        (1e-4, 5, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1], 1e-4, False),
        (1e1, 5, [1e-3, 1e-2, 1e-1, 1.0, 1e1], 1.0, False),  # at 10 it diverges
    ],
)
def test_a_search_goes_on_beyond_its_grid(
    tmp_path: Path, best: float, extend: int, searched: list[float], chosen: float, at_edge: bool
) -> None:
    selection = {"extend": extend, "seeds": [100, 101]}
    board = made_up_board(tmp_path, distance_to(best), methods=["lora"], selection=selection)
    row = row_of(make_results(board), "lora")
    assert list(map(float, row.rates)) == searched
    assert (row.learning_rate, row.at_edge) == (chosen, at_edge)
    cells = list(board.cells())
    assert {cell.learning_rate for cell in cells if cell.phase == "final"} == {chosen}
    assert board.total() == len(cells) == 2 * 3 * (2 * len(searched) + len(SEEDS))


@pytest.mark.parametrize(
    ("best", "selection", "searched", "chosen"),
    [
        (1.7e-2, {"refine": 1}, [1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1], 1e-2),
        (3e-2, {"refine": 1}, [1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1], 3.16e-2),
        (1.7e-2, {"refine": 2}, [1e-3, 3.16e-3, 5.62e-3, 1e-2, 1.78e-2, 3.16e-2, 1e-1], 1.78e-2),
        (1e-4, {"refine": 1}, [1e-3, 3.16e-3, 1e-2, 1e-1], 1e-3),  # one neighbour only
        (3e-4, {"refine": 1, "extend": 1}, [1e-4, 3.16e-4, 1e-3, 1e-2, 1e-1], 3.16e-4),
        (8.0, {"refine": 1, "extend": 3}, [1e-3, 1e-2, 1e-1, 3.16e-1, 1.0, 3.16, 1e1], 3.16),
    ],
)
def test_a_search_is_refined_around_its_best_rate(
    tmp_path: Path, best: float, selection: dict[str, Any], searched: list[float], chosen: float
) -> None:
    selection = selection | {"seeds": [100, 101]}
    board = made_up_board(tmp_path, distance_to(best), methods=["lora"], selection=selection)
    row = row_of(make_results(board), "lora")
    assert list(map(float, row.rates)) == searched
    assert row.learning_rate == chosen
    assert row.at_edge == (chosen == 1e-3)
    cells = list(board.cells())
    assert {cell.learning_rate for cell in cells if cell.phase == "final"} == {chosen}
    assert board.total() == len(cells) == 2 * 3 * (2 * len(searched) + len(SEEDS))


def test_of_equal_rates_the_smaller_is_chosen(tmp_path: Path) -> None:
    board = made_up_board(tmp_path, lambda cell: 1.0, methods=["lora"])
    choice = board.choice(board.groups[0])
    assert len(choice.scores) > 1
    assert choice.rate == min(choice.scores)


def test_rates_are_chosen_by_another_metric(tmp_path: Path) -> None:
    board = made_up_board(tmp_path, distance_to(1e-2), methods=["lora"])
    for cell in board.cells():
        record = json.loads(board.path(cell).read_text())
        for evaluation in record["validation"]:
            evaluation["metrics"]["median_loss"] = -evaluation["metrics"]["loss"]
        board.path(cell).write_text(json.dumps(record))
    assert Board(board.config).choice(board.groups[0]).rate == 1e-2
    config = board.config.model_dump(mode="json")
    other = Board(make_experiment(config, ["selection.metric=median_loss"]))
    found = other.choice(other.groups[0])
    assert found.rate in (1e-3, 1e-1)  # the farthest two, alike but for rounding
    assert found.scores[1e-3] == pytest.approx(-math.log(10))
    assert [c.file_name for c in other.search(other.groups[0])] == [
        c.file_name for c in board.search(board.groups[0])
    ]
    heading = "## Learning rates on the validation part: one, r = 4, by median_loss"
    assert heading in markdown(make_results(other)).splitlines()
    unmeasured = Board(make_experiment(config, ["selection.metric=perplexity"]))
    with pytest.raises(ConfigError, match=r"perplexity.*--search measured loss, median_loss on"):
        unmeasured.choice(unmeasured.groups[0])


def test_a_search_names_what_it_serves_besides(tmp_path: Path) -> None:
    board = made_up_board(tmp_path, distance_to(1e-2), methods=["lora", "full"])
    text = markdown(make_results(board))
    assert "The same rates serve one, r = 8 (full); one, r = 16 (full)." in text
    assert text.count("The same rates serve") == 2  # once a task: LoRA has a search at each budget


def test_a_search_that_is_not_over_is_not_refined(tmp_path: Path) -> None:
    selection = {"refine": 1, "seeds": [100]}
    board = made_up_board(tmp_path, distance_to(1e-2), methods=["lora"], selection=selection)
    first = next(board.cells())
    board.path(first).unlink()
    same = [c for c in Board(board.config).cells() if (c.task, c.rank) == (first.task, first.rank)]
    assert [cell.learning_rate for cell in same] == [1e-3, 1e-2, 1e-1]  # and no compared run


def test_seeds_that_diverge_are_named_and_left_out_of_the_mean(tmp_path: Path) -> None:
    def value(cell: Cell) -> float | None:
        broken = cell.method.name == "water-fill" and cell.phase == "final" and cell.seed == 2
        return None if broken else falling_loss(cell)

    results = make_results(made_up_board(tmp_path, value))
    row = row_of(results, "water-fill")
    assert row.diverged == [2]
    assert row.against.difference.count == 4
    assert "water-fill" not in results.mean_ranks["8"]
    assert "water-fill: diverged at seed 2, which the mean leaves out" in terminal_table(results)


def test_a_method_that_diverges_at_every_rate_has_no_final_runs(tmp_path: Path) -> None:
    def value(cell: Cell) -> float | None:
        return None if cell.method.name == "ia3" else falling_loss(cell)

    board = made_up_board(tmp_path, value)
    results = make_results(board)
    assert row_of(results, "ia3").status == "no learning rate of the grid works"
    assert results.finished == results.cells == board.total()


def test_records_of_other_data_are_refused(tmp_path: Path) -> None:
    board = made_up_board(tmp_path)
    path = board.path(next(iter(board.cells())))
    changed = json.loads(path.read_text()) | {"data_fingerprint": "another"}
    path.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="task one: its records were made with different data "):
        make_results(Board(board.config))


def test_what_has_not_begun_is_said_without_empty_tables(tmp_path: Path) -> None:
    results = make_results(Board(make_experiment(experiment_document(tmp_path))))
    assert results.finished == 0
    assert "choosing the learning rate" in terminal_table(results)
    text = markdown(results)
    assert "0 of 144 cells finished" in text
    assert "choosing the learning rate" in text
    assert "| lora |" not in text


def test_the_reference_may_be_another(tmp_path: Path) -> None:
    board = made_up_board(tmp_path, reference={"method": "water-fill", "rank": 4})
    results = make_results(board)
    assert row_of(results, "water-fill").against is None
    assert row_of(results, "lora").against.difference.mean == pytest.approx(0.5)
    assert {t.label for t in results.trades} == {"lora", "ia3"}
    with pytest.raises(ConfigError, match=r"reference\.method='loar'"):
        make_experiment(experiment_document(tmp_path, reference={"method": "loar"}))
    with pytest.raises(ConfigError, match=r"reference\.rank=7 is no budget; known: 4, 8, 16"):
        make_experiment(experiment_document(tmp_path, reference={"rank": 7}))


def test_a_task_on_which_a_method_always_diverged_is_not_left_out_of_its_sum(
    tmp_path: Path,
) -> None:
    def value(cell: Cell) -> float | None:
        final = cell.phase == "final"
        if cell.method.name == "water-fill" and final and cell.task.name == "two":
            return None
        return falling_loss(cell)

    results = make_results(made_up_board(tmp_path, value))
    assert [p for p in results.pooled if p.against.method == "water-fill"] == []
    assert [p for p in results.pooled if p.against.method == "ia3"]


def test_methods_without_a_seed_in_common_are_not_pooled(tmp_path: Path) -> None:
    def value(cell: Cell) -> float | None:
        even = cell.seed % 2 == 0
        if cell.phase == "final" and even == (cell.method.name == "water-fill"):
            return None
        return falling_loss(cell)

    results = make_results(made_up_board(tmp_path, value))
    assert [p for p in results.pooled if p.against.method == "water-fill"] == []
    assert next(p for p in results.pooled if p.against.method == "ia3").against.difference.count
