"""Modules that wait until they are used: nothing is loaded too soon, and whoever uses one has the real one."""

from __future__ import annotations

import subprocess
import sys

import pytest

BEGIN = """
import sys, warnings
warnings.simplefilter("ignore")
from rslp.train.late import StandIn, late_modules, loaded
with late_modules():
    import rslp.train.fit
    import rslp.helios.model
def waiting():
    return {name for name, module in sys.modules.items() if isinstance(module, StandIn)}
"""
WAITING = {
    "torch._dynamo",
    "torch._dynamo.utils",
    "torch.distributed.fsdp",
    "scipy.signal",
    "scipy.optimize",
    "scipy.spatial",
    "matplotlib",
    "matplotlib.axes",
    "matplotlib.colors",
    "matplotlib.pyplot",
}
STEP = """
import torch
layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(layer.parameters())
def step():
    optimizer.zero_grad()
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return layer.weight.sum().item()
"""
USES = {
    "the compiler": """
import torch
from lightning.fabric.wrappers import _unwrap_compiled
from torch._dynamo import OptimizedModule
model = torch.compile(torch.nn.Linear(2, 2), backend="eager")
assert isinstance(model, OptimizedModule) and type(model) is OptimizedModule
assert not isinstance(torch.nn.Linear(2, 2), OptimizedModule)
assert _unwrap_compiled(model)[0] is model._orig_mod
assert _unwrap_compiled(model._orig_mod) == (model._orig_mod, None)
assert torch.equal(model(torch.ones(1, 2)), model._orig_mod(torch.ones(1, 2)))
assert "torch._dynamo" not in waiting() and "torch._dynamo.utils" not in waiting()
assert sys.modules["torch._dynamo"] is torch._dynamo
""",
    "a setting of the compiler": """
import torch._dynamo
torch._dynamo.config.suppress_errors = True
from torch._dynamo import config
assert config.suppress_errors and config is sys.modules["torch._dynamo.config"]
""",
    "a module below the compiler": """
import torch._dynamo.eval_frame as frames
import torch._dynamo
assert frames is sys.modules["torch._dynamo.eval_frame"] is torch._dynamo.eval_frame
assert frames.__spec__.loader.path == frames.__file__
assert torch._dynamo.eval_frame.OptimizedModule is torch._dynamo.OptimizedModule
""",
    "a module below the compiler that it does not load itself": """
import torch._dynamo.debug_utils as below
import torch._dynamo
assert below is torch._dynamo.debug_utils is sys.modules["torch._dynamo.debug_utils"]
""",
    "optimiser steps, before and after a compiled model": STEP
    + """
before = step()
assert "torch._dynamo" in waiting()
compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
assert "torch._dynamo" not in waiting() and step() < before
""",
    "a function that the compiler leaves alone": """
import torch
@torch.compiler.disable
def odd(x):
    return x + torch.compiler.is_compiling()
assert odd(1) == 1 and "torch._dynamo" in waiting()
assert torch.compile(lambda x: odd(x) * 2, backend="eager")(torch.ones(1)).item() == 2
assert "torch._dynamo" not in waiting()
""",
    "sharding": """
import torch
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.nn import latent_mim
policy = latent_mim.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
assert type(policy) is MixedPrecisionPolicy and isinstance(policy, latent_mim.MixedPrecisionPolicy)
assert "torch.distributed.fsdp" not in waiting() and fully_shard.__module__.startswith("torch.distributed")
import torch.distributed.fsdp._fully_shard as below
assert below is torch.distributed.fsdp._fully_shard
""",
    "an operator of torchvision": """
import torch
from torchvision.ops import roi_align
boxes = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]])
assert roi_align(torch.ones(1, 1, 4, 4), boxes, output_size=1).item() == 1
""",
    "a plot of a metric": """
import matplotlib
matplotlib.use("agg")
from torchmetrics.classification import MulticlassAccuracy
metric = MulticlassAccuracy(2)
import torch
metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
figure, axes = metric.plot()
from matplotlib.axes import Axes
from matplotlib.figure import Figure
assert isinstance(figure, Figure) and isinstance(axes, Axes)
class Own(Axes): pass
assert not {name for name in waiting() if name.startswith("matplotlib")}
assert matplotlib.colors is sys.modules["matplotlib.colors"]
""",
    "scipy": """
import scipy
assert scipy.optimize.linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]
assert "scipy.signal" in waiting() and "scipy.optimize" not in waiting()
from scipy.signal import convolve
assert convolve([1, 2], [1]).tolist() == [1, 2] and "scipy.signal" not in waiting()
""",
    "W&B and boto3, where they are installed": """
import importlib.util
for name in ("wandb", "boto3"):
    if importlib.util.find_spec(name):
        assert name in waiting() and importlib.import_module(name).__version__
        assert name not in waiting() and sys.modules[name].__version__
""",
    "what looks through all modules": """
import inspect
inspect.getmodule(waiting), [hasattr(module, "__file__") for module in list(sys.modules.values())]
assert "torch._dynamo" in waiting()
""",
}


def outcome(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_training_stack_loads_none_of_them() -> None:
    outcome(f"missing = {WAITING!r} - waiting()\nassert not missing, missing")


@pytest.mark.parametrize("use", [pytest.param(use, marks=pytest.mark.slow) for use in USES])
def test_whoever_uses_one_has_the_real_one(use: str) -> None:
    outcome(USES[use])


def test_it_can_be_switched_off() -> None:
    code = "import os\nos.environ['RSLP_LATE_IMPORTS'] = 'off'\n" + BEGIN + "assert not waiting()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_what_was_loaded_before_is_left_alone() -> None:
    code = """
import sys, scipy.signal as before
from rslp.train.late import StandIn, late_modules
with late_modules():
    import scipy.signal
assert scipy.signal is before and not isinstance(before, StandIn)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
