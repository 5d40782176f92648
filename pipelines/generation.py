"""One task of a round's proposals: a generator makes some new prompts."""

from collections.abc import Sequence
from typing import Any

from stillhouse.configs.expand import GeneratorConfig
from stillhouse.pipelines.proposals import FewShot, Proposal, few_shot, mutate
from stillhouse.pipelines.raw_rows import mark_too_long
from stillhouse.pipelines.rounds import draw_seeds, draw_unselected
from stillhouse.pipelines.stage import Part, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.text import normalise, render
from stillhouse.storage.manifest import Counts
from stillhouse.storage.records import RawRecord, content_id
from stillhouse.workers.protocols import Completion, Decoding, Failed, ModelSpec

# Proposals a task makes: a shard, and so part of what decides the text. A mutator's cost little.
CHUNK = {"few_shot": 32, "mutate": 1024}


def proposal_tasks(run: StageRun, number: int, prefix: str) -> list[Task]:
    """A round's proposals, shared by the generators; the largest remainders take what is over.

    In the order of the generators: each model is loaded once a round.
    """
    config = run.recipe.expand
    tasks: list[Task] = []
    first = 0
    for place, count in enumerate(_shares(config.prompts_per_round, config.generators)):
        kind = config.generators[place].kind
        for start in range(0, count, CHUNK[kind]):
            arguments: dict[str, Any] = {
                "do": "propose",
                "generator": place,
                "round": number,
                "first": first + start,
                "start": start,
                "count": min(CHUNK[kind], count - start),
            }
            name = f"{prefix}-a-{place:02d}-{kind}-{start // CHUNK[kind]:05d}"
            tasks.append(Task(name, arguments=arguments))
        first += count
    return tasks


def _shares(total: int, generators: Sequence[GeneratorConfig]) -> list[int]:
    whole = sum(generator.share for generator in generators)
    exact = [total * generator.share / whole for generator in generators]
    counts = [int(value) for value in exact]
    over = sorted(range(len(exact)), key=lambda place: (counts[place] - exact[place], place))
    for place in over[: total - sum(counts)]:
        counts[place] += 1
    return counts


def propose(run: StageRun, task: Task) -> Part:
    """Make a task's proposals, as rows of `raw`."""
    generator = run.recipe.expand.generators[int(task.arguments["generator"])]
    number, count = int(task.arguments["round"]), int(task.arguments["count"])
    # Tasks of a mutator take pieces of one stream, so that none repeats another's.
    drawn = task.name if generator.kind == "few_shot" else task.name.rpartition("-")[0]
    seed = f"{run.recipe.expand.seed}/{drawn}"
    seeds = draw_seeds(run, number, seed)
    tokens = 0
    proposals: list[Proposal | Failed] = []
    if seeds and generator.kind == "mutate":
        further = draw_unselected(run, number, seed)
        proposals = [*mutate(seeds, count, seed, further, int(task.arguments["start"]))]
    elif seeds:
        lists = few_shot(seeds, run.recipe.expand.shots, count, seed)
        endpoint = generator.endpoint
        chats = endpoint is not None and endpoint.api == "chat"
        prompts = [shots.instruction if chats else shots.prompt for shots in lists]
        answers = _continued(run, generator, prompts, seed)
        proposals = [_proposal(*both) for both in zip(lists, answers, strict=True)]
        made = (answer for answer in answers if isinstance(answer, Completion))
        tokens = sum(answer.prompt_tokens + answer.tokens for answer in made)
    raw = [_raw(run, task, generator.name, *both) for both in enumerate(proposals)]
    return Part({"raw": mark_too_long(run, raw)}, Counts(), tokens)


def _continued(
    run: StageRun, generator: GeneratorConfig, prompts: Sequence[str], seed: str
) -> list[Completion | Failed]:
    """Let a model continue lists. By default the base: a specialist that answers shortly collapses
    when it is asked to write prompts."""
    config = run.recipe.expand
    how = Decoding(
        config.max_new_tokens,
        stop=("\n",),
        temperature=config.temperature,
        seed=int(content_id("seed", seed)[-8:], 16),
        batch_size=config.batch_size,
    )
    if generator.endpoint is not None:
        # Of the run and not of the stage's key: a raised budget goes on from what was spent.
        asked = content_id("endpoint", generator.endpoint.url, generator.endpoint.model)
        spending = run.folder.logs / f"spending-{asked}.jsonl"
        return run.workers.endpoint(generator.endpoint, spending).propose(prompts, how)
    match generator.model:
        case "base":
            return run.workers.pair(run.specialist, run.base).propose(prompts, how)
        case "specialist":
            return run.workers.pair(run.specialist, run.base).answer(prompts, how)
        case "target":
            return run.workers.model(ModelSpec(run.recipe.models.target)).answer(prompts, how)
        case ref:
            return run.workers.model(ModelSpec(ref)).answer(prompts, how)


def _proposal(shots: FewShot, answer: Completion | Failed) -> Proposal | Failed:
    if isinstance(answer, Failed):
        return answer
    if answer.finish == "length":
        return Failed("truncated")
    return Proposal(shots.parent_id, answer.text.lstrip("- "))


def _raw(
    run: StageRun, task: Task, generator: str, index: int, item: Proposal | Failed
) -> RawRecord:
    text = normalise(item.text) if isinstance(item, Proposal) else ""
    failure = item.reason if isinstance(item, Failed) else None
    reason = failure or (None if text else "empty")
    return RawRecord(
        kind="generated",
        source=int(task.arguments["round"]),
        row=int(task.arguments["first"]) + index,
        text=text,
        rendered=render(run.recipe.data.template.prompt, text),
        origin=generator,
        reference=None,
        parent_id=item.parent_id if isinstance(item, Proposal) else None,
        locator=f"{task.name}:{index}",
        status="kept" if reason is None else "failed" if failure else "rejected",
        reason=reason,
    )
