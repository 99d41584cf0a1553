"""Numbers stand in the right row and column of every table, and no text of a model breaks one."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpa_ds.data.sources import ClientInfo
from dpa_ds.evaluation.answers import Answer, Instance
from dpa_ds.evaluation.layout import escape, markdown_table, short_names
from dpa_ds.evaluation.statistics import summarize
from dpa_ds.evaluation.tables import client_floor, markdown_report, terminal_table

METRICS = ("rouge1", "rougeL", "exact_match", "chrf")
FLAN = (
    "coreference",
    "entailment",
    "linguistic_acceptability",
    "paraphrase",
    "question_classification",
    "structure_to_text",
    "text_formatting",
    "word_disambiguation",
)


def score_of(client: int, place: int) -> float:
    """A score that says where it belongs: 30 + 2 x client + task / 10."""
    return 30 + 2 * client + place / 10


def make_summary(
    num_clients: int, tasks: Sequence[str], unseen: Sequence[str] = (), floor: float = 20.0
) -> dict[str, Any]:
    """Client k trained on seen task k (modulo their number); floors: copy, then 1 less constant, no first option."""
    seen = [task for task in tasks if task not in unseen]
    own = [seen[k % len(seen)] for k in range(num_clients)]

    def by_metric(value: float) -> dict[str, float]:
        return {metric: value + place for place, metric in enumerate(METRICS)}

    def spread(value: float) -> dict[str, dict[str, float]]:
        return {m: {"mean": v, "low": v - 3, "high": v + 4} for m, v in by_metric(value).items()}

    def mean(client: int, of: Sequence[str]) -> float:
        return sum(score_of(client, tasks.index(task)) for task in of) / len(of)

    clients = [
        {
            "client": k,
            "label": f"client_{k} {own[k]}",
            "own_tasks": [own[k]],
            "scores": {task: spread(score_of(k, place)) for place, task in enumerate(tasks)},
            "alpha": {
                task: {
                    "mean": 0.4 + 0.1 * (task == own[k]),
                    "min": 0.1,
                    "q10": 0.2,
                    "median": 0.4,
                    "q90": 0.6,
                    "max": 0.7,
                }
                for task in tasks
            },
            "P": by_metric(mean(k, [own[k]])),
            "TTP": by_metric(mean(k, seen)),
            "UNSEEN": by_metric(mean(k, unseen)) if unseen else None,
        }
        for k in range(num_clients)
    ]

    def overall(quantity: str) -> dict[str, dict[str, float]]:
        values = spread(sum(client[quantity]["rouge1"] for client in clients) / num_clients)
        return {metric: {**value, "standard_error": 1.25} for metric, value in values.items()}

    example = {"client": 0, "task": tasks[0], "row": 3, "reference": "yes", "alpha": 0.5, "rouge1": 66.7}
    return {
        "metrics": list(METRICS),
        "num_answers": 10 * num_clients * len(tasks),
        "num_instances": 10 * len(tasks),
        "tasks": [
            {
                "task": task,
                "num_instances": 10,
                "clients": [k for k in range(num_clients) if own[k] == task],
                "constant_answer": f"yes | {task}",
                "floors": {"constant": by_metric(floor - 1), "copy": by_metric(floor), "first_option": None},
            }
            for task in tasks
        ],
        "clients": clients,
        "P": overall("P"),
        "TTP": overall("TTP"),
        "UNSEEN": overall("UNSEEN") if unseen else None,
        "floors": {"P": by_metric(floor), "TTP": by_metric(floor)},
        "examples": {
            "best": [{**example, "instruction": "a | b\nor `c`?", "answer": "x" * 300}],
            "worst": [{**example, "instruction": "q", "answer": ""}],
        },
    }


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Every table as its rows of cells, read as GitHub does: a pipe behind a backslash does not end a cell."""
    tables: list[list[list[str]]] = [[]]
    for line in text.split("\n"):
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
            assert (cells[0], cells[-1]) == ("", "")
            tables[-1].append(cells[1:-1])
        elif tables[-1]:
            tables.append([])
    for table in tables:
        assert len({len(row) for row in table}) <= 1, table
    return [[table[0], *table[2:]] for table in tables if table]


