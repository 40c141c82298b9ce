"""atoll export: the result of a run in the form that a server reads, and the commands that serve it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atoll.adapters.peft_files import save_adapter
from atoll.adapters.state import AdapterState
from atoll.commands.merge import MergedDtype, check_merges, write_merged
from atoll.commands.models.folder import check_free, written_whole
from atoll.embedded import tiny_path
from atoll.errors import AdapterFitError, ConflictError
from atoll.jobs.exports.card import MERGED, Kind, write_card
from atoll.jobs.exports.gguf import why_not, write_gguf
from atoll.jobs.exports.one_rank import of_one_rank
from atoll.jobs.exports.vllm import check_vllm, max_rank
from atoll.jobs.finished import FinishedRun, is_chat, open_run
from atoll.jobs.inputs import base_source
from atoll.jobs.results.adapter import written_form

Server = Literal["transformers", "vllm", "llama.cpp", "ollama"]
_ADAPTER, _MODEL, _BASE, _MODELFILE = "adapter.gguf", "model.gguf", "base.gguf", "Modelfile"
_FOR_VLLM = Kind("peft", "a PEFT adapter of one rank and one scaling, for vLLM and others that read no patterns", "")
_FOR_LLAMA = Kind("gguf", "an adapter for llama.cpp (adapter.gguf), and the same for PEFT", "")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and what is to be typed next."""

    folder: Path
    what: str
    commands: tuple[str, ...]
    """Each with what it needs after a "#"; they name paths of this machine."""
    remarks: tuple[str, ...] = ()


def export(
    run_dir: str | Path, *, server: Server, out: str | Path, dtype: MergedDtype | None = None, trust: bool = False,
    other_base: bool = False, model: str | None = None,
) -> Exported:  # fmt: skip
    """Write the result of a run for a server to `out`, whole or not at all, with a model card.

    transformers: base and adapter merged, in the types of the base's files or all of `dtype`. vllm: an adapter of one rank. llama.cpp and
    ollama: an adapter in GGUF, or where that could not be faithful the merged model. `model` is where the base is now, if it was moved.

    Raises: what `atoll.merge` raises; AdapterFitError for what the server would not apply as it was trained; UnavailableError without the
    gguf package; ConflictError for a `dtype` where nothing is merged.
    """
    target = Path(out)
    check_free(target)
    finished = open_run(Path(run_dir), trust=trust, other_base=other_base, model=model)
    write = {"transformers": _transformers, "vllm": _vllm, "llama.cpp": _llama, "ollama": _llama}[server]
    job = _Export(finished, server, target, dtype)
    fill, exported = write(job)
    with written_whole(target, f"what is for {server}") as folder:
        folder.mkdir()
        fill(folder)
    return exported


@dataclass(frozen=True, slots=True, eq=False)
class _Export:
    finished: FinishedRun
    server: Server
    target: Path
    dtype: MergedDtype | None

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of the base's config.json."""
        found: Mapping[str, Any] = self.finished.base.model.config.to_dict()
        return found

    @property
    def head(self) -> tuple[str, ...]:
        return tuple(self.finished.base.head)

    @property
    def name(self) -> str:
        return self.finished.run.path.resolve().name

    @property
    def base(self) -> str:
        """As servers on this machine are given it."""
        source = base_source(self.finished.loaded)
        return shlex.quote(str(tiny_path()) if source == "tiny" else source)

    def path(self, name: str = "") -> str:
        return shlex.quote(str(self.target / name))


_Written = tuple[Callable[[Path], None], Exported]


def _transformers(job: _Export) -> _Written:
    def fill(folder: Path) -> None:
        _merge(job, folder)

    check_merges(job.finished)
    asked = shlex.quote(json.dumps({"model": str(job.target), "prompt": "..."}, ensure_ascii=False))
    commands = () if job.head else (
        f"transformers serve {job.path()}  # pip install 'transformers[serving]'",
        f"transformers chat {job.path()}  # in another terminal" if job.finished.base.tokenizer.chat_template is not None else
        f"curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d {asked}",
        f"vllm serve {job.path()}  # serves the same folder",
    )  # fmt: skip
    return fill, Exported(job.target, "base and adapter in one model", commands)


