#!/usr/bin/env python3
"""What the network costs: against one process, against a bare gRPC echo, with eight clients, and on a slow link.

    python benchmarks/network.py --out results/network.json [--only step echo clients link]

Server and clients are processes of their own on one machine, with TLS. Ratios are between figures taken in turn in the
same run. Pictures are those that ship with snello, not augmented, so that loading them costs little.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import snello.split  # noqa: F401  before gRPC, see there

# isort: split
import grpc.aio
import torch
from environment import environment
from proxy import Proxy
from rich.console import Console

from snello.config import AugmentConfig, CertsConfig, FinetuneConfig, JoinConfig, SplitConfig
from snello.environment import set_environment
from snello.split.client.connection import Connection
from snello.split.client.endpoints import make_endpoint
from snello.split.client.join import RemoteSession
from snello.split.learner import SplitLearner
from snello.split.local import LocalSession
from snello.split.security.certs import make_certs
from snello.split.security.tls import ServerFiles
from snello.split.server.sessions import Answer
from snello.split.wire import chunks, frames
from snello.split.wire.frames import Frame, Kind, control
from snello.split.wire.handshake import Hello

DEIT = {"model": "deit_tiny_patch16_224", "weights": "none", "method": "full", "batch_size": 128, "epochs": 5}
MICRO = {"model": "vit_micro_patch4_32", "weights": "none", "method": "full", "batch_size": 64, "epochs": 20}
PLAIN = AugmentConfig(flip=False, crop_scale=1.0, rand_ops=0)
QUIET = Console(quiet=True)


FEW = "adc(samples=1, tokens=0.4)+int4"  # bytes that do not depend on weights


def main() -> None:
    set_environment()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/network.json"))
    parser.add_argument("--only", nargs="*", default=["echo", "step", "clients", "link"])
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_certs(CertsConfig(work / "certs", host=("localhost",), clients=tuple(f"c{i}" for i in range(8))))
        for name in args.only:
            started = time.perf_counter()
            measured = {"echo": echo, "step": step, "clients": clients, "link": link}[name](work)
            results[name] = measured | {"seconds": round(time.perf_counter() - started)}
            results[name]["environment"] = environment(torch.device("cpu"))
            print(name, json.dumps(measured, indent=2), flush=True)
            args.out.write_text(json.dumps(results, indent=2) + "\n")


@contextlib.contextmanager
def serving(work: Path, settings: dict[str, Any], codec: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server process with TLS, its address and itself."""
    out = Path(tempfile.mkdtemp(dir=work)) / "server"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    flags += ["--augment.no-flip", "--augment.crop-scale=1", "--augment.rand-ops=0", "--checkpoint-steps=0"]
    flags += [f"--split.codec={codec}", "--split.cut=3", f"--certs={work / 'certs'}", "--listen=127.0.0.1:0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "snello.cli", "serve", *flags, f"--out={out}"], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if "listening on" in line:
                port = line.split("listening on 127.0.0.1:")[1].split()[0]
                break
        else:
            raise RuntimeError("the server did not start")
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield f"127.0.0.1:{port}", server
    finally:
        server.terminate()
        server.wait(30)


def joined(work: Path, address: str, client: str = "c0", workers: int = 1) -> RemoteSession:
    config = JoinConfig(
        address,
        certs=work / "certs",
        name=client,
        out=Path(tempfile.mkdtemp(dir=work)) / "run",
        workers=workers,
        check_pictures=False,
    )
    return RemoteSession(config, console=QUIET)


def step_seconds(session: Any, steps: int) -> float:
    started = time.perf_counter()
    taken = session.run(steps)
    assert taken["steps"] == steps
    return (time.perf_counter() - started) / steps


# ------------------------------------------------------------------------------------------ against one process


def step(work: Path, rounds: int = 4, steps: int = 3) -> dict[str, Any]:
    """Wall time per step over the network against the same training in one process, in turn."""
    codec = "adc(0.1)"
    config = FinetuneConfig(
        **DEIT,
        augment=PLAIN,
        split=SplitConfig(cut=3, codec=codec),
        workers=1,
        check_pictures=False,
        compare=False,
        checkpoint_steps=0,
        out=Path(tempfile.mkdtemp(dir=work)) / "run",
    )
    local = LocalSession(config, console=QUIET)
    with serving(work, DEIT, codec) as (address, _):
        remote = joined(work, address)
        for session in (local, remote):
            session.run(1)
        seconds: dict[str, list[float]] = {"one_process": [], "network": []}
        for _ in range(rounds):
            seconds["one_process"].append(step_seconds(local, steps))
            seconds["network"].append(step_seconds(remote, steps))
        remote.close()
    ratios = [n / one for one, n in zip(*seconds.values(), strict=True)]
    return {
        "config": {**DEIT, "codec": codec, "rounds": rounds, "steps": steps},
        **{f"{name}_seconds": round(statistics.median(values), 4) for name, values in seconds.items()},
        "all_seconds": seconds,
        "ratio": round(statistics.median(ratios), 4),
    }


# -------------------------------------------------------------------------------------------- against a bare echo


class EchoSession:
    """Answers every frame with its own arrays, through all that a frame goes through but the model."""

    max_body = 1 << 24

    def take(self, data: bytearray) -> Answer:
        frame = frames.read([data], self.max_body)
        answer = Frame(Kind.EVALUATED, frame.step, frame.micro, frame.arrays)
        return Answer(chunks.of(answer))


class EchoRegistry:
    def open(self, client: str, hello: Hello) -> tuple[str, EchoSession, Frame]:
        welcome = {"time": time.time(), "version": "echo"}
        return "echo", EchoSession(), control(Kind.WELCOME, welcome)

    def leave(self, name: str) -> None:
        pass

    def forget_idle(self) -> None:
        pass

    def save_all(self) -> None:
        pass


def _echo_servers(certs: Path, ports: Any) -> None:
    """A process with both servers: ours without a model, and a bare one."""
    import logging

    from snello.split.security.auth import Both, Certificates, Tokens
    from snello.split.server.streams import Server
    from snello.split.server.telemetry import Telemetry

    async def bare(request_iterator: Any, context: Any) -> Any:
        async for message in request_iterator:
            yield message

    async def run() -> None:
        files = ServerFiles.load(certs)
        tls = grpc.ssl_server_credentials([(files.key, files.certificate)], files.ca, True)
        log = logging.getLogger("echo")
        log.addHandler(logging.NullHandler())
        who = Both(Certificates(), Tokens(files.tokens_file))
        server = Server(EchoRegistry(), who, Telemetry(log), log)
        ours = await server.start("127.0.0.1:0", tls)
        other = grpc.aio.server(options=[("grpc.max_receive_message_length", 1 << 24)])
        handler = grpc.method_handlers_generic_handler(
            "bare.Echo", {"Echo": grpc.stream_stream_rpc_method_handler(bare)}
        )
        other.add_generic_rpc_handlers((handler,))
        port = other.add_secure_port("127.0.0.1:0", tls)
        await other.start()
        ports.put((ours, port))
        await asyncio.Event().wait()

    asyncio.run(run())


def echo(work: Path, rounds: int = 200, size: int = 2 << 20) -> dict[str, Any]:
    """Round trip of a frame of 2 MiB, and of as many bytes through a bare grpc.aio stream, in turn."""
    context = multiprocessing.get_context("spawn")
    ports: Any = context.Queue()
    process = context.Process(target=_echo_servers, args=(work / "certs", ports), daemon=True)
    process.start()
    ours, bare = ports.get(timeout=60)
    endpoint = make_endpoint(f"127.0.0.1:{ours}", work / "certs", "c0")
    connection = Connection(endpoint, lambda: Hello("inference", session="0" * 32), max_body=1 << 24)
    connection.open()
    frame = Frame(Kind.EVALUATION, 0, 0, {"activations": torch.randint(0, 255, (size,), dtype=torch.uint8)})
    message = bytes(frame.arrays["activations"].numpy())
    loop = asyncio.new_event_loop()
    tls = grpc.ssl_channel_credentials(endpoint.ca, endpoint.key, endpoint.certificate)

    async def connect() -> tuple[Any, Any]:
        limit = [("grpc.max_receive_message_length", 1 << 24)]
        channel = grpc.aio.secure_channel(f"127.0.0.1:{bare}", tls, options=limit)
        return channel, channel.stream_stream("/bare.Echo/Echo")()

    channel, call = loop.run_until_complete(connect())

    async def once() -> None:
        await call.write(message)
        assert len(await call.read()) == len(message)

    def bare_trip() -> None:
        loop.run_until_complete(once())

    def our_trip() -> None:
        answer = connection.exchange(frame)
        assert answer.arrays["activations"].numel() == size

    seconds: dict[str, list[float]] = {"snello": [], "bare": []}
    for index in range(rounds + 10):
        for name, trip in (("snello", our_trip), ("bare", bare_trip)):
            started = time.perf_counter()
            trip()
            if index >= 10:
                seconds[name].append(time.perf_counter() - started)
    connection.close()
    call.cancel()
    loop.run_until_complete(channel.close())
    process.terminate()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "config": {"bytes": size, "rounds": rounds},
        **{f"{name}_ms": round(1000 * value, 3) for name, value in medians.items()},
        "ratio": round(medians["snello"] / medians["bare"], 4),
    }


