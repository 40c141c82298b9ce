"""A device without a copy of the base: its part comes from the host, once."""

from __future__ import annotations

from pathlib import Path

from atoll.config.load import LoadedConfig, changed
from atoll.engines.split.certificates import open_channel
from atoll.engines.split.cut import Cut
from atoll.engines.split.device.parts import fetch_part
from atoll.jobs.split import HostAccess


def with_fetched_base(loaded: LoadedConfig, access: HostAccess, folder: Path) -> LoadedConfig:
    """The config with its base in `folder`, which is fetched from the host where it is not there yet.

    Raises: TransportError, HostLostError, HostRefusedError, FrameError, OutputError.
    """
    cut = loaded.config.model.cut
    if not folder.exists():
        with open_channel(access.address, access.tls, insecure=access.insecure) as channel:
            fetch_part(channel, Cut(cut.front, cut.back), folder)
    return changed(loaded, [f"model.base={folder.absolute()}"])
