"""All attacks on what one run would send, one after the other, within a time.

Shape suffixes: T positions of a row, N positions of all rows, D width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atoll.adapters.attach import attached
from atoll.adapters.state import AdapterState
from atoll.attacks import labels, membership, update
from atoll.attacks.finding import GUESSES, NAMES, Finding, Guessed, Name, Words, finding_of, interval_of
from atoll.attacks.inverter import Effort, Inverter, nearest, trained_inverter
from atoll.attacks.search import Search
from atoll.attacks.views import Front, Tail, travelled
from atoll.attacks.wire_adapters import Wire, product_error
from atoll.base.blocks import blocks_path, trace
from atoll.base.load import Base
from atoll.config.schema import RunConfig
from atoll.privacy.transform import UpdateContext, transformed
from atoll.tasks.batches import pad_batch
from atoll.tasks.tokens import Example, pad_id
from atoll.wire.codecs import codec_of

SHARES: Mapping[Name, float] = {
    "nearest-embedding": 0.05, "inverter": 0.4, "optimisation": 0.2, "labels": 0.1, "update-inversion": 0.15, "membership": 0.1,
    "wire-adapters": 0.0,
}  # fmt: skip
"""Of the time; what an attack does not need, nobody else gets."""
INVERTER_STEPS = 1500
BATCHES = (1, 2, 4)
MODES = ("dense", "factored", "lent")


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What a run would send, and what everybody knows."""

    config: RunConfig
    base: Base
    """Public, in full."""
    adapter: AdapterState
    """Those of an edge: what it begins with, or ends with."""
    is_finished: bool
    in_a_host: Sequence[Example]
    """Private rows whose middle blocks run in a host; none where no edge is split."""
    private: Sequence[Example]
    """Of all edges, that send updates."""
    held_out: Sequence[Example]
    public: Sequence[Tensor]
    """Token ids of text that is nobody's secret."""
    seconds: float
    inverter_steps: int = INVERTER_STEPS
    searched_rows: int | None = None
    """Rows of the slowest attack; None: all."""


class _NotApplicable(Exception):
    """Why an attack does not apply."""


