"""Rounds of new prompts on scripted models: judged, scored, selected, accounted for."""

from pathlib import Path
from typing import Any

import pytest

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.pipelines.planning import read_status
from stillhouse.pipelines.text import split_of
from stillhouse.storage.manifest import Counts
from stillhouse.workers.endpoint import EndpointModel
from stillhouse.workers.protocols import Failed, TextGenerator
from stillhouse.workers.scripted import Script, ScriptedWorkers
from tests.killed import Killed
from tests.pipelines.conftest import Killer, Line, scripts
from tests.workers.endpoint.server import ScriptedServer, status, truncated
from tests.workers.endpoint.server import says as writes


@pytest.fixture
def asked(line: Line) -> Line:
    line.questions(**{"What is asked": "A"})
    line.tree["expand"] = {"rounds": 2, "prompts_per_round": 8}
    return line


def proposals(line: Line, generator: str) -> list[tuple[Any, ...]]:
    line.run("expand")
    return line.rows(
        "SELECT round, text, status, reason, parent_id IS NOT NULL FROM prompts "
        f"WHERE origin = '{generator}' ORDER BY round, locator"
    )


def says(line: Line, *texts: str | Failed) -> list[str]:
    """What the base continues a list with, in turn; the lists it is given are appended."""
    lists: list[str] = []
    turn = iter(texts * 100)
    made = scripts()
    answers = made["base"].answers

    def answer(prompt: str) -> str | Failed:
        if not prompt.startswith("More of the same kind"):
            return answers(prompt)
        lists.append(prompt)
        return next(turn)

    made["base"] = Script(answer, made["base"].logp)
    line.workers.scripts = made
    return lists


def test_a_proposal_is_new_once(asked: Line) -> None:
    asked.tree["expand"] |= {"generators": ["few_shot"], "prompts_per_round": 4, "rounds": 1}
    asked.pool("seed, one", "seed, two")
    says(asked, " fresh, thing", "fresh,  thing", "What is asked", "seed, one")
    assert proposals(asked, "few_shot") == [
        (1, "fresh, thing", "kept", None, True),
        (1, "fresh, thing", "rejected", "duplicate", True),
        (1, "What is asked", "rejected", "overlaps_evaluation", True),
        (1, "seed, one", "rejected", "duplicate", True),
    ]


def test_a_cut_or_failed_or_empty_proposal(asked: Line) -> None:
    asked.tree["expand"] |= {
        "generators": ["few_shot"],
        "prompts_per_round": 3,
        "rounds": 1,
        "max_new_tokens": 3,
    }
    asked.pool("seed, one")
    says(asked, "four words are cut", Failed("engine: died"), "\nafter a line")
    assert [row[2:4] for row in proposals(asked, "few_shot")] == [
        ("failed", "truncated"),
        ("failed", "engine: died"),
        ("rejected", "empty"),
    ]
    assert asked.entry("expand").counts.failed == 2


def test_a_round_grows_on_the_one_before(asked: Line) -> None:
    asked.tree["expand"] |= {"generators": ["few_shot"], "prompts_per_round": 2}
    asked.pool("seed, one")
    lists = says(asked, "first new", "second new", "third new", "fourth new")
    rows = proposals(asked, "few_shot")
    assert [row[0] for row in rows] == [1, 1, 2, 2]
    assert ["first new" in shown for shown in lists] == [False, False, True, True]
    assert asked.entry("expand").facts["rounds"] == [
        {"round": 1, "generator": "few_shot", "proposed": 2, "kept": 2},
        {"round": 2, "generator": "few_shot", "proposed": 2, "kept": 2},
    ]


def test_every_proposal_is_accounted_for(asked: Line) -> None:
    asked.pool(*(f"part{n}, rest{n}" for n in range(9)), "common, one")
    asked.run("expand")
    counts = asked.entry("expand").counts
    [(proposed,)] = asked.rows("SELECT count(*) FROM prompts WHERE round > 0")
    [(kept,)] = asked.rows("SELECT count(*) FROM selections WHERE round > 0 AND status = 'kept'")
    assert (counts.rows_in, counts.kept) == (proposed, kept)
    assert kept > 0


