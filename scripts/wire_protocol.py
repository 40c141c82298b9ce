"""Make src/atoll/wire/protocol_pb2.py and its types from protocol.proto.

Usage: python scripts/wire_protocol.py      (needs grpcio-tools, of the `dev` extra)
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

SOURCES = Path(__file__).resolve().parents[1] / "src"
PROTO = "atoll/wire/protocol.proto"
"""From the sources' folder: the name under which protobuf registers the file, so that no other package's protocol.proto meets it."""
GENERATED = ("atoll/wire/protocol_pb2.py", "atoll/wire/protocol_pb2.pyi")


def generate(folder: Path) -> None:
    """Write the generated files below `folder`, which stands for src/."""
    bundled = resources.files("grpc_tools") / "_proto"
    status = protoc.main(["protoc", f"-I{SOURCES}", f"-I{bundled}", f"--python_out={folder}", f"--pyi_out={folder}", PROTO])
    if status != 0:
        raise SystemExit(f"protoc ended with {status}")


if __name__ == "__main__":
    generate(SOURCES)
    print("written:", *GENERATED, file=sys.stderr)
