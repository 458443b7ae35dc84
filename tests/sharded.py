"""umm-kit with FSDP2 on CPUs, which accelerate gives to GPUs alone: its state is told so after the fact. For tests.

Like a user's run on GPUs otherwise. Process 0 prints how much of the trained weights it holds, and in how many pieces.
"""

import sys

import transformers.trainer
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_init = AcceleratorState.__init__


def init(self, *args, fsdp_plugin=None, **kwargs):
    fresh = "dynamo_plugin" not in AcceleratorState._shared_state  # as for GPUs: the first to ask decides
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = init


class Report(transformers.TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **_):
        parts = sum(isinstance(module, FSDPModule) for module in model.modules())
        weights = list(model.parameters())
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in weights)
        if args.process_index == 0:
            print(f"sharded: {parts} parts, {held / sum(p.numel() for p in weights):.2f} of the weights", flush=True)


transformers.trainer.DEFAULT_CALLBACKS.append(Report)

if __name__ == "__main__":
    from umm_kit.cli import main

    sys.exit(main())
