r"""Expert parallelism with real processes: GShard's layer on several devices of torch.distributed.

Each process is a device: it holds its share of the experts and of the tokens, and exchanges tokens
with the others by all-to-all. On one machine the processes are started here and talk over gloo:

    python -m effnb.hardware.codesign.expert_parallel --devices 2 --experts 8

Under torchrun the same module runs on several machines. The layer itself is in `gshard`.

Lepikhin, Lee, Xu, Chen, Firat, Huang, Krikun, Shazeer, Chen, "GShard: Scaling Giant Models with
Conditional Computation and Automatic Sharding", 2020, arXiv 2006.16668.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from effnb.hardware.codesign.gshard import Experts, capacity, dense_loop, moe_layer


@dataclass(frozen=True)
class Settings:
    """One run on several devices.

    Attributes:
        devices: Processes.
        experts: Experts of all together.
        groups: Groups of tokens of all together.
        tokens: Tokens of a group.
        model: Width of a token.
        hidden: Width of an expert.
        factor: Capacity factor; 0 gives every expert room for all tokens of a group.
        repeats: Timed repetitions.
        seed: Of weights and tokens.
    """

    devices: int = 2
    experts: int = 8
    groups: int = 4
    tokens: int = 64
    model: int = 64
    hidden: int = 128
    factor: float = 1.0
    repeats: int = 5
    seed: int = 0

    @property
    def slots(self) -> int:
        """Capacity of an expert for each group."""
        return capacity(self.tokens, self.experts, self.factor) if self.factor else self.tokens

    def check(self) -> None:
        """Refuse what cannot be spread.

        Raises:
            ValueError: With what is wrong.
        """
        for name in ("devices", "groups", "tokens", "model", "hidden", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 1.")
        if self.factor < 0:
            raise ValueError(f"the capacity factor is {self.factor}; it has to be 0 or above.")
        if self.experts < 2:
            raise ValueError(f"experts is {self.experts}; each token chooses two.")
        for name in ("experts", "groups"):
            if getattr(self, name) % self.devices:
                raise ValueError(
                    f"{getattr(self, name)} {name} cannot be shared equally by {self.devices} "
                    "devices; take a multiple."
                )

    def inputs(self) -> tuple[Tensor, Experts]:
        """All tokens and all experts, the same in every process."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        x = torch.randn(self.groups, self.tokens, self.model, generator=generator)
        return x, Experts.random(self.experts, self.model, self.hidden, seed=self.seed)


@dataclass(frozen=True)
class Report:
    """What one device measured.

    Attributes:
        device: Its number.
        seconds: Median time of the whole layer.
        exchange_seconds: Of that, the two all-to-alls.
        busy_seconds: Median time that the processor worked for this process during the layer, which
            other programs on the machine hardly change.
        sent_bytes: Bytes sent to other devices by both of them.
        operations: Arithmetic operations of its matrix products, as PyTorch's counter saw them: of
            the router, of bringing tokens to slots and back, and of the experts, empty slots too.
        largest_error: Largest difference to the dense loop on this device's tokens; None where
            tokens were dropped, so that there is nothing to compare.
        dropped_choices: Choices of this device's tokens that found their expert full.
        lost_tokens: Tokens of this device that no expert worked on.
        weight_bytes: Bytes of the experts that this device holds.
        output_sum: Sum of the outputs' squares, to compare runs by.
    """

    device: int
    seconds: float
    exchange_seconds: float
    busy_seconds: float
    sent_bytes: int
    operations: int
    largest_error: float | None
    dropped_choices: int
    lost_tokens: int
    weight_bytes: int
    output_sum: float


class _Link:
    """An all-to-all of torch.distributed that keeps the time and counts the bytes."""

    def __init__(self, devices: int) -> None:
        self.devices, self.seconds, self.bytes = devices, 0.0, 0

    def __call__(self, parts: Tensor) -> Tensor:
        received = torch.empty_like(parts)
        start = time.perf_counter()
        dist.all_to_all_single(received, parts)
        self.seconds += time.perf_counter() - start
        own = parts[dist.get_rank()]
        self.bytes += parts.nbytes - own.nbytes
        return received