def _vllm(job: _Export) -> _Written:
    state = job.finished.adapter
    check_vllm(state, job.settings["model_type"], job.head, str(job.finished.run.adapter))
    _refuse_dtype(job, "an adapter is written, in fp32")
    fitted, rank = of_one_rank(state), max_rank(state)
    command = f"vllm serve {job.base} --enable-lora --max-lora-rank {rank} --lora-modules {shlex.quote(job.name)}={job.path()}"

    use = f"vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules {shlex.quote(job.name)}=."

    def fill(folder: Path) -> None:
        _save(job, fitted, folder)
        write_card(job.finished.run, job.finished.loaded, folder, _with_use(_FOR_VLLM, use))

    return fill, Exported(job.target, f"an adapter of rank {max(fitted.ranks.values())} for vLLM", (command,))


def _llama(job: _Export) -> _Written:
    state, model_type = job.finished.adapter, job.settings["model_type"]
    check_merges(job.finished)
    if job.head:
        raise AdapterFitError(
            f"{job.server} writes text, and this run tells classes", where=str(job.finished.run.path), got="a classifier",
            expected='a run with task = "generate"', do="export it --for transformers",
        )  # fmt: skip
    reason = why_not(state, model_type)
    if reason is not None:
        return _merged_for_llama(job, reason)
    _refuse_dtype(job, "an adapter is written, in fp32")
    fitted = of_one_rank(state)

    def fill(folder: Path) -> None:
        write_gguf(fitted, job.settings, folder / _ADAPTER)
        _save(job, fitted, folder)
        served = f"llama-server -m {_BASE} --lora {_ADAPTER}"
        if job.server == "ollama":
            served = f"ollama create {job.name}"
            (folder / _MODELFILE).write_text(_modelfile(job, f"FROM ./{_BASE}\nADAPTER ./{_ADAPTER}\n"), encoding="utf-8")
        use = f"python convert_hf_to_gguf.py BASE --outfile {_BASE}   # of llama.cpp; BASE is the base's folder\n{served}"
        write_card(job.finished.run, job.finished.loaded, folder, _with_use(_FOR_LLAMA, use))

    commands = (f"python convert_hf_to_gguf.py {job.base} --outfile {job.path(_BASE)}  # of llama.cpp", *_served(job, _BASE, _ADAPTER))
    return fill, Exported(job.target, f"an adapter for llama.cpp, {_ADAPTER}", commands, _template_remark(job))


def _merged_for_llama(job: _Export, reason: str) -> _Written:
    def fill(folder: Path) -> None:
        _merge(job, folder)
        if job.server == "ollama":
            (folder / _MODELFILE).write_text(_modelfile(job, f"FROM ./{_MODEL}\n"), encoding="utf-8")

    commands = (f"python convert_hf_to_gguf.py {job.path()} --outfile {job.path(_MODEL)}  # of llama.cpp", *_served(job, _MODEL, None))
    remarks = (f"no adapter in GGUF: {reason}; the merged model is converted by llama.cpp itself", *_template_remark(job))
    return fill, Exported(job.target, "base and adapter in one model, for llama.cpp's converter", commands, remarks)


def _served(job: _Export, model: str, adapter: str | None) -> tuple[str, ...]:
    if job.server == "ollama":
        return (f"ollama create {shlex.quote(job.name)} -f {job.path(_MODELFILE)}", f"ollama run {shlex.quote(job.name)}")
    return (f"llama-server -m {job.path(model)}" + (f" --lora {job.path(adapter)}" if adapter is not None else ""),)


def _modelfile(job: _Export, start: str) -> str:
    # What a run was trained on is text as it stands, unless it was chats: their template is in the GGUF file of the base.
    return start if is_chat(job.finished) else f'{start}TEMPLATE "{{{{ .Prompt }}}}"\n'


def _template_remark(job: _Export) -> tuple[str, ...]:
    if job.server != "ollama" or not is_chat(job.finished):
        return ()
    return ("Ollama has templates of its own: compare `ollama show --template` with the tokenizer's before you trust answers",)


def _refuse_dtype(job: _Export, but: str) -> None:
    if job.dtype is not None:
        raise ConflictError(
            f"--dtype does not go with --for {job.server}", got=f"--dtype {job.dtype}, and {but}", expected="--for transformers",
            do="leave --dtype away",
        )  # fmt: skip


def _merge(job: _Export, folder: Path) -> None:
    write_merged(job.finished, folder, job.dtype or "as-stored")
    write_card(job.finished.run, job.finished.loaded, folder, MERGED)


def _save(job: _Export, state: AdapterState, folder: Path) -> None:
    form = written_form(job.finished.base, job.finished.loaded)
    save_adapter(state, folder, base_name=form.base_name, revision=form.revision, transposed=form.transposed)


def _with_use(kind: Kind, commands: str) -> Kind:
    return Kind(kind.library, kind.what, f"```\n{commands}\n```")
