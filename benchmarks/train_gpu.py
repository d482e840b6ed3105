"""How many images a second does one GPU train on, and what share of its peak is that (MFU), beside timm?

The steps are those of benchmarks/train.py, for vit_small/16 and vit_base/16 at 224 pixels in bfloat16: ours on jax and
on torch, timm eager and torch.compile, each in its own process, taking turns. MFU is 6 FLOPs for a multiply-accumulate
of the matrix products, over the peak that `--peak-tflops` names (dense bfloat16; 989 for an H200 or H100).

    python benchmarks/train_gpu.py --peers-python PATH --out benchmarks/results/DATE-gpu-train.md
    python benchmarks/train_gpu.py --miniature     # the same on a CPU, with a model of a few thousand weights
"""

import argparse
import json
import sys
from datetime import date
from pathlib import Path

import train

CONTENDERS = ("ours jax bfloat16", "ours torch bfloat16", "timm eager bfloat16", "timm compile bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["gpu_small", "gpu_base"], choices=["gpu_small", "gpu_base"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of each contender in a round")
    parser.add_argument("--miniature", action="store_true", help="a tiny model, on whatever device there is")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.miniature:
        options.workloads, options.rounds, options.steps = ["miniature"], 1, 1
    results, lines = [], []
    for workload in options.workloads:
        lines += [f"**{train.WORKLOADS[workload][0]}**", "", "| | images/s | MFU |", "|---|---|---|"]
        for row in train.measure(workload, options):
            row["mfu"] = row["images_per_second"] * 6 * train.count(workload) / (options.peak_tflops * 1e12)
            for key in ("share_of_ceiling", "ceiling_gflops", "peak_mib"):  # of the CPU's side
                del row[key]
            lines.append(f"| {row['contender']} | {row['images_per_second']:.1f} | {row['mfu']:.2%} |")
            results.append(row)
        lines.append("")
    text = "\n".join(lines)
    print(text)
    if options.out:
        options.out.write_text(f"# Training speed on one GPU\n\n{date.today()}\n\n{text}")
    print(json.dumps({"benchmark": "train_gpu", "miniature": options.miniature, "rows": results}))


if __name__ == "__main__":
    main()
