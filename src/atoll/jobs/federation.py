"""The federation of a run: find the importance of weights where a plan needs it, plan anew, run some rounds, and so on."""

from __future__ import annotations

from collections.abc import Callable

from atoll.adapters.state import AdapterState
from atoll.jobs.accounts import Accounts
from atoll.jobs.crews.crew import CrewOf
from atoll.jobs.crews.local import LocalCrew
from atoll.jobs.job import Job, grown_to, homogeneous, replanned
from atoll.jobs.keeping import Kept
from atoll.jobs.rounds import Accountant, Rounds, run_rounds
from atoll.runs.events import Advised, EventLog, ImportanceFound, PhaseStarted
from atoll.selection.growth import growth_after, growths_of
from atoll.selection.importance import Importance, average, per_cost

Planned = Callable[[Importance | None, Job], None]
"""Called with every new plan's job, and the importance it was made by; None: it was made without."""


def run_federation(
    job: Job, log: EventLog, accounts: Accounts, accountant: Accountant, planned: Planned, crew_of: CrewOf = LocalCrew,
    kept: Kept | None = None,
) -> tuple[Job, AdapterState]:  # fmt: skip
    """All rounds, planned anew as [plan] says; the job as it was planned last, and the common adapter.

    With `kept`, those that are left after it, and then as if they had never been stopped.

    Raises: EdgesLostError where a round gets fewer updates than [federated] min_edges, or nobody could score the weights; ResumeError
    where `kept` is of another plan.
    """
    plan, rounds_asked = job.config.plan, job.config.run.rounds
    warms_up = plan.policy == "fedpipe" and plan.importance != "none" and plan.importance_file is None
    if warms_up and all(edge.warm_up is None for edge in job.edges):
        log.append(Advised("", "no edge has memory for a warm-up with adapters on every weight: all weights count alike"))
        warms_up = False
    stages = [(growth.first_round, growth.num_rounds) for growth in growths_of(job.config)] if plan.policy == "fedadapter" else []
    if warms_up:
        every = plan.refresh or rounds_asked
        stages = [(first, min(every, rounds_asked - first)) for first in range(0, rounds_asked, every)]
    job = _as_planned(job, kept)
    if kept is not None:
        accounts.replan(job)
        planned(kept.standing.importance, job)
    with Rounds(job, job.edges, "federated", log, accountant, crew_of) as rounds:
        if kept is not None:
            rounds.restore(kept.rounds)
        for first, num_rounds in stages or [(0, rounds_asked)]:
            if rounds.num_done == first and warms_up:
                job = _planned_anew(job, rounds, log, accounts, planned)
            elif rounds.num_done == first and first:  # Adapters grow: what a stage adds changes nothing until it is trained.
                job = _go_on_with(grown_to(job, first), None, rounds, accounts, planned)
            if rounds.num_done < first + num_rounds:
                rounds.run(first + num_rounds - rounds.num_done)
        return job, rounds.state


def run_homogeneous(job: Job, log: EventLog, crew_of: CrewOf = LocalCrew) -> tuple[Job, AdapterState, float | None] | None:
    """The comparison: one setting for all edges that can hold it; its job, common adapter and simulated seconds. None where no edge can."""
    other = homogeneous(job)
    if other is None:
        log.append(Advised("", "no edge can hold what [adapter], [train] and the most bits of [plan] say: there is no homogeneous row"))
        return None
    accounts = Accounts(other)
    return other, run_rounds(other, other.edges, "homogeneous", log, accounts, crew_of), accounts.simulated_seconds


def _as_planned(job: Job, kept: Kept | None) -> Job:
    """With the plan that was in force when the run was stopped."""
    if kept is None:
        return job
    if kept.standing.importance is not None:
        job = replanned(job, kept.standing.importance)
    elif job.config.plan.policy == "fedadapter" and (first := growth_after(job.config, kept.round - 1).first_round):
        job = grown_to(job, first)
    kept.check_plan(job)
    return job


def _go_on_with(job: Job, importance: Importance | None, rounds: Rounds, accounts: Accounts, planned: Planned) -> Job:
    rounds.replan(job, job.edges)
    accounts.replan(job)
    planned(importance, job)
    return job


def _planned_anew(job: Job, rounds: Rounds, log: EventLog, accounts: Accounts, planned: Planned) -> Job:
    config = job.config.plan
    log.append(PhaseStarted("warm-up", config.warmup_steps * sum(edge.warm_up is not None for edge in job.edges)))
    asked = rounds.warm_up()
    simulated = accounts.add_warm_up(asked)
    unasked = {edge.name: "its memory does not hold adapters on every weight" for edge in job.edges if edge.warm_up is None}
    for name, reason in {**unasked, **asked.left_out}.items():
        log.append(Advised(name, f"its data have no say in the importance of weights: {reason}"))
    scores = average((one.num_examples, one.scores) for one in asked.edges)
    if config.importance == "gradient-weight":
        sizes = {module.name: module.num_adapter_parameters(1) for module in job.shapes.modules}
        scores = per_cost(scores, sizes)
    importance = Importance(config.importance, scores, {one.edge: one.num_examples for one in asked.edges})
    log.append(ImportanceFound(config.importance, tuple(importance.edges), scores, asked.seconds, simulated))
    return _go_on_with(replanned(job, importance), importance, rounds, accounts, planned)