class Audit:
    """The attacks on one setting. What several of them need is made once; nothing is kept elsewhere than here."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.words = Words(setting.base.tokenizer, setting.public)
        embedding: Any = setting.base.model.get_input_embeddings()
        self.num_tokens = int(embedding.weight.shape[0])
        self.rows = [torch.from_numpy(row.token_ids.astype(np.int64)) for row in setting.in_a_host]

    def findings(self, only: Sequence[Name] = NAMES, told: Callable[[Finding], None] = lambda _: None) -> list[Finding]:
        """One for each attack; `told` hears of each as it ends."""
        attacks: dict[Name, Callable[[float], Finding]] = {
            "nearest-embedding": self._nearest, "inverter": self._inverted, "optimisation": self._optimised, "labels": self._labels,
            "update-inversion": self._update, "membership": self._membership, "wire-adapters": self._wire,
        }  # fmt: skip
        found = []
        for name in NAMES:
            if name not in only:
                continue
            begin = time.monotonic()
            try:
                finding = attacks[name](self.setting.seconds * SHARES[name])
            except _NotApplicable as reason:
                finding = Finding(name, why=str(reason))
            found.append(replace(finding, seconds=time.monotonic() - begin))
            told(found[-1])
        return found

    @cached_property
    def table_VD(self) -> Tensor:
        """The public embedding of every token."""
        return Front.at_cut(self.setting.base.model, 0).of_each_token(self.num_tokens)

    @cached_property
    def front(self) -> Front:
        """The public front blocks."""
        return Front.at_cut(self.setting.base.model, self.setting.config.model.cut.front)

    @cached_property
    def seen(self) -> list[Tensor]:
        """What a host gets of each private row: the device's own front blocks, with its adapters, and then the codec."""
        codec = codec_of(self.setting.config.wire.codec)
        with self._with_adapters():
            private = Front.at_cut(self.setting.base.model, self.setting.config.model.cut.front)
        return [travelled(codec, h_TD) for h_TD in private.rows(self.rows)]

    def inverter(self, seconds: float) -> Inverter:
        """Trained once, on public text through the public front blocks and the codec."""
        if "_inverter" not in self.__dict__:
            codec = codec_of(self.setting.config.wire.codec)
            h_ND = torch.cat([travelled(codec, h_TD) for h_TD in self.front.rows(self.setting.public)])
            effort, seed = Effort(self.setting.inverter_steps, seconds), self.setting.config.run.seed
            self.__dict__["_inverter"] = trained_inverter(h_ND, torch.cat(list(self.setting.public)), self.table_VD, effort, seed)
        inverter: Inverter = self.__dict__["_inverter"]
        return inverter

    @contextmanager
    def _with_adapters(self) -> Iterator[None]:
        with attached(self.setting.base.model, self.setting.adapter):
            yield

    def _needs_host(self) -> None:
        if not self.rows:
            raise _NotApplicable("no edge is split: no host sees an activation")

    def _finding(self, name: Name, guessed: Sequence[Guessed], why: str = "") -> Finding:
        return finding_of(name, guessed, self.words, seed=self.setting.config.run.seed, seconds=0.0, why=why)

    def _nearest(self, _seconds: float) -> Finding:
        self._needs_host()
        found = [Guessed(ids_T, nearest(h_TD, self.table_VD, GUESSES)) for ids_T, h_TD in zip(self.rows, self.seen, strict=True)]
        return self._finding("nearest-embedding", found)

    def _inverted(self, seconds: float) -> Finding:
        self._needs_host()
        inverter = self.inverter(seconds)
        found = [Guessed(ids_T, inverter.guesses(h_TD, GUESSES)) for ids_T, h_TD in zip(self.rows, self.seen, strict=True)]
        return self._finding("inverter", found)

    def _optimised(self, seconds: float) -> Finding:
        self._needs_host()
        codec = codec_of(self.setting.config.wire.codec)
        sample_ND = self.seen[0]
        noise = float((codec.error_bound(sample_ND) * sample_ND.shape[1] ** 0.5 / sample_ND.norm(dim=1)).nan_to_num(1.0).max())
        inverter = self.inverter(self.setting.seconds * SHARES["inverter"])
        found = Search(self.front, inverter, self.num_tokens, int(self.rows[0][0]), noise).rows(
            self.rows[: self.setting.searched_rows], self.seen[: self.setting.searched_rows], seconds
        )  # fmt: skip
        return self._finding("optimisation", found, "as many rows as there was time for" if len(found) < len(self.rows) else "")

    def _labels(self, seconds: float) -> Finding:
        self._needs_host()
        setting, model = self.setting, self.setting.base.model
        if setting.config.model.cut.back:
            raise _NotApplicable("cut.back > 0: the last blocks are on the device; an attack through them is not built, and not ruled out")
        until, found, codec = time.monotonic() + seconds, list[Guessed](), codec_of(setting.config.wire.codec)
        public = Tail(model)
        with self._with_adapters():
            end, private = Front.at_end(model), Tail(model)
            for row in setting.in_a_host:
                batch = pad_batch([row], pad_id(setting.base.tokenizer))
                h_ND = travelled(codec, end(batch.input_ids_BT).flatten(0, 1)[batch.predict_N])
                sent_ND = travelled(codec, labels.sent_gradient(private, h_ND.to(model.device), batch.target_N.to(model.device)).cpu())
                found.append(Guessed(batch.target_N, labels.labels_of(public, h_ND.to(model.device), sent_ND.to(model.device)).cpu()))
                if time.monotonic() > until:
                    break
        return self._finding("labels", found, "of the tokens that carry loss: the responses")

    def _update(self, seconds: float) -> Finding:
        setting, until = self.setting, time.monotonic() + seconds
        if setting.config.select.chooses:
            raise _NotApplicable("modules are killed and revived: an update of the first step alone is not what this run sends")
        before = update.begun(setting.base, setting.adapter, setting.config.train, setting.public)
        dictionary = update.Dictionary.of(setting.base, before, self.num_tokens)
        if dictionary is None:
            raise _NotApplicable("no module of a block is adapted")
        figures, first = dict[str, float](), None
        for size in BATCHES:
            batches = [setting.private[at : at + size] for at in range(0, len(setting.private) - size + 1, size)]
            found = self._bags(before, dictionary, batches, lambda: time.monotonic() > until)
            if found is not None:
                figures[f"recovered_at_batch_{size}"] = float(found.tokens_recovered or 0.0)
                first = first or found
        assert first is not None
        return replace(first, figures=figures)

    def _bags(
        self, before: AdapterState, dictionary: update.Dictionary, batches: Sequence[Sequence[Example]], stop: Callable[[], bool]
    ) -> Finding | None:  # fmt: skip
        """What is found of each batch's tokens, as a set: the update does not say their order."""
        setting, special = self.setting, sorted(self.words.special)
        hits, top5, counted, rare_hits, rare, chance = (list[int]() for _ in range(6))
        example: dict[str, str] = {}
        for batch in batches:
            true_N = torch.from_numpy(np.concatenate([row.token_ids for row in batch]).astype(np.int64))
            counts, is_rare = self.words.counted(true_N), self.words.rare(true_N)
            number = len(set(true_N[counts].tolist()))
            picked = update.picked_tokens(dictionary.moved(before, self._updated(before, batch)), dictionary.table_VI, 5 * number, special)
            is_hit, is_top5 = np.isin(true_N.numpy(), picked[:number]), np.isin(true_N.numpy(), picked)
            known = np.isin(true_N.numpy(), update.commonest(setting.public, number))
            for into, values in ((hits, is_hit & counts), (top5, is_top5 & counts), (counted, counts), (chance, known & counts)):
                into.append(int(values.sum()))
            rare_hits.append(int((is_hit & is_rare).sum()))
            rare.append(int(is_rare.sum()))
            example = example or self._bag_example(true_N, picked[:number])
            if stop():
                break
        if not hits:
            return None
        total = max(sum(counted), 1)
        return Finding(
            "update-inversion", tokens_recovered=float(sum(hits) / total), top5_recovered=float(sum(top5) / total),
            rare_recovered=float(sum(rare_hits) / sum(rare)) if sum(rare) else None, chance=float(sum(chance) / total),
            interval=interval_of(np.array(hits), np.array(counted), setting.config.run.seed), example=example, rows=len(hits),
            why="the set of tokens of one row, after one step on it; not their order",
        )  # fmt: skip

    def _updated(self, before: AdapterState, rows: Sequence[Example]) -> AdapterState:
        """What an edge sends after one step on these rows, with the run's transforms."""
        config = self.setting.config
        batch = pad_batch(rows, pad_id(self.setting.base.tokenizer))
        after = update.stepped(self.setting.base, before, config.train, [batch], config.adapter.dropout)
        context = UpdateContext(before, "edge", 1, len(rows), config.run.seed)
        return transformed(after, config.privacy.transforms, config.options, context)

    def _bag_example(self, true_N: Tensor, picked: Sequence[int]) -> dict[str, str]:
        tokenizer = self.setting.base.tokenizer
        return {"true": self.words.text(true_N), "recovered": " ".join(str(tokenizer.decode([token])).strip() for token in picked)}

    def _membership(self, seconds: float) -> Finding:
        setting = self.setting
        if not setting.is_finished:
            raise _NotApplicable("nothing is trained yet: give the folder of a finished run")
        if not setting.held_out:
            raise _NotApplicable("there are no held-out rows to compare with")
        pad = pad_id(setting.base.tokenizer)
        members, others = (
            membership.gains(setting.base.model, setting.adapter, part, pad, seconds / 2) for part in (setting.private, setting.held_out)
        )
        area = membership.area_under_curve(members, others)
        return Finding(
            "membership", interval=membership.curve_interval(members, others, setting.config.run.seed), rows=len(members) + len(others),
            chance=0.5, figures={"auc": area, "found_at_1_percent_wrong": membership.found_at(members, others)},
            why="auc: a training row against a held-out one; the interval is the auc's",
        )  # fmt: skip

    def _wire(self, _seconds: float) -> Finding:
        self._needs_host()
        setting, model = self.setting, self.setting.base.model
        if setting.adapter.kind != "lora":
            raise _NotApplicable("bottleneck adapters are no product of matrices: solving for them is not built, and not ruled out")
        state = update.begun(setting.base, setting.adapter, setting.config.train, setting.public)
        middle = range(setting.config.model.cut.front, len(model.get_submodule(blocks_path(model))) - setting.config.model.cut.back)  # type: ignore[arg-type]
        inside = {f"{blocks_path(model)}.{number}." for number in middle}
        name = next((n for g in trace(model).groups for n in g if n in state.modules and any(n.startswith(one) for one in inside)), None)
        if name is None:
            raise _NotApplicable("no adapted module is in the host")
        with attached(model, state):
            x_ND = torch.cat(Front(model, name).rows(self.rows))[: 4 * state.modules[name].size[0]]
        config = setting.config
        wire = Wire(config.wire.codec, config.wire.adapters, config.adapter.dropout)
        errors = {f"{mode}_error": product_error(state.modules[name], x_ND, mode, wire) for mode in MODES}  # type: ignore[arg-type]
        return Finding(
            "wire-adapters", rows=len(self.rows), figures={**errors, "tokens": float(len(x_ND)), "inputs": float(x_ND.shape[1])},
            why=f"relative error of the product s B A of {name}, solved for from what each wire mode sends",
        )  # fmt: skip
