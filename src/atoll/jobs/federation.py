"""The federation of a run: find the importance of weights where a plan needs it, plan anew, run some rounds, and so on."""

from __future__ import annotations

from collections.abc import Callable

from atoll.adapters.state import AdapterState
from atoll.jobs.accounts import Accounts
from atoll.jobs.job import Job, grown_to, homogeneous, replanned
from atoll.jobs.rounds import Accountant, Rounds, run_rounds
from atoll.runs.events import Advised, EventLog, ImportanceFound, PhaseStarted
from atoll.selection.growth import growths_of
from atoll.selection.importance import Importance, average, per_cost

Planned = Callable[[Importance | None, Job], None]
"""Called with every new plan's job, and the importance it was made by; None: it was made without."""


def run_federation(job: Job, log: EventLog, accounts: Accounts, accountant: Accountant, planned: Planned) -> tuple[Job, AdapterState]:
    """All rounds, planned anew as [plan] says; the job as it was planned last, and the common adapter.

    Raises: EdgesLostError where a round gets fewer updates than [federated] min_edges, or nobody could score the weights.
    """
    plan, rounds_asked = job.config.plan, job.config.run.rounds
    if plan.policy == "fedadapter":
        return _run_growing(job, log, accounts, accountant, planned)
    warms_up = plan.policy == "fedpipe" and plan.importance != "none" and plan.importance_file is None
    if warms_up and all(edge.warm_up is None for edge in job.edges):
        log.append(Advised("", "no edge has memory for a warm-up with adapters on every weight: all weights count alike"))
        warms_up = False
    if not warms_up:
        return job, run_rounds(job, job.edges, "federated", log, accountant)
    with Rounds(job, job.edges, "federated", log, accountant) as rounds:
        while rounds.num_done < rounds_asked:
            job = _planned_anew(job, rounds, log, accounts, planned)
            _run(rounds, min(plan.refresh or rounds_asked, rounds_asked - rounds.num_done), job, log)
        return job, rounds.state


def _run(rounds: Rounds, num_rounds: int, job: Job, log: EventLog) -> None:
    log.append(PhaseStarted("federated", num_rounds * sum(edge.plan.num_steps for edge in job.edges)))
    rounds.run(num_rounds)


def _run_growing(job: Job, log: EventLog, accounts: Accounts, accountant: Accountant, planned: Planned) -> tuple[Job, AdapterState]:
    """Adapters that grow: what a stage adds changes nothing until it is trained."""
    with Rounds(job, job.edges, "federated", log, accountant) as rounds:
        for growth in growths_of(job.config):
            if growth.first_round:
                job = grown_to(job, growth.first_round)
                rounds.replan(job, job.edges)
                accounts.replan(job)
                planned(None, job)
            _run(rounds, growth.num_rounds, job, log)
        return job, rounds.state


def run_homogeneous(job: Job, log: EventLog) -> tuple[Job, AdapterState, float | None] | None:
    """The comparison: one setting for all edges that can hold it; its job, common adapter and simulated seconds. None where no edge can."""
    other = homogeneous(job)
    if other is None:
        log.append(Advised("", "no edge can hold what [adapter], [train] and the most bits of [plan] say: there is no homogeneous row"))
        return None
    accounts = Accounts(other)
    return other, run_rounds(other, other.edges, "homogeneous", log, accounts), accounts.simulated_seconds


def _planned_anew(job: Job, rounds: Rounds, log: EventLog, accounts: Accounts, planned: Planned) -> Job:
    config = job.config.plan
    log.append(PhaseStarted("warm-up", config.warmup_steps * sum(edge.warm_up is not None for edge in job.edges)))
    asked = rounds.warm_up()
    simulated = accounts.add_warm_up(asked)
    for name, reason in asked.left_out.items():
        log.append(Advised(name, f"its data have no say in the importance of weights: {reason}"))
    scores = average((one.num_examples, one.scores) for one in asked.edges)
    if config.importance == "gradient-weight":
        sizes = {module.name: module.num_adapter_parameters(1) for module in job.shapes.modules}
        scores = per_cost(scores, sizes)
    importance = Importance(config.importance, scores, {one.edge: one.num_examples for one in asked.edges})
    log.append(ImportanceFound(config.importance, tuple(importance.edges), scores, asked.seconds, simulated))
    job = replanned(job, importance)
    rounds.replan(job, job.edges)
    accounts.replan(job)
    planned(importance, job)
    return job
