"""run.toml as frozen values: every key, its default and what it means. Knows nothing of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from atoll.config.named import Named
from atoll.config.quantities import BitsPerSecond, Bytes, BytesOrZero, FlopsPerSecond, Seconds, SecondsOrZero
from atoll.config.sections.data import Data as Data
from atoll.config.sections.section import Name as Name
from atoll.config.sections.section import Section as Section
from atoll.config.sections.section import Text as Text
from atoll.registry.parts import trait

PRECISION_BITS = {"fp32": 32, "bf16": 16, "fp16": 16}
"""Bits of a number, by model.precision and federated.precision."""
COLUMN_KEYS = ("slots", "choices", "answer")
"""Keys of [evaluate] that name a column of the held-out rows."""
DEFAULT_LOCAL_STEPS = 50
"""Optimizer steps per round where neither local_steps nor local_epochs is given."""


class Run(Section):
    """[run] the run as a whole."""

    name: Name = "run"
    """Run directories are runs/NAME-0001, -0002, ..."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds every random stream; equal seeds give equal adapters, bit for bit."""
    rounds: Annotated[int, Field(ge=1)] = 3
    """Rounds of local training followed by aggregation."""
    placement: Literal["auto", "local", "split", "cloud"] = "auto"
    """Where the base runs for edges whose own mode is "auto": on the edge, in a host, or, with the edge's rows, where the coordinator is
    (for comparison: they leave their owner). "auto": in a host where one is named, else on the edge."""
    compare: tuple[Literal["local-only", "central", "homogeneous"], ...] = ()
    """Extra rows in the evaluation: every edge alone, and one trainer that sees all data, each with the same number of examples seen; or
    the rank and batch of [adapter] and [train], at the most bits of [plan], on all edges that can hold them."""
    fleet: Text | None = None
    """A file of [[edge]] sections, instead of any here."""


class Cut(Section):
    """[model] cut: blocks kept on the device in split mode."""

    front: Annotated[int, Field(ge=0)] = 1
    """Blocks kept before the remote ones."""
    back: Annotated[int, Field(ge=0)] = 0
    """Blocks kept after the remote ones."""


class Model(Section):
    """[model] the frozen base."""

    base: Text = "tiny"
    """"tiny" (built in), a folder, or a Hugging Face id, "org/name" or "org/name@REVISION" (a branch, tag or commit). A folder's path
    begins at the folder of this file, wherever Atoll is started. `atoll convert` makes a GGUF file such a folder."""
    task: Literal["generate", "classify"] = "generate"
    """Predict text; or tell the class of a row ("classify"): a decoder or BERT with a head on top whose full weights are always trained, on
    edges that hold the whole base. Rows are [data] text and label; scores are loss in nats per row, accuracy and macro_f1."""
    quantize: Literal[16, 8, 4, "auto"] = "auto"
    """Bits per weight in the blocks of a frozen base that an edge holds; the rest keeps `precision`, as all arithmetic does. "auto": the
    planner's choice, or the width of `precision` where there is no planner (plan.policy = "as-written")."""
    cut: Cut = Cut()
    """Split mode: blocks kept on the device, beside embedding and head."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of base and activations; adapters and optimizer are always fp32."""


class Adapter(Section):
    """[adapter] what is trained."""

    kind: Literal["lora", "bottleneck", "full"] = "lora"
    """Low-rank pair B A x, or a parallel bottleneck B relu(A x); or ("full") the weights of the targets themselves, of which rank, alpha
    and dropout say nothing: for comparison. Biases, norms and embeddings stay frozen; weight_decay draws a weight towards the base's."""
    targets: Text | Annotated[tuple[Text, ...], Field(min_length=1)] = "all-linear"
    """Last names of modules (["q_proj", "v_proj"]), or "attention", "mlp", "all-linear"; "lora" takes ["embed_tokens", "lm_head"], too."""
    rank: Annotated[int, Field(ge=1)] = 8
    """Width of every adapter, unless an edge names its own."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """The adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the adapter's input, while training."""
    start: Text | None = None
    """A PEFT adapter folder to start from; its ranks and targets hold."""