def test_a_round_that_was_not_enough_is_not_enough_after_a_kill_in_the_next(asked: Line) -> None:
    asked.tree["expand"] |= {"generators": ["few_shot"], "prompts_per_round": 6, "enough": 9}
    asked.pool("seed, one")
    says(asked, *(f"new {number}" for number in range(12)))
    with pytest.raises(Killed):
        asked.run("expand", Killer("round-02-d-select-00000"))
    asked.run("expand")
    assert asked.entry("expand").counts == Counts(rows_in=12, kept=12)


def test_enough_ends_the_rounds(asked: Line) -> None:
    asked.tree["expand"] |= {"generators": ["few_shot"], "prompts_per_round": 6, "enough": 6}
    asked.pool("seed, one")
    says(asked, *(f"new {number}" for number in range(12)))
    asked.run("expand")
    assert asked.entry("expand").counts == Counts(rows_in=6, kept=6)


def test_without_seeds_nothing_is_made(asked: Line) -> None:
    asked.tree["data"]["heldout_percent"] = 50
    asked.pool(next(f"part {n}" for n in range(99) if split_of(f"part {n}", 50) == "heldout"))
    asked.run("expand")
    assert asked.entry("expand").counts.rows_in == 0
    assert asked.rows("SELECT count(*) FROM prompts WHERE round > 0") == [(0,)]


def test_no_rounds(asked: Line) -> None:
    asked.tree["expand"] = {"rounds": 0}
    asked.pool("seed, one")
    asked.run("expand")
    assert asked.entry("expand").counts.rows_in == 0


def test_a_heldout_prompt_is_no_seed(asked: Line) -> None:
    asked.tree["data"]["heldout_percent"] = 50
    asked.tree["expand"] |= {"rounds": 1}
    asked.pool(*(f"part{n}, rest{n}" for n in range(20)))
    asked.run("expand")
    parents = asked.rows(
        "SELECT DISTINCT p.split FROM prompts c JOIN prompts p ON c.parent_id = p.prompt_id"
    )
    assert parents == [("train",)]


def test_seeds_alone_start_the_rounds(asked: Line) -> None:
    """No pool: names and forms of the seeds make every other prompt there is."""
    texts = [f"Which {fact} does {name} have?" for fact, name in (("port", "Ada"), ("team", "Bob"))]
    asked.tree["data"]["pool"] = []
    asked.tree["data"]["seeds"] = [
        {"ref": asked.jsonl("seeds", ({"prompt": text} for text in texts))}
    ]
    asked.tree["expand"] |= {"generators": ["mutate"], "rounds": 1}
    made = [row[1] for row in proposals(asked, "mutate")]
    assert sorted(made) == ["Which port does Bob have?", "Which team does Ada have?"]
    assert asked.rows("SELECT DISTINCT role FROM prompts ORDER BY 1") == [("generated",), ("seed",)]


def test_what_was_not_selected_lends_names(asked: Line) -> None:
    asked.tree["expand"] |= {"generators": ["mutate"], "rounds": 1}
    asked.pool("where is Ada now", "where is Bob now", "where is Cyd now common")
    asked.tree["data"]["controls"] = [
        {"ref": asked.jsonl("controls", [{"prompt": "where is Dan now"}])}
    ]
    assert [row[1] for row in proposals(asked, "mutate")] == []
    asked.pool("where is Ada now", "where is Bob today", "common where is Cyd now")
    made = {row[1] for row in proposals(asked, "mutate")}
    assert made == {"where is Bob now", "where is Ada today"}


@pytest.mark.parametrize("model", ["target", "specialist", "another"])
def test_other_models_write_too(asked: Line, model: str) -> None:
    made = scripts()
    for name in ("target", "another", "base#adapter"):
        answers = made[name].answers if name == "base#adapter" else str

        def answer(prompt: str, name: str = name, answers: Any = answers) -> str:
            return f"by {name}" if prompt.startswith("More of") else answers(prompt)

        made[name] = Script(answer, made[name].logp)
    asked.workers.scripts = made
    asked.pool("seed, one")
    asked.tree["expand"] |= {
        "generators": [{"kind": "few_shot", "model": model}],
        "rounds": 1,
        "prompts_per_round": 1,
    }
    by = "base#adapter" if model == "specialist" else model
    assert [row[1] for row in proposals(asked, f"few_shot:{model}")] == [f"by {by}"]


