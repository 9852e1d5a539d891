"""Read an offline run's .wandb file: a LevelDB log (7-byte header, 32 KiB blocks) of protobufs."""

import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768


def records(folder: Path) -> list[Record]:
    """All records of the one run below `folder`."""
    (path,) = folder.rglob("run-*.wandb")
    content, position, parts, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:  # too little of the block is left for a header
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            found.append(Record.FromString(parts))
            parts = b""
    return found
