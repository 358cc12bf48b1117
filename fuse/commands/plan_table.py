"""What `fuse plan` prints."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.console import Console

from fuse.commands.tables import figures_table, print_table
from fuse.driver.ledger_entry import Phase
from fuse.driver.memory import Ledger

GB = 1e9


def show(console: Console, planned: Ledger, figures: dict[str, Any]) -> None:
    """Print the fullest device's ledger, and what `figures` says of the run."""
    setup, device = planned.setup, planned.fullest_device
    rows: defaultdict[str, list[list[str]]] = defaultdict(list)
    for entry in planned.devices[device]:
        rows[entry.role].append([f"{entry.role}: {entry.what}", *(_gb(entry.bytes.get(phase, 0)) for phase in Phase)])
    lines = [row for of_role in rows.values() for row in of_role if any(cell != "-" for cell in row[1:])]
    lines.append(["together", *(_gb(planned.total(device, phase)) for phase in Phase)])
    if setup.is_fused:
        lines.append(["training, serial / fused", "", "", f"{_gb(planned.serial_bytes)} / {_gb(planned.fused_bytes)}"])
    if figures["bidirectional"]:
        console.print("two opposite replicas of the policy, if that is faster than plain 1F1B", markup=False)
    if any(replica.layer_ranges for replica in setup.placement):
        layers = "; ".join(f"{role} {' '.join(map(str, counts))}" for role, counts in figures["layers"].items())
        console.print(f"stages are cut by size, for even ones do not fit; layers of each: {layers}", markup=False)
    title = f"GB on device {device} of {setup.num_devices}, the fullest; {setup.scoring} scoring"
    print_table(figures_table(("", *map(str, Phase)), lines, title=title, no_wrap=True), console)
    memory, spare = setup.device_memory_bytes / GB, planned.spare_bytes / GB
    answer = f"fits: {spare:.1f} GB of {memory:g} to spare" if planned.fits else f"does not fit: {-spare:.1f} GB over"
    console.print(f"host memory of all devices together: {_gb(planned.host_bytes)} GB", markup=False)
    response, sequences = figures["max_response_length"], figures["max_micro_batch_size"]
    console.print(answer if planned.fits else f"{answer} {memory:g}", markup=False)
    if response:
        console.print(f"largest that fits, all else equal: responses of {response} tokens", end="", markup=False)
        console.print(f", or micro-batches of {sequences}" if sequences else "", markup=False)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.1f}" if num_bytes >= GB / 20 else "-" if num_bytes == 0 else "<0.1"
