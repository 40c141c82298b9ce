"""Fine-tune a large language model on private data that stays with its owners.

    import atoll
    result = atoll.train("run.toml")
    model = atoll.load(result.run_dir)
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# Before torch is imported anywhere: waiting OpenMP threads that spin make every step 2 to 10 times slower as soon as two processes
# share the cores. The others keep libraries from calling home or from starting threads of their own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Else oneMKL keeps a workspace of some 2 MB for every thread that ever made a product: a host has one for each session.
os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")

# bitsandbytes, which PEFT imports where it is there, looks for a kernel from a hub, for a product that is not used here, and warns.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from atoll.commands.evaluate import evaluate
    from atoll.commands.generate import generate
    from atoll.commands.many.compare import compare, sweep
    from atoll.commands.merge import load, merge
    from atoll.commands.models.export import export
    from atoll.commands.plan import plan
    from atoll.commands.resume import resume
    from atoll.commands.train import RunResult, train
    from atoll.split.certificates import DeviceTls, HostAccess

__version__ = version("atoll")
__all__ = [
    "DeviceTls", "HostAccess", "RunResult", "__version__", "compare", "evaluate", "export", "generate", "load", "merge", "plan", "resume",
    "sweep", "train",
]  # fmt: skip

_HOME = {name: f"atoll.commands.{name}" for name in ("evaluate", "generate", "merge", "plan", "resume", "train")}
_HOME["load"] = "atoll.commands.merge"
_HOME |= dict.fromkeys(("compare", "sweep"), "atoll.commands.many.compare")
_HOME |= dict.fromkeys(("DeviceTls", "HostAccess"), "atoll.split.certificates")
_HOME["export"] = "atoll.commands.models.export"
_HOME["RunResult"] = "atoll.commands.train"


def __getattr__(name: str) -> Any:
    # Looked up on first use, so that `import atoll` and `atoll --help` do not wait for torch.
    if name not in _HOME:
        raise AttributeError(f"module 'atoll' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