class Select(Section):
    """[select] which modules are active."""

    policy: Annotated[str, Named("policy")] = "all"
    """How the active modules are chosen; those that are not active are killed: no longer trained, until they are revived. By their
    variation in a window, again and again or (early-kill) once; by the root mean square of the adapter's parameters (magnitude) or the
    mean of |parameter x gradient| (snip) in one window; by lot; or the last ones. Gradients count as clipped."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.125
    """Share of the modules kept active."""
    observe_steps: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Steps with every module active before a choice; "auto": 10, or 2 % of an epoch where that is more."""
    every: Literal["epoch"] | Annotated[int, Field(ge=1)] = "epoch"
    """How often all modules are revived and the choice is made again (kill-and-revive)."""
    killed: Literal["offload", "skip", "merge"] = "offload"
    """A killed module is evaluated where the base runs, left out until it is revived (what it learned counts again in the result: nearly
    exact only soon after an early kill), or merged into a copy of the base's weight (lora and fp32; hosts need --merge)."""
    variation: Literal["change", "norm-change", "product-change", "gradient"] = "gradient"
    """How a module's movement in the window is measured: norm of its parameters' change per root of their number, difference of their
    norms, norm of the change of B A (lora), or mean norm of its gradient per root of the number: Adam moves every parameter at about the
    same speed, so that the others tell modules apart less well (docs/log.md)."""
    threshold: Literal["keep", "mean", "absolute", "budget"] = "keep"
    """Keep the share `keep`, what moves more than mean_factor times the mean or than least_variation, or most within a byte budget."""
    mean_factor: Annotated[float, Field(gt=0)] = 1.0
    """For threshold = "mean"."""
    least_variation: Annotated[float, Field(gt=0)] | None = None
    """For threshold = "absolute"."""
    budget: Annotated[float, Field(gt=0, le=1)] = 0.1
    """For threshold = "budget": share of the bytes that a step of the whole pool moves between device and host."""
    draw: Literal["highest", "lottery"] = "highest"
    """For threshold = "keep": the modules that score highest, or ("lottery") as many drawn without replacement, with chances in
    proportion to their scores, anew at every choice and from [run] seed: a module that always comes second has its turn, too."""
    killed_moments: Literal["keep", "reset"] = "keep"
    """Whether a module's Adam moments wait for its revival."""

    @property
    def chooses(self) -> bool:
        """Whether modules are ever chosen, so that others are killed."""
        return not trait("policy", self.policy, "trains_all")

    @property
    def merges(self) -> bool:
        """Whether killed modules are merged into copies of the base's weights."""
        return self.chooses and self.killed == "merge"


class Plan(Section):
    """[plan] who decides what each edge does, and what may be chosen from."""

    policy: Annotated[str, Named("planner")] = "as-written"
    """Every edge does what run.toml says, if it can; or ("fedpipe") mode, bits, batch and the rank of every weight are found for each
    edge, by importance, under its memory and the deadline: then [adapter] rank and [train] batch_size say what to aim at; or
    ("fedadapter") adapters grow: in one stage for each of `ranks`, in this order, from the top blocks down and to that width."""
    infeasible: Literal["refuse", "leave-out"] = "refuse"
    """What becomes of a run with an edge for which nothing fits: it is refused, or goes on without that edge."""
    importance: Annotated[str, Named("importance", ("none",))] = "svd-sensitivity"
    """How the weights that matter are found in a warm-up on every edge's own data: by adapters P diag(l) Q with smoothed sensitivity and
    uncertainty; by |parameter x gradient| over the cost of training the weight; or all alike ("fedpipe" only)."""
    granularity: Literal["weight", "type"] = "weight"
    """Whether every weight has an importance of its own, or all of the same last name one."""
    importance_file: Text | None = None
    """importance.json of an earlier run, instead of a warm-up."""
    warmup_steps: Annotated[int, Field(ge=1)] = 10
    """Steps of the warm-up."""
    warmup_rank: Annotated[int, Field(ge=1)] = 4
    """Rank of the adapters in the warm-up."""
    refresh: Annotated[int, Field(ge=1)] | None = None
    """Rounds after which importance is found, and the plan made, anew; none: once, before the first round."""
    depth: Literal["all", "auto"] | Annotated[int, Field(ge=1)] = "all"
    """Blocks whose weights may be adapted, counted from the top; below them steps need no gradients. "auto": as many as teach most in a
    time, by FLOPs and the number of weights."""
    ranks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (2, 4, 8, 16)
    """Ranks to choose from; a weight may also get none."""
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Rows per micro-batch to choose from, up to those of [train]; `accumulate` makes up for what is missing in a step."""
    bits: Annotated[tuple[Literal[4, 8, 16], ...], Field(min_length=1)] = (4, 8, 16)
    """Bit widths to choose from."""
    round_deadline: Seconds | None = None
    """Time by which every edge must have finished a round, by declared speed and link."""
    steps: Literal["asked", "fill"] = "asked"
    """Optimizer steps per round: as [train] asks; or ("fill") more on edges of declared speed done before the deadline or the slowest."""
    most_steps: Annotated[float, Field(ge=1)] = 8.0
    """For steps = "fill": at most so many times what [train] asks."""

    @property
    def decides(self) -> bool:
        """Whether mode, bits, batch and ranks are the planner's to find."""
        return bool(trait("planner", self.policy, "decides"))

    @property
    def warms_up(self) -> bool:
        """Whether importance comes from a warm-up."""
        return self.decides and self.importance != "none" and self.importance_file is None


