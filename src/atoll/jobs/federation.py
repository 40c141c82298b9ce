"""The federation of a run: find the importance of weights where a plan needs it, plan anew, run some rounds, and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from atoll.adapters.state import AdapterState
from atoll.config.schema import RunConfig
from atoll.federated.aggregation.aggregate import Common
from atoll.jobs.backends.backend import BackendFactory
from atoll.jobs.backends.in_process import InProcessBackend
from atoll.jobs.job import Job, grown_to, homogeneous, replanned
from atoll.jobs.resume_state import ResumePoint
from atoll.jobs.rounds import RoundCallback, Rounds, run_rounds
from atoll.jobs.totals import RunTotals
from atoll.planner.importance import Importance, average, per_cost
from atoll.registry.parts import make, trait, wrong_result
from atoll.runs.events import Advised, EventLog, ImportanceFound, PhaseStarted
from atoll.units import counted

Planned = Callable[[Importance | None, Job], None]
"""Called with every new plan's job, and the importance it was made by; None: it was made without."""


def run_federation(
    job: Job, log: EventLog, totals: RunTotals, callback: RoundCallback, planned: Planned, make_backend: BackendFactory = InProcessBackend,
    resume_point: ResumePoint | None = None,
) -> tuple[Job, AdapterState, Mapping[str, Common]]:  # fmt: skip
    """All rounds, planned anew as [plan] says; the job as it was planned last, the common adapter, and what personal copies start from.

    With `resume_point`, those that are left after it, and then as if they had never been stopped.

    Raises: EdgesLostError where a round gets fewer updates than [federated] min_edges, or nobody could score the weights; ResumeError
    where `resume_point` is of another plan.
    """
    plan, rounds_asked = job.config.plan, job.config.run.rounds
    warms_up = plan.warms_up
    if warms_up and all(edge.warm_up is None for edge in job.edges):
        log.append(Advised("", "no edge has memory for a warm-up with adapters on every weight: all weights count alike"))
        warms_up = False
    stages = stages_of(job.config)
    if warms_up:
        every = plan.refresh or rounds_asked
        stages = [(first, min(every, rounds_asked - first)) for first in range(0, rounds_asked, every)]
    job = _as_planned(job, resume_point)
    if resume_point is not None:
        totals.replan(job)
        planned(resume_point.run_state.importance, job)
    with Rounds(job, job.edges, "federated", log, callback, make_backend) as rounds:
        if resume_point is not None:
            rounds.restore(resume_point.rounds)
        for first, num_rounds in stages or [(0, rounds_asked)]:
            if rounds.num_done == first and warms_up:
                job = _planned_anew(job, rounds, log, totals, planned)
            elif rounds.num_done == first and first:  # Adapters grow: what a stage adds changes nothing until it is trained.
                job = _go_on_with(grown_to(job, first), None, rounds, totals, planned)
            if rounds.num_done < first + num_rounds:
                rounds.run(first + num_rounds - rounds.num_done)
        return rounds.job, rounds.state, rounds.given() if job.config.federated.personal_steps is not None else {}


def stages_of(config: RunConfig) -> list[tuple[int, int]]:
    """Rounds before each stage and rounds in it, where adapters grow; none elsewhere."""
    policy = config.plan.policy
    if not trait("planner", policy, "grows"):
        return []
    given, begun = make("planner", policy, config.options_of(policy)).stages(config), 0
    stages = list(given) if isinstance(given, Iterable) else []
    for stage in stages:
        is_next = isinstance(stage, tuple) and len(stage) == 2 and stage[0] == begun
        begun += stage[1] if is_next else config.run.rounds + 1
    if begun != config.run.rounds:
        expected = f"(rounds before, rounds in it) of every stage, one after the other, {counted(config.run.rounds, 'round')} together"
        raise wrong_result("planner", policy, "stages", given, expected)
    return stages


def run_homogeneous(
    job: Job, log: EventLog, make_backend: BackendFactory = InProcessBackend
) -> tuple[Job, AdapterState, float | None] | None:
    """The comparison: one setting for all edges that can hold it; its job, common adapter and simulated seconds. None where no edge can."""
    other = homogeneous(job)
    if other is None:
        log.append(Advised("", "no edge can hold what [adapter], [train] and the most bits of [plan] say: there is no homogeneous row"))
        return None
    totals = RunTotals(other)
    return other, run_rounds(other, other.edges, "homogeneous", log, totals, make_backend), totals.simulated_seconds


def _as_planned(job: Job, resume_point: ResumePoint | None) -> Job:
    """With the plan that was in force when the run was stopped."""
    if resume_point is None:
        return job
    if resume_point.run_state.importance is not None:
        job = replanned(job, resume_point.run_state.importance)
    else:
        begun = [first for first, _ in stages_of(job.config) if 0 < first < resume_point.round]
        job = grown_to(job, begun[-1]) if begun else job
    resume_point.check_plan(job)
    return job


def _go_on_with(job: Job, importance: Importance | None, rounds: Rounds, totals: RunTotals, planned: Planned) -> Job:
    rounds.replan(job, job.edges)
    totals.replan(job)
    planned(importance, job)
    return job


def _planned_anew(job: Job, rounds: Rounds, log: EventLog, totals: RunTotals, planned: Planned) -> Job:
    config = job.config.plan
    log.append(PhaseStarted("warm-up", config.warmup_steps * sum(edge.warm_up is not None for edge in job.edges)))
    asked = rounds.warm_up()
    simulated = totals.add_warm_up(asked)
    unasked = {edge.name: "its memory does not hold adapters on every weight" for edge in job.edges if edge.warm_up is None}
    for name, reason in {**unasked, **asked.left_out}.items():
        log.append(Advised(name, f"its data have no say in the importance of weights: {reason}"))
    scores = average((one.num_examples, one.scores) for one in asked.edges)
    if trait("importance", config.importance, "per_parameter"):
        sizes = {module.name: module.num_adapter_parameters(1) for module in job.shapes.modules}
        scores = per_cost(scores, sizes)
    importance = Importance(config.importance, scores, {one.edge: one.num_examples for one in asked.edges})
    log.append(ImportanceFound(config.importance, tuple(importance.edges), scores, asked.seconds, simulated))
    return _go_on_with(replanned(job, importance), importance, rounds, totals, planned)