def test_generators_share_a_round(asked: Line) -> None:
    asked.pool(*(f"part{n}, rest{n}" for n in range(9)))
    asked.tree["expand"] |= {
        "rounds": 1,
        "prompts_per_round": 10,
        "generators": [{"kind": "mutate", "share": 3}, "few_shot"],
    }
    asked.run("expand")
    counts = asked.rows(
        "SELECT origin, count(*) FROM prompts WHERE round > 0 GROUP BY 1 ORDER BY 1"
    )
    assert counts == [("few_shot", 2), ("mutate", 8)]  # 2.5 and 7.5: a tie goes to the first


def test_rounds_say_what_they_brought(asked: Line) -> None:
    asked.tree["expand"] |= {"generators": ["few_shot"], "prompts_per_round": 3}
    asked.pool("seed, one", "common, two")
    says(asked, "new", "new", "common", "of four words here", "new", "last one")
    asked.run("expand")
    columns = "round, proposed, duplicates, new, kept, kept_so_far, answers, new_answers"
    assert asked.rows(f"SELECT {columns} FROM rounds ORDER BY round") == [
        (0, 2, 0, 2, 1, 1, 1, 1),
        (1, 3, 1, 2, 1, 2, 2, 1),
        (2, 3, 1, 2, 2, 4, 2, 0),
    ]
    status = read_status(asked.runner().folder)
    assert [row.round for row in status.rounds] == [0, 1, 2]
    assert [row.gap_p50 for row in status.rounds] == pytest.approx([0.95, 0.95, 1.9])


def test_a_run_killed_in_a_round_says_the_same_of_it(asked: Line) -> None:
    asked.tree["expand"] |= {"prompts_per_round": 6}
    asked.pool(*(f"part{n}, rest{n}" for n in range(9)))
    with pytest.raises(Killed):
        asked.run("expand", Killer("round-02-e-coverage"))
    before = asked.rows("SELECT * FROM rounds ORDER BY round")
    asked.run("expand")
    assert asked.rows("SELECT * FROM rounds ORDER BY round") == before


class AtAnEndpoint(ScriptedWorkers):
    """Scripted models, and a real client of whatever server a recipe names; it never sleeps."""

    def endpoint(self, config: EndpointConfig, spending: Path) -> TextGenerator:
        return EndpointModel(config, spending, sleep=lambda seconds: None)


def test_an_endpoint_costs_rows_and_never_the_run(asked: Line) -> None:
    asked.pool("seed, one")
    script = [
        writes("- fresh text"),
        status(429),
        status(500),
        truncated,
        writes(""),
        writes("another text"),
        status(400),
    ]
    with ScriptedServer(script, writes("")) as server:
        endpoint = {"url": server.url, "model": "big", "retries": 4, "concurrency": 1}
        asked.tree["expand"] |= {
            "generators": [{"kind": "few_shot", "endpoint": endpoint | {"max_tokens_spent": 9000}}],
            "prompts_per_round": 4,
            "rounds": 1,
        }
        asked.workers = AtAnEndpoint(asked.workers.scripts)
        rows = proposals(asked, "few_shot:big")
        sent = server.requests
    assert [row[1:3] for row in rows] == [
        ("fresh text", "kept"),
        ("another text", "kept"),
        ("", "failed"),
        ("", "failed"),
    ]
    assert [str(row[3]).partition(":")[0] for row in rows[2:]] == ["endpoint", "empty"]
    assert "Write one more of the same kind" in sent[0].prompt
    assert asked.entry("expand").counts.failed == 2
    [spending] = asked.runner().folder.logs.glob("spending-endpoint_*.jsonl")
    assert spending.read_text().count("\n") == 2 * len(sent)  # before each request, and after
