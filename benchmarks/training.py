"""Examples per second and peak memory of the trainers, beside a plain loop of both flows in the same run.

    python benchmarks/training.py [--model tiny-tight-0] [--batch 32] [--steps 20] [--compile] [--output FILE.json]

On a GPU it computes in bf16 and asks torch for its peak; on a CPU it computes in float32 and the peak is that of the process so
far, so that only its first row says something. Rows run one after another: on a busy machine run it twice.
"""

import argparse
import resource
import shlex
import sys
import tempfile
import time

import torch
from transformers import TrainerCallback

import umm_kit as uk
from umm_kit.models.base import resolve_device
from umm_kit.records import machine, versions, write_json
from umm_kit.trainers.stages import FlowCollator, Flows
from umm_kit.trainers.variants import DIVAConfig

WARM = 3  # steps that are not counted
PLAIN = {"shared_weight": 0.0, "unique_weight": 0.0, "ema_decay": 0.0, "train_all_layers": True}
ARMS = {"fine-tuning": PLAIN, "LoRA, middle layers": {**PLAIN, "train_all_layers": False, "lora_rank": 8}, "DIVA, stage 2": {}}


class Clock(TrainerCallback):
    """When each step ended; the device has done all of it by then."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def config_of(options, **changes):
    quiet = {
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10**6,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    size = {"per_device_train_batch_size": options.batch, "max_steps": options.steps + WARM, "stage1_steps": 2}
    folder = tempfile.mkdtemp()
    fast = {"bf16": torch.cuda.is_available(), "torch_compile": options.compile}
    return DIVAConfig.tiny(output_dir=folder, **{**size, **quiet, **fast, **changes})


def floor(options, data):
    """Both flows forward and backward, and AdamW, on one batch that is there already."""
    config, device = config_of(options), resolve_device()
    model = uk.load(options.model, device=device).train()
    items = [{**data[i], "number": i, "index": i} for i in range(options.batch)]
    batch = FlowCollator(data, model.grid, config, config.replay_every)(items)
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    optimizer, ends = torch.optim.AdamW(model.parameters(), lr=1e-5), []
    flows = torch.compile(Flows(model)) if options.compile else Flows(model)
    for _ in range(options.steps + WARM):
        with torch.autocast(device.type, torch.bfloat16, enabled=torch.cuda.is_available()):
            u, g = flows(batch, [])
        (u.loss + g.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return ends


def trained(options, data, changes):
    clock, model = Clock(), uk.load(options.model, device="cpu")
    uk.DIVATrainer(model, config_of(options, **changes), data, callbacks=[clock]).train()
    return clock.ends[-options.steps - WARM :]  # those before are of stage 1


def peak():
    """MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-tight-0")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output")
    options, rows = parser.parse_args(), []
    data = uk.Shapes("train", n=4096)
    runs = {"floor": lambda: floor(options, data)} | {
        name: lambda changes=changes: trained(options, data, changes) for name, changes in ARMS.items()
    }
    for name, run in runs.items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        ends = run()
        rate = options.batch * options.steps / (ends[-1] - ends[WARM - 1])
        rows.append({"what": name, "pairs_per_second": rate, "of_floor": rate / (rows[0]["pairs_per_second"] if rows else rate)})
        rows[-1]["peak_mib"] = peak()
        print(f"{name:22} {rate:8.1f} pairs/s  {rows[-1]['of_floor']:5.2f} of the floor  peak {rows[-1]['peak_mib']:8.0f} MiB")
    if options.output:
        record = {"command": shlex.join(["python", *sys.argv]), "versions": versions(), "device": machine()}
        write_json(options.output, {"record": record, "rows": rows})


if __name__ == "__main__":
    main()
