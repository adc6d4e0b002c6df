"""What one upload may cost, whoever sent it."""

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Limits:
    """Checked while the file is read; the last five are the operating system's to enforce."""

    rows: int = 20_000_000
    columns: int = 10_000
    vector_length: int = 100_000
    cell_bytes: int = MIB  # one text, label or name
    name_length: int = 200  # of a rights holder or labeller, in characters
    parties: int = 100_000  # distinct names per role
    schema_depth: int = 4  # lists and structs inside each other
    ratio: int = 100  # decoded bytes over file bytes, beyond `free_bytes`
    free_bytes: int = 256 * MIB
    # Virtual memory is a multiple of what is resident: libraries, thread stacks and allocator arenas are mapped, not used.
    memory_bytes: int = 4 * GIB
    output_bytes: int = 16 * GIB
    cpu_seconds: int = 3_600
    wall_seconds: int = 3_600
    open_files: int = 64