def run_device(settings: Settings, device: int) -> Report:
    """One process's part; needs an initialized process group when there are several."""
    x, every = settings.inputs()
    share = settings.groups // settings.devices
    mine = x[device * share : (device + 1) * share]
    experts = every.part(device, settings.devices)
    link = _Link(settings.devices)
    times: list[float] = []
    exchanges: list[float] = []
    busy: list[float] = []
    counter = FlopCounterMode(display=False)
    for turn in range(settings.repeats + 1):
        link.seconds, link.bytes = 0.0, 0
        if settings.devices > 1:
            dist.barrier()
        start, work = time.perf_counter(), time.process_time()
        # The first turn warms up and is not timed: that is when operations are counted.
        with torch.inference_mode(), nullcontext() if turn else counter:
            out, routing = moe_layer(
                mine, experts, settings.slots, devices=settings.devices, exchange=link
            )
        times.append(time.perf_counter() - start)
        exchanges.append(link.seconds)
        busy.append(time.process_time() - work)
    error = None
    if not routing.dropped_choices:
        with torch.inference_mode():
            expected = dense_loop(mine.flatten(0, 1), every).view_as(mine)
        error = float((out - expected).abs().max())
    return Report(
        device,
        statistics.median(times[1:]),
        statistics.median(exchanges[1:]),
        statistics.median(busy[1:]),
        link.bytes,
        counter.get_total_flops(),
        error,
        routing.dropped_choices,
        routing.lost_tokens,
        experts.up.nbytes + experts.down.nbytes,
        float(out.double().square().sum()),
    )


def _loopback() -> None:
    """Keep gloo on this machine: without a name to look up, and invisible from outside."""
    if sys.platform == "win32" or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    for _, name in socket.if_nameindex():
        if name.startswith("lo"):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def run_processes(settings: Settings, *, seconds: float = 120.0) -> list[Report]:
    """Run the layer on as many processes of this machine, and collect what each reports.

    The processes find each other through a file, not a port, and talk over the loopback interface.

    Args:
        settings: What to run.
        seconds: After so long the processes are stopped.

    Raises:
        ValueError: Settings that cannot be spread.
        RuntimeError: When a process fails or takes too long; with the last line that it wrote.
    """
    settings.check()
    words = [f"--{name}={value}" for name, value in asdict(settings).items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    ranks = range(settings.devices)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        command = [sys.executable, "-m", "effnb.hardware.codesign.expert_parallel", *words]
        # Files, not pipes: a process that waits for another's exit must not wait for its reader.
        written = [Path(folder, f"{kind}{rank}") for rank in ranks for kind in ("out", "err")]
        files = [path.open("w", encoding="utf-8") for path in written]
        running = [
            subprocess.Popen(
                [*command, f"--store={store}", f"--rank={rank}"],
                stdout=files[2 * rank],
                stderr=files[2 * rank + 1],
                env=environment,
            )
            for rank in ranks
        ]
        end = time.monotonic() + seconds
        try:
            while any(p.poll() is None for p in running) and not any(p.returncode for p in running):
                if time.monotonic() > end:
                    raise RuntimeError(
                        f"the {settings.devices} processes did not finish within {seconds:.0f} s."
                    )
                time.sleep(0.02)
        finally:
            for process in running:  # the others would wait for one that failed
                process.kill()
            codes = [process.wait() for process in running]
            for file in files:
                file.close()
        said = [path.read_text(encoding="utf-8").strip().splitlines() for path in written]
    for code, errors in zip(codes, said[1::2]):
        if code > 0:
            raise RuntimeError(
                f"one of the processes failed: {(errors or ['it said nothing'])[-1]}"
            )
    if any(codes):
        raise RuntimeError("one of the processes was stopped from outside.")
    return [Report(**json.loads(lines[-1])) for lines in said[::2]]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: one device of several, or all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m effnb.hardware.codesign.expert_parallel",
        description="A layer of experts on several devices; prints a line of JSON for each.",
    )
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--store", help="a file by which the processes find each other")
    parser.add_argument("--rank", type=int, help="which of the processes this one is")
    given = vars(parser.parse_args(arguments))
    store, rank = given.pop("store"), given.pop("rank")
    torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if torchrun:
        given["devices"], rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    settings = Settings(**given)
    try:
        settings.check()
    except ValueError as problem:
        parser.error(str(problem))
    if rank is None:
        for report in run_processes(settings):
            print(json.dumps(asdict(report)))
        return
    torch.set_num_threads(1)
    if settings.devices > 1:
        if torchrun:
            dist.init_process_group("gloo")
        else:
            _loopback()
            files = dist.FileStore(store, settings.devices)
            dist.init_process_group("gloo", store=files, rank=rank, world_size=settings.devices)
    try:
        print(json.dumps(asdict(run_device(settings, rank))), flush=True)
        if settings.devices > 1:
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