# --------------------------------------------------------------------------------------------------- many clients


def _client(work: Path, address: str, name: str, barrier: Any, done: Any, steps: int) -> None:
    torch.set_num_threads(1)  # clients are machines of their own: here they would only wait for each other's threads
    session = joined(work, address, name, workers=0)
    session.run(2)
    barrier.wait(300)
    started = time.time()
    session.run(steps)
    done.put((name, started, time.time()))
    barrier.wait(300)
    session.close()


def _throughput(work: Path, num: int, steps: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    with serving(work, MICRO, "adc(0.1)") as (address, server):
        barrier, done = context.Barrier(num + 1), context.Queue()
        processes = [
            context.Process(target=_client, args=(work, address, f"c{i}", barrier, done, steps)) for i in range(num)
        ]
        for process in processes:
            process.start()
        barrier.wait(300)
        times = [done.get(timeout=600) for _ in processes]
        memory = _rss(server.pid)
        barrier.wait(300)
        for process in processes:
            process.join(60)
    seconds = max(end for _, _, end in times) - min(start for _, start, _ in times)
    each = [end - start for _, start, end in times]
    return {
        "steps_per_second": num * steps / seconds,
        "server_rss_bytes": memory,
        "slowest_over_fastest": max(each) / min(each),
    }


def _rss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def clients(work: Path, steps: int = 20) -> dict[str, Any]:
    """Steps per second of eight clients together against one, and what a session more costs the server in memory."""
    from snello.config import ServeConfig
    from snello.split.server.half import Sizes

    rows: dict[int, list[dict[str, float]]] = {1: [], 8: []}
    for num, taken in rows.items():
        taken.append(_throughput(work, num, steps))
    best = {num: max(row["steps_per_second"] for row in taken) for num, taken in rows.items()}
    rss = {num: min(row["server_rss_bytes"] for row in taken) for num, taken in rows.items()}
    settings = {name: value for name, value in MICRO.items() if name != "weights"}
    sizes = Sizes(ServeConfig(**settings, split=SplitConfig(cut=3, codec="adc(0.1)")), 10, "fp32")
    return {
        "config": {**MICRO, "codec": "adc(0.1)", "steps": steps},
        "runs": {str(num): taken for num, taken in rows.items()},
        "steps_per_second": {str(num): round(value, 3) for num, value in best.items()},
        "ratio": round(best[8] / best[1], 4),
        "bytes_per_session": round((rss[8] - rss[1]) / 7),
        "weights_and_moments_bytes": sizes.state * 3 // 4,
        "two_messages_bytes": sizes.messages,
        "slowest_over_fastest": round(rows[8][0]["slowest_over_fastest"], 3),
    }


# ------------------------------------------------------------------------------------------------------ slow link


def link(work: Path, delay: float = 0.02, bits_per_second: float = 10e6) -> dict[str, Any]:
    """Steps on a slow link, without a codec and with the recommended one, against compute and bytes."""
    rows: dict[str, Any] = {}
    for codec, fast, slow in (("none", 3, 2), (FEW, 3, 6)):
        with serving(work, DEIT, codec) as (address, _):
            fast_session = joined(work, address)
            fast_session.run(1)
            compute = step_seconds(fast_session, fast)
            fast_session.close()
            host, _, port = address.rpartition(":")
            with Proxy((host, int(port)), seconds=delay / 2, bits_per_second=bits_per_second) as proxy:
                session = joined(work, proxy.address, "c1")
                session.run(1)
                learner = session.trainer.learner
                assert isinstance(learner, SplitLearner)
                counters = learner.ledger.counters
                before = counters.training
                measured = step_seconds(session, slow)
                size = (counters.training - before) / slow
                session.close()
        predicted = compute + size * 8 / bits_per_second + delay
        rows[codec] = {
            "bytes_per_step": round(size),
            "loopback_seconds": round(compute, 3),
            "predicted_seconds": round(predicted, 3),
            "seconds": round(measured, 3),
        }
    speedup = rows["none"]["seconds"] / rows[FEW]["seconds"]
    predicted = rows["none"]["predicted_seconds"] / rows[FEW]["predicted_seconds"]
    return {
        "config": {**DEIT, "round_trip_s": delay, "bits_per_second": bits_per_second},
        "codecs": rows,
        "speedup": round(speedup, 3),
        "predicted_speedup": round(predicted, 3),
        "of_predicted": round(speedup / predicted, 4),
    }


if __name__ == "__main__":
    main()