def shown(cell: str) -> str:
    """What a reader sees of a cell that `escape` made."""
    return re.sub(r"\\(.)", r"\1", cell.replace("<br>", "\n"))


def table_with(text: str, header: str) -> list[list[str]]:
    return next(table for table in markdown_tables(text) if header in table[0])


def test_terminal_table_has_each_score_in_its_place() -> None:
    lines = terminal_table(make_summary(8, FLAN)).splitlines()
    header = next(line for line in lines if line.startswith("client "))
    assert header.split()[1:] == [
        "coreference", "entailment", "lingu_accep", "paraphrase", "quest_class", "str_to_text", "text_format", "word_disamb",
        "P", "TTP",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 160
    for k in range(8):
        line = next(line for line in lines if line.startswith(f"client_{k}"))
        cells = line.split()[2:]
        assert cells[:8] == [f"{score_of(k, place):.1f}{'*' if place == k else ''}" for place in range(8)]
        assert [float(cell) for cell in cells[8:]] == pytest.approx([score_of(k, k), score_of(k, 0) + 0.35], abs=0.051)
    place = next(number for number, line in enumerate(lines) if line.startswith("best floor"))
    assert lines[place].split()[2:] == ["20.0"] * 10
    assert lines[place + 1].split() == ["copy"] * 8
    assert " ".join(lines[-2].split()) == "P (own tasks) 37.4 95 % interval [34.4, 41.4] floor 20.0"
    assert lines[-1].split()[0] == "TTP"


def test_numbers_of_a_column_stand_below_each_other() -> None:
    lines = terminal_table(make_summary(8, FLAN, floor=38.0)).splitlines()
    rows = [line for line in lines if line.startswith(("client_", "best floor"))]
    assert len({tuple(match.start() for match in re.finditer(r"\.", line)) for line in rows}) == 1


def test_scores_below_their_floor_are_marked() -> None:
    summary = make_summary(3, FLAN[:3], floor=32.1)
    summary["P"]["rouge1"]["mean"] = 31.0
    lines = terminal_table(summary).splitlines()
    rows = {line.split()[0]: line.split()[2:] for line in lines if line.startswith("client_")}
    assert rows["client_0"] == ["30.0*!", "30.1!", "30.2!", "30.0!", "30.1!"]
    assert rows["client_1"] == ["32.0!", "32.1*", "32.2", "32.1", "32.1"]  # the floor itself is not below it
    assert rows["client_2"] == ["34.0", "34.1", "34.2*", "34.2", "34.1"]
    assert any(line.split()[:4] == ["P", "(own", "tasks)", "31.0!"] for line in lines)
    assert any("! below its floor" in line and "* own task" in line for line in lines)


def test_unseen_tasks_have_a_column_a_line_and_a_floor_of_their_own() -> None:
    summary = make_summary(2, FLAN[:3], unseen=FLAN[2:3])
    summary["tasks"][2]["floors"]["copy"]["rouge1"] = 60.0
    lines = terminal_table(summary).splitlines()
    assert lines[2].split()[-3:] == ["P", "TTP", "UNSEEN"]
    assert lines[3].split()[-3:] == ["30.0", "30.1", "30.2!"]
    assert [cell[-1] for cell in lines[4].split()[-3:]] == ["1", "0", "!"]
    assert lines[-1].startswith("UNSEEN")
    assert lines[-1].endswith("floor 60.0")


def test_metric_can_be_chosen() -> None:
    text = terminal_table(make_summary(1, FLAN[:1]), "chrf")
    assert text.startswith("chrF")
    assert "33.0*" in text
    assert "rouge" not in text.lower()


def test_clients_and_tasks_that_were_not_asked_leave_a_gap() -> None:
    summary = make_summary(2, FLAN[:2])
    del summary["clients"][0]["scores"]["coreference"], summary["clients"][0]["alpha"]["coreference"]
    summary["clients"][0]["P"] = None
    row = next(line for line in terminal_table(summary).splitlines() if line.startswith("client_0"))
    assert row.split()[2:5] == ["-", "30.1", "-"]
    assert table_with(markdown_report(summary, "t", {}, []), "TTP")[1][1:4] == ["-", "30.1 [27.1, 34.1]", "-"]


def test_one_client_with_one_task() -> None:
    text = terminal_table(make_summary(1, ["paraphrase"]))
    assert "1 client, 1 task, 10 instances" in text
    assert "not shown" not in text
    assert "client_0 paraphrase  " in text
    assert "30.0*" in text


def test_many_clients_and_tasks_are_cut_and_continued_below() -> None:
    text = terminal_table(make_summary(25, [f"super_natural_task{number:03d}_text" for number in range(30)]))
    lines = text.splitlines()
    assert "not shown: 5 of 25 clients and 10 of 30 tasks" in lines
    assert max(map(len, lines)) <= 160
    headers = [line.split()[1:] for line in lines if line.startswith("client ")]
    names = [name for header in headers for name in header]
    assert len(headers) == 3
    assert len(set(names)) == len(names) == 22
    rows = [line for line in lines if "t004_t" in line and not line.startswith("client ")]
    cells = [cell for row in rows for cell in row.split()[2:]]
    assert cells[:20] == [f"{score_of(4, place):.1f}{'*' if place == 4 else ''}" for place in range(20)]
    full = table_with(markdown_report(make_summary(25, [f"t{n}" for n in range(30)]), "t", {}, []), "TTP")
    assert (len(full), len(full[0])) == (25 + 2, 1 + 30 + 2)


def test_report_has_every_number_once_more() -> None:
    text = markdown_report(make_summary(3, FLAN[:4], unseen=FLAN[3:4]), "run *a*", {"lambda": "0.5"}, ["heat map.png"])
    assert text.startswith("# run \\*a\\*\n")
    assert "![heat map.png](heat%20map.png)" in text
    settings, overall, scores, rouge_l, exact, chrf, floors, alpha, grid, best, worst = markdown_tables(text)
    assert settings == [["setting", "value"], ["lambda", "0.5"]]
    assert overall[1] == ["P, own tasks", "ROUGE-1", "32.1", "[29.1, 36.1]", "1.25", "20.0"]
    assert [row[1] for row in overall[1:]] == ["ROUGE-1", "ROUGE-L", "exact match", "chrF"] * 3
    assert scores[0] == ["client", *map(escape, FLAN[:4]), "P", "TTP", "UNSEEN"]
    for k in range(3):
        expected = [
            f"{f'**{score_of(k, t):.1f}**' if t == k else f'{score_of(k, t):.1f}'} "
            f"[{score_of(k, t) - 3:.1f}, {score_of(k, t) + 4:.1f}]"
            for t in range(4)
        ]
        assert scores[1 + k][1:5] == expected
        for offset, table in enumerate((rouge_l, exact, chrf), start=1):
            values = [f"{score_of(k, t) + offset:.1f}" for t in range(4)]
            assert [cell.strip("*") for cell in table[1 + k][1:5]] == values
    assert chrf[-1] == ["best floor", *["23.0 copy"] * 4, "23.0", "23.0", "23.0"]
    assert floors[1] == ["coreference", "yes \\| coreference", "19.0", "20.0", "-"]
    assert alpha[1] == ["all clients", "0.500", "0.100 to 0.700", "0.400", "0.100 to 0.700"]
    assert alpha[-1] == ["task paraphrase", "-", "-", "0.400", "0.100 to 0.700"]
    assert grid[2] == [
        "client\\_1 entailment",
        *["0.400 [0.200, 0.600]", "0.500 [0.200, 0.600]"],
        *["0.400 [0.200, 0.600]"] * 2,
    ]
    assert best[1][:6] == ["66.7", "0", "0.500", "3", "coreference", "a \\| b<br>or \\`c\\`?"]
    assert best[1][7] == "x" * 199 + "…"
    assert worst[1][7] == "*(empty)*"


def test_alpha_is_pooled_over_instances() -> None:
    summary = make_summary(2, FLAN[:3])
    summary["tasks"][2]["num_instances"] = 30
    summary["clients"][0]["alpha"]["linguistic_acceptability"].update(mean=0.8, max=0.9)
    row = table_with(markdown_report(summary, "t", {}, []), "answers of")[2]
    assert row == [
        "client\\_0 coreference",
        "0.500",
        "0.100 to 0.700",
        "0.700",
        "0.100 to 0.900",
    ]  # (10 x 0.4 + 30 x 0.8) / 40


def test_a_fixed_alpha_is_one_line() -> None:
    summary = make_summary(2, FLAN[:2])
    for client in summary["clients"]:
        client["alpha"] = {
            task: dict.fromkeys(("mean", "min", "q10", "median", "q90", "max"), 0.3) for task in client["alpha"]
        }
    text = markdown_report(summary, "t", {}, [])
    assert "Alpha is 0.300 for every answer." in text
    assert "answers of" not in text


def test_tables_show_what_summarize_makes() -> None:
    instances = [Instance(task, row, f"{task} {row}?", "yes" if row else "no") for task in FLAN[:3] for row in range(4)]
    clients = [ClientInfo(k, f"client_{k}", FLAN[k : k + 2]) for k in range(2)]
    answers = [Answer(c.client, i.task, i.row, 0.5, "yes") for c in clients for i in instances]
    summary = summarize(instances, answers, clients)
    for quantity in ("P", "TTP"):
        floors = [client_floor(summary, client, quantity, "rouge1") for client in summary["clients"]]
        assert sum(floor or 0.0 for floor in floors) / 2 == pytest.approx(summary["floors"][quantity]["rouge1"])
    assert "75.0*  " in terminal_table(summary)  # the constant answer is its own floor
    assert "**75.0** [" in markdown_report(summary, "t", {}, [])


@given(st.text(max_size=300))
def test_any_text_is_one_cell_that_shows_it(text: str) -> None:
    cell = escape(text)
    ((_, row),) = markdown_tables(markdown_table(["a", "b"], [[cell, "end"]]))
    assert row[1] == "end"
    expected = text.strip() if len(text.strip()) <= 200 else f"{text.strip()[:199]}…"
    if expected:
        assert shown(row[0]) == "\n".join(expected.splitlines()).strip()
        assert "<" not in re.sub(r"\\.", "", cell.replace("<br>", ""))


@given(st.lists(st.text("ab1_ ", max_size=30), max_size=30), st.integers(8, 24))
def test_short_names_are_short_and_different(names: list[str], limit: int) -> None:
    short = short_names(names, limit)
    assert len(set(short)) == len(names)
    assert all(0 < len(name) <= limit for name in short)


def test_short_names_keep_what_tells_them_apart() -> None:
    assert short_names(["paraphrase", "linguistic_acceptability"], 11) == ["paraphrase", "lingu_accep"]
    assert short_names(["instructions_task041", "instructions_task042"], 11) == ["instr_ta041", "instr_ta042"]
    assert short_names(["translation_germanic", "translation_germany"], 11) == ["trans_ger~1", "trans_ger~2"]
    ambiguous = terminal_table(make_summary(1, ["translation_germanic", "translation_germany"]))
    assert [line for line in ambiguous.splitlines() if " = " in line] == [
        "trans_ger~1 = translation_germanic",
        "trans_ger~2 = translation_germany",
    ]
