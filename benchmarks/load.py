"""What `vitreous serve` does under more load than it can take, and what it holds in memory after many requests.

    python benchmarks/load.py --out benchmarks/results/DATE-MACHINE-load.md

A vit_tiny (random weights: speed does not depend on them) is served by a process of its own, on all cores, and asked by
this one, which takes some of the same cores. Photos are JPEGs of noise, blurred to the size of files of real ones.

1. Overload: requests leave at their times, `--rate` a second for `--seconds`, however many are under way. Accepted ones
   (200) should be answered soon, the others (503) at once, and none lost.
2. Memory: `--requests` requests, 32 at a time: the resident memory of the server, after a tenth of them and at the end.

The table goes to --out, or is printed; the last line is JSON.
"""

import argparse
import asyncio
import collections
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np
from PIL import Image, ImageFilter
from predict import make_run

CONCURRENCY = 32


def make_photos(count, size):
    rng = np.random.default_rng(0)
    photos = []
    for _ in range(count):
        image = Image.fromarray(rng.integers(0, 256, (size * 3 // 4, size, 3)).astype("uint8"))
        file = io.BytesIO()
        image.filter(ImageFilter.GaussianBlur(2)).save(file, "jpeg", quality=90)
        photos.append(file.getvalue())
    return photos


class Client:
    """HTTP/1.1 over as many connections as requests are under way: a library would take the server's cores."""

    def __init__(self, address):
        self.host, port = address.removeprefix("http://").split(":")
        self.port = int(port)
        self.idle = []

    async def post(self, photo):
        """Sends one photo; returns the status and the seconds that it took. 0 stands for a lost request."""
        start = time.perf_counter()
        try:
            reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, self.port)
            writer.write(
                f"POST /v1/predict HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: image/jpeg\r\n"
                f"Content-Length: {len(photo)}\r\n\r\n".encode()
                + photo
            )
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            return 0, time.perf_counter() - start
        if b"connection: close" in head:
            writer.close()
        else:
            self.idle.append((reader, writer))
        return int(head.split()[1]), time.perf_counter() - start


async def overload(client, photos, rate, seconds):
    """Sends requests at their times, whatever has become of the earlier ones."""
    start = time.perf_counter()
    tasks = []
    for i in range(int(rate * seconds)):
        await asyncio.sleep(max(0, start + i / rate - time.perf_counter()))
        tasks.append(asyncio.ensure_future(client.post(photos[i % len(photos)])))
    return await asyncio.gather(*tasks), time.perf_counter() - start


async def endure(client, photos, count, on_done):
    """Sends `count` requests, `CONCURRENCY` at a time; calls `on_done` with how many are done."""
    done, statuses = 0, collections.Counter()

    async def work(offset):
        nonlocal done
        for i in range(offset, count, CONCURRENCY):
            status, _ = await client.post(photos[i % len(photos)])
            statuses[status] += 1
            done += 1
            on_done(done)

    start = time.perf_counter()
    await asyncio.gather(*(work(offset) for offset in range(CONCURRENCY)))
    return statuses, time.perf_counter() - start


def resident_megabytes(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024 / 1e6


def milliseconds(values, quantile):
    return round(1000 * float(np.quantile(values, quantile)), 1) if values else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--photo-size", type=int, default=500, help="width of the photos, in pixels")
    parser.add_argument("--rate", type=float, default=200, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="Markdown table")
    options = parser.parse_args()
    photos = make_photos(16, options.photo_size)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(options.model, options.image_size, folder)
        log = Path(folder) / "log"
        with log.open("w") as stderr:
            server = subprocess.Popen(
                [sys.executable, "-m", "vitreous", "serve", str(run), "--port", "0", "--no-use-explain"],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        try:
            line = server.stdout.readline()
            if " at http://" not in line:
                sys.exit(f"The server did not start: {line}{log.read_text()}")
            client = Client(line.split(" at ")[1].split()[0])
            row = asyncio.run(measure(client, photos, options, server.pid))
            server.send_signal(signal.SIGTERM)
            row["exit_code"] = server.wait(60)
        finally:
            server.kill()
            server.wait()
    table = (
        "| model | requests/s sent | accepted | p50 ms | p99 ms | refused (503) | median ms | lost | "
        "memory after a tenth | after all | requests |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
        f"| {row['model']} | {row['rate']:g} | {row['num_accepted']} | {row['accepted_p50_ms']} | "
        f"{row['accepted_p99_ms']} | {row['num_refused']} | {row['refused_p50_ms']} | {row['num_lost']} | "
        f"{row['early_megabytes']:.0f} MB | {row['late_megabytes']:.0f} MB | {row['num_requests']:,} |\n"
    )
    if options.out:
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        options.out.write_text(f"# Under load\n\n{date.today()}, {machine}. `python benchmarks/load.py`\n\n{table}")
    print(table)
    print(json.dumps(row))


async def measure(client, photos, options, pid):
    await endure(client, photos, 2 * CONCURRENCY, lambda done: None)  # threads and connections come to be
    results, seconds = await overload(client, photos, options.rate, options.seconds)
    accepted = [each for status, each in results if status == 200]
    refused = [each for status, each in results if status == 503]
    memory = {}

    def note(done):
        if done in (max(1, options.requests // 10), options.requests):
            memory[done] = resident_megabytes(pid)

    statuses, all_seconds = await endure(client, photos, options.requests, note)
    return {
        "model": options.model,
        "num_cores": len(os.sched_getaffinity(0)),
        "rate": options.rate,
        "seconds": round(seconds, 2),
        "num_sent": len(results),
        "num_accepted": len(accepted),
        "num_refused": len(refused),
        "num_lost": len(results) - len(accepted) - len(refused),
        "accepted_p50_ms": milliseconds(accepted, 0.5),
        "accepted_p99_ms": milliseconds(accepted, 0.99),
        "refused_p50_ms": round(1000 * statistics.median(refused), 1) if refused else None,
        "refused_p99_ms": milliseconds(refused, 0.99),
        "num_requests": options.requests,
        "requests_per_second": round(options.requests / all_seconds, 1),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "early_megabytes": round(min(memory.items())[1], 1),
        "late_megabytes": round(max(memory.items())[1], 1),
    }


if __name__ == "__main__":
    main()