class Train(Section):
    """[train] the optimizer."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From the peak to zero over all steps of all rounds, or constant."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps from zero to the peak."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows (or packed sequences) per micro-batch."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches per optimizer step; the loss is the mean over all their label tokens."""
    local_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps per round; 50 unless local_epochs is given."""
    local_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the edge's data per round. Instead of local_steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """Whether an edge's Adam moments live on from round to round; with federated.aggregation = "stack" they never do."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass; "auto": where an edge's declared memory needs it."""


class Federated(Section):
    """[federated] how updates become one."""

    aggregation: Annotated[str, Named("aggregation")] = "exact-svd"
    """How adapters of unequal rank are averaged: the exact mean of products B A, cut to the common rank; or of what edges changed of what
    they were sent, added to what was there (delta-svd); A and B apart, padded with zeros; that, and what it misses as a frozen delta
    (residual); or the exact mean as a frozen delta, and new adapters every round (stack)."""
    weigh: Literal["rows", "steps"] = "rows"
    """What an update weighs in the mean: its edge's rows; or ("steps") these times how often the plan has the edge do the steps of [train]:
    where rounds are filled, slow edges do not hold back the others then, and fast edges' rows count for more."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Number format in which adapters travel between edges and coordinator; both calculate in fp32. "fp16" halves the bytes and rounds
    to 11 bits: of rounds that move numbers by less than a thousandth of themselves (some steps at 1e-5) a part is lost."""
    min_edges: Annotated[int, Field(ge=1)] = 1
    """Fewest edges whose updates make a round."""
    round_timeout: SecondsOrZero = 3600.0
    """A round that takes longer goes on without the missing edges."""
    patience: Annotated[int, Field(ge=1)] = 3
    """Rounds in a row that an edge may miss; after them no round waits for it, until it answers one before the others are through."""
    personal_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps by which each edge trains a copy of its own after the last round; it stays on its edge, and is scored on the edge's
    own held-out rows beside base, federated and what `compare` asks for. None: no such copy."""
    combine: Literal["mean", "median", "trimmed-mean"] = "mean"
    """What of all edges' products B A is taken: the mean, weighted as `weigh` says; or, against bad updates, the median or trimmed mean of
    every coordinate, where each edge counts the same however much data it has. The last two need aggregation = "exact-svd"."""
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """Share of the edges left out at each end of a trimmed mean, rounded down to whole edges."""
    clip_update: Literal["auto"] | Annotated[float, Field(gt=0)] | None = None
    """An update that moves all products B A (or full weights) together further than this, in the Frobenius norm, is shrunk to it; "auto":
    the median of the round's norms. Needs aggregation = "exact-svd", "delta-svd" or "stack"."""
    max_norm: Annotated[float, Field(gt=0)] | None = None
    """An update with a module whose product B A (or change of a full weight) has a larger Frobenius norm is refused; none: 1000, from where
    on fp32 could not hold what others train on. Runs that are well come to some ten."""
    late: Literal["wait", "cut", "drop"] = "wait"
    """An edge that by declared speed and link cannot finish by plan.round_deadline is waited for, stops at the last step that it can
    finish, or is left out of the round. Where plan.policy = "fedpipe", ranks are cut before steps are."""


class Wire(Section):
    """[wire] how split mode travels."""

    mode: Literal["auto", "dense", "factored", "lent"] = "auto"
    """What an adapter adds travels whole (B A x), or as its two factors (A x, and B once per update): the same result, fewer bytes.
    Or A and B are lent to the host for a step, and their gradients come back: two round trips, however many layers there are. "auto":
    for each edge what the formulas foretell to be quickest over its link, or over 100 Mbit/s and 20 ms where it declares none."""
    codec: Annotated[str, Named("codec")] = "fp32"
    """Number format of tensors that travel; int8 has a scale for each token, fp16 a power of two."""
    adapters: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of A and B and of their gradients, where they are lent."""
    host_flops: FlopsPerSecond | None = None
    """Speed of the host, for plans, simulated time and the choice of the mode; none: what it computes takes no time."""
    timeout: Seconds = 60.0
    """A host that is silent for longer counts as lost."""
    reconnect: SecondsOrZero = 120.0
    """How long a device tries to reach a lost host again, or waits until a host lets it go on, before the run ends with its work saved."""
    link_bandwidth: BitsPerSecond | None = None
    """Slow the connection down to this rate in each direction: for benchmarks on one machine."""
    link_latency: SecondsOrZero = 0.0
    """Let every frame arrive later by this: for benchmarks on one machine."""


class Track(Section):
    """[track] who else is told what happens in a run."""

    to: tuple[Annotated[str, Named("tracker")], ...] = ()
    """Trackers that get every event; one that fails is left out, and the run goes on. Each needs its library: `pip install 'atoll[wandb]'`.
    They are told every key of the config, losses, bytes and times, and no row."""
    project: Text = "atoll"
    """Under what they file runs together: MLflow's experiment, the project of wandb and trackio."""


