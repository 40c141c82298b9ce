"""[wire] mode = "auto" in whole runs: each edge travels as its plan says, also where edges share a host and a client."""

from __future__ import annotations

from dataclasses import replace

import pytest

import atoll
from atoll.errors import HostRefusedError
from atoll.runs.events import Event
from atoll.split.cut import Cut
from atoll.split.device.blocks import Given

from tests.conftest import random_model
from tests.jobs.conftest import Workplace
from tests.run_files import Sections
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host

FAR_AND_THIN = {
    "far": {"mode": "split", "bandwidth": "100 Mbit/s", "latency": "200 ms"},
    "thin": {"mode": "split", "bandwidth": "100 kbit/s", "latency": "0 s"},
}
FEW_TOKENS: Sections = {
    "run": {"rounds": 2}, "model": {"cut": {"front": 0, "back": 0}}, "adapter": {"targets": ["q_proj", "k_proj", "v_proj"], "rank": 4},
    "train": {"batch_size": 1, "local_steps": 1}, "data": {"max_length": 7},
}  # fmt: skip


def test_two_edges_of_one_run_have_different_modes_and_go_on_with_them(place: Workplace) -> None:
    done = place.train(FAR_AND_THIN, FEW_TOKENS, "whole")
    summary = done.result.summary
    assert {name: one.mode for name, one in summary.wire.items()} == {"far": "lent", "thin": "factored"}
    assert [(edge["wire_mode"], edge["wire_why"]) for edge in done.plan["edges"]] == [  # type: ignore[attr-defined]
        (one.mode, one.why) for one in summary.wire.values()
    ]
    assert "output" in (summary.traffic.up_bytes_by_kind or {}), "what lent adapters add is never sent"

    def stop(event: Event) -> None:
        if event.kind() == "checkpoint_written":
            raise KeyboardInterrupt

    path = place.config(FAR_AND_THIN, FEW_TOKENS)
    with pytest.raises(KeyboardInterrupt):
        atoll.train(path, out=place.folder / "stopped", observers=[stop])
    resumed = atoll.resume(place.folder / "stopped")
    assert (resumed.adapter / "adapter_model.safetensors").read_bytes() == done.weights
    assert resumed.summary.wire == summary.wire


def test_a_host_that_does_not_know_what_auto_chose_is_told_with_what_to_do() -> None:
    host = served(random_model("llama", BLOCKS))
    older = replace(host, facts=lambda cut: replace(host.facts(cut), wire_modes=("dense", "factored")))
    for chosen, do in ((True, 'write mode = "dense" below [wire]'), (False, "choose one of the host's for wire.mode")):
        _, client = device_trainer("llama", Cut(1, 0), thread_host(older), mode="lent")
        client._terms = replace(client._terms, chosen=chosen)
        with pytest.raises(HostRefusedError, match="wire_mode does not fit") as refusal:
            client.connect(Given({}, {}, False))
        assert refusal.value.do is not None
        assert refusal.value.do.startswith(do)
        client.use("factored")
        client.connect(Given({}, {}, False)).stream.transport.close()
