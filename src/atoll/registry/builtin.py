"""The parts that ship with Atoll, registered as anybody's are. Classes stand as text: none of them is loaded to know that it is there."""

from __future__ import annotations

from atoll.registry.parts import register

_SELECTION = "atoll.selection"
register("policy", "all", f"{_SELECTION}.baselines:All", "Every module, all the time", {"trains_all": True, "observes": False})
register(
    "policy", "kill-and-revive", f"{_SELECTION}.kill_and_revive:KillAndRevive", "By their variation in a window, again and again (DLoRA)",
    {"repeats": True},
)  # fmt: skip
register("policy", "early-kill", f"{_SELECTION}.kill_and_revive:EarlyKill", "The same, once: nothing is revived")
register("policy", "random", f"{_SELECTION}.baselines:Random", "By lot, before the first step", {"observes": False})
register("policy", "magnitude", f"{_SELECTION}.baselines:Magnitude", "By the root mean square of the adapter's parameters after a window")
register("policy", "snip", f"{_SELECTION}.snip:Snip", "By the mean of |parameter x gradient| in a window (SNIP)")
register("policy", "last-layers", f"{_SELECTION}.baselines:LastLayers", "The last ones in execution order", {"observes": False})

_PLANNER = "atoll.planner"
register("planner", "as-written", f"{_PLANNER}.as_written:AsWritten", "Every edge does what run.toml says, if it can")
register(
    "planner", "fedpipe", f"{_PLANNER}.fedpipe.fedpipe:FedPipe",
    "Mode, bits, batch and the rank of every weight, by importance, under memory and deadline (FedPipe)", {"decides": True},
)  # fmt: skip
register(
    "planner", "fedadapter", f"{_PLANNER}.fedadapter:FedAdapter", "Adapters grow in stages, from the top blocks down (FedAdapter)",
    {"grows": True},
)  # fmt: skip

_IMPORTANCE = "atoll.training"
register(
    "importance", "svd-sensitivity", f"{_IMPORTANCE}.adalora:SvdSensitivity",
    "Smoothed sensitivity and uncertainty of adapters P diag(l) Q (AdaLoRA)", {"least_steps": 2},
)  # fmt: skip
register(
    "importance", "gradient-weight", f"{_IMPORTANCE}.gradient_weight:GradientWeight",
    "|parameter x gradient|, over the cost of training the weight", {"per_parameter": True},
)  # fmt: skip

_RULES = "atoll.federated.aggregation.rules"
_PRODUCTS = {"works_on_products": True, "averages_bottlenecks": True}
register(
    "aggregation", "exact-svd", f"{_RULES}.exact_svd:ExactSvd", "The exact mean of products B A, cut to the common rank (FlexLoRA)",
    {**_PRODUCTS, "takes_robust_means": True, "sends_best_rank": True},
)  # fmt: skip
register(
    "aggregation", "delta-svd", f"{_RULES}.exact_svd:DeltaSvd",
    "The same of what edges changed of what they were sent, added to what was there", {**_PRODUCTS, "sends_best_rank": True},
)  # fmt: skip
register(
    "aggregation", "stack", f"{_RULES}.stack:Stack", "The exact mean as a frozen delta, and new adapters every round (FLoRA)",
    {"works_on_products": True, "keeps_frozen_delta": True, "starts_anew": True},
)  # fmt: skip
register(
    "aggregation", "zero-pad", f"{_RULES}.zero_pad:ZeroPad", "A and B averaged apart, padded with zeros (HetLoRA)",
    {"averages_bottlenecks": True, "pads": True},
)  # fmt: skip
register(
    "aggregation", "residual", f"{_RULES}.residual:Residual", "That, and what it misses as a frozen delta (FedEx-LoRA)",
    {"keeps_frozen_delta": True, "pads": True},
)  # fmt: skip

_WIRE = "atoll.wire.codecs"
register("codec", "fp32", f"{_WIRE}:Fp32", "As it is")
register("codec", "bf16", f"{_WIRE}:Bf16", "Rounded to 8 bits of mantissa")
register("codec", "fp16", f"{_WIRE}:Fp16", "Rounded to 11 bits of mantissa, with a power of two for every token")
register("codec", "int8", f"{_WIRE}:Int8", "A byte a value, and a scale for every token")

_READERS = "atoll.tasks.readers"
register("reader", "csv", f"{_READERS}.formats:Csv", "A header, and a row a record", {"suffixes": (".csv", ".tsv", ".tab")})
register("reader", "jsonl", f"{_READERS}.formats:JsonLines", "A JSON object a line", {"suffixes": (".jsonl", ".ndjson")})
register("reader", "json", f"{_READERS}.formats:Json", "A list of JSON objects", {"suffixes": (".json",)})
register("reader", "parquet", f"{_READERS}.tables:Parquet", "Columns as pyarrow reads them", {"suffixes": (".parquet",)})
register("reader", "arrow", f"{_READERS}.tables:Arrow", "The same of an Arrow file, as save_to_disk writes", {"suffixes": (".arrow",)})

_METRICS = "atoll.tasks.scoring.builtin_metrics"
register("metric", "exact_match", f"{_METRICS}:ExactMatch", "Share of texts equal to one of their references")
register("metric", "bleu", f"{_METRICS}:Bleu", "Corpus BLEU by sacrebleu, 0 to 100")
register("metric", "rouge", f"{_METRICS}:Rouge", "F-measures rouge1, rouge2 and rougeL")
register("metric", "slot_accuracy", f"{_METRICS}:SlotAccuracy", "Share of slot values that the text mentions", {"columns": ("slots",)})
register(
    "metric", "choice_accuracy", f"{_METRICS}:ChoiceAccuracy", "Share of rows whose right choice is the likeliest",
    {"columns": ("choices", "answer")},
)  # fmt: skip
register("metric", "label_accuracy", f"{_METRICS}:LabelAccuracy", "Share of rows whose right label is the likeliest")

_TRACKERS = "atoll.runs.trackers"
register(
    "tracker", "tensorboard", f"{_TRACKERS}.tensorboard:TensorBoard", "Event files in the run's folder", {"needs": ("tensorboard",)}
)  # fmt: skip
register("tracker", "mlflow", f"{_TRACKERS}.mlflow:MLflow", "A run where MLFLOW_TRACKING_URI says", {"needs": ("mlflow",)})
register("tracker", "wandb", f"{_TRACKERS}.wandb:Wandb", "Weights & Biases, also offline", {"needs": ("wandb",)})
register("tracker", "trackio", f"{_TRACKERS}.trackio:Trackio", "On this machine, for `trackio show`", {"needs": ("trackio",)})