class Privacy(Section):
    """[privacy] what is done to an update before it leaves."""

    transforms: tuple[Annotated[str, Named("transform")], ...] = ()
    """What is done to an edge's update before it leaves the edge, in this order."""

    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of an edge's update."""
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of the noise, in units of `clip`."""
    target_epsilon: Annotated[float, Field(gt=0)] | None = None
    """Choose the noise so that the whole run spends this much."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """The delta of (epsilon, delta)."""
    secure_sum: bool = False
    """Let the coordinator see only sums."""


class Evaluate(Section):
    """[evaluate] what is measured on the held-out rows, beside loss and perplexity."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Rounds after which held-out rows are scored, too; none: only at the end."""
    metrics: tuple[Annotated[str, Named("metric")], ...] = ()
    """exact_match, bleu, rouge, slot_accuracy generate; choice_accuracy and label_accuracy compare likelihoods."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Rows per forward pass."""
    generate_rows: Annotated[int, Field(ge=1)] = 64
    """Rows for the metrics that generate."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest generated completion."""
    slots: Text | None = None
    """Column of "key[value]" pairs whose values a correct completion mentions (slot_accuracy)."""
    choices: Text | None = None
    """Column holding the list of possible completions (choice_accuracy)."""
    answer: Text | None = None
    """Column holding the correct choice, as its text or its number from 0; if it could be both, completions decide (choice_accuracy)."""
    labels: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """The possible completions of rows (label_accuracy), or a classifier's classes in order; none: those that occur, sorted."""


class Edge(Section):
    """[[edge]] one machine with its data."""

    name: Name
    """Unique; names the edge's folder and its random streams."""
    mode: Literal["auto", "local", "split", "cloud"] = "auto"
    """Where this edge's base runs; "auto": as [run] placement says."""
    profile: Text | None = None
    """A file that `atoll doctor --profile` wrote on that machine; what is declared here goes before it."""
    memory: Bytes | None = None
    """What the training process may use."""
    process_memory: BytesOrZero | None = None
    """What of it is taken before there is a model: on an accelerator, its context; none: as measured of a process on a CPU. Where it is
    declared, what a round begins and ends with is not counted: it lies in the machine's own memory."""
    flops: FlopsPerSecond | None = None
    """Speed, for plans and simulated time."""
    bandwidth: BitsPerSecond | None = None
    """Link to the coordinator, for plans and simulated time."""
    latency: SecondsOrZero | None = None
    """Of the same link."""
    data: Text | None = None
    """This edge's own file; none: its share of [data] train."""
    eval: Text | None = None
    """This edge's own held-out rows, for its personal copy ([federated] personal_steps); none: those of [data] eval that partition =
    "by:COLUMN" gives it, or all of them."""
    prompt: str | None = None
    """Template over the columns of its own data, where they are called otherwise there; none: [data] prompt."""
    completion: Text | None = None
    """The same for [data] completion."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """This edge's adapter rank; none: [adapter] rank."""
    bits: Literal[16, 8, 4] | None = None
    """Bits per weight of this edge's base; none: [model] quantize."""


class RunConfig(Section):
    """A whole run.toml."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    adapter: Adapter = Adapter()
    select: Select = Select()
    plan: Plan = Plan()
    train: Train = Train()
    federated: Federated = Federated()
    wire: Wire = Wire()
    track: Track = Track()
    privacy: Privacy = Privacy()
    evaluate: Evaluate = Evaluate()
    edge: tuple[Edge, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = {}
    """[options."NAME"] what the part of this name, which is not built in, is told beside."""

    def options_of(self, name: str) -> Mapping[str, Any] | None:
        """The options of the part with this name; None: its defaults."""
        return self.options.get(name)


def held_out_source(config: RunConfig) -> str | None:
    """Where held-out rows are read from: [data] eval, or the demo's own where an edge trains on the demo."""
    data = config.data
    on_demo = data.train == "demo" and (not config.edge or any(edge.data is None for edge in config.edge))
    return data.eval if data.eval is not None else "demo-eval" if on_demo and data.validation_share is None else None
