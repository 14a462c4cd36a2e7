"""--compile: one graph for all steps of a run, without a break, and the run is otherwise the same.

dynamo's graphs, breaks and guards don't depend on the backend.  "eager" runs a graph with torch's
own kernels: without a compiler, in a second, and to the last digit as the network itself.
"""

import functools

import forked
import pytest
import torch
from conftest import digest, metrics, trained
from torch import nn
from torch._dynamo import config
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func

import eval.features
import train_baseline
import train_byol
from byol.byol import BYOL
from variants.barlow_twins import BarlowTwins
from variants.dino import DINO
from variants.moco_v3 import MoCoV3
from variants.simclr import SimCLR
from variants.simsiam import SimSiam
from variants.vicreg import VICReg

METHODS = [BYOL, SimCLR, SimSiam, BarlowTwins, VICReg, MoCoV3, DINO]
# two images a micro-batch: each operation gets none, one and all of them
FLAGS = ["--batch-size", "4", "--accumulate", "2", "--compile", "--quiet", "--recipe"]


class Dropped(BYOL):
    """BYOL with randomness of its own in the forward pass."""

    def forward(self, view1, view2):
        return super().forward(nn.functional.dropout(view1), nn.functional.dropout(view2))


@pytest.fixture
def once(monkeypatch):
    """A break or a recompilation fails, one for an earlier run in the same process as well."""
    compiled = functools.partialmethod(nn.Module.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", compiled)
    monkeypatch.setattr(eval.features, "BATCH", 64)  # 100 images: the last batch has 36
    with config.patch(error_on_recompile=True):
        yield


@pytest.fixture
def replays(monkeypatch):
    """Compiled graphs that write to the same memory each time; a forward pass spoils all of it."""
    memory = []

    def graph(module, inputs, forward):
        own = {}

        def run(*given):
            if forward:
                for x in memory:
                    x.fill_(float("nan"))
            with torch.no_grad():
                outputs = list(module(*given))
            places = {x.untyped_storage().data_ptr() for x in given if torch.is_tensor(x)}
            for i, x in enumerate(outputs):
                fresh = torch.is_tensor(x) and x.untyped_storage().data_ptr() not in places
                if fresh and x.is_floating_point():
                    if i not in own:
                        own[i] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
                        memory.append(own[i])
                    outputs[i] = own[i].copy_(x).detach()
            return outputs

        return make_boxed_func(run)

    forward, backward = (functools.partial(graph, forward=f) for f in (True, False))
    compilers = dict(fw_compiler=forward, inference_compiler=forward, bw_compiler=backward)
    backend = aot_autograd(**compilers)
    compiled = functools.partialmethod(nn.Module.compile, backend=backend)
    monkeypatch.setattr(nn.Module, "compile", compiled)


def graphs(*runs, ranks=1) -> list[list[int]]:
    """How many graphs each of these runs has compiled, in turn in a forked process, for each rank.

    Forked, since tracing starts threads of autograd: later tests could not fork this process.
    """

    def count():
        counts = []
        for main, *flags in runs:
            counters.clear()
            main(argv=flags)
            counts.append(counters["stats"]["unique_graphs"])
        return counts

    return forked.run(count, ranks=ranks, limit=200)


def same(a, b, steps):
    """Two runs have the same metrics, state and encoder, names of weights included."""
    assert metrics(a) == metrics(b) and trained(a, steps) == trained(b, steps)
    first, second = (torch.load(f / "encoder.pt", weights_only=True) for f in (a, b))
    assert digest(first["state_dict"]) == digest(second["state_dict"])


def test_every_method_is_one_graph_and_computes_the_same(sample, recipe, tmp_path, once):
    runs = [[functools.partial(train_byol.main, m), "--knn-every", "2"] for m in METHODS]
    runs += [[train_byol.main, "--knn-every", "2", "--online-probe"]]
    runs += [[train_baseline.main, "--labels", "100"]]
    flags = ["--steps", "5", *FLAGS, recipe, "--out"]
    pairs = []
    for number, run in enumerate(runs):
        pairs.append([*run, *flags, str(tmp_path / f"{number}")])
        pairs.append([*run, *flags, str(tmp_path / f"{number}-plain"), "--no-compile"])
    assert graphs(*pairs) == [[1, 0] * len(runs)]
    for number in range(len(runs)):
        same(tmp_path / f"{number}", tmp_path / f"{number}-plain", 5)


def test_methods_survive_memory_that_the_next_step_overwrites(sample, recipe, tmp_path, replays):
    """As on a GPU: a run with outputs or gradients of an earlier forward pass would be another."""
    flags = ["--steps", "5", "--batch-size", "16", "--quiet", "--recipe", recipe, "--out"]
    byol = [train_byol.main, "--optimizer", "lars", "--lr", "0.2"]
    runs = [[*byol, "--byol.whiten", "--online-probe", "--knn-every", "2"]]
    runs += [[functools.partial(train_byol.main, DINO)], [train_baseline.main, "--labels", "100"]]
    runs += [[*byol, "--accumulate", "2"]]  # why it gets no CUDA graphs
    pairs = []
    for number, run in enumerate(runs):
        pairs.append([*run, *flags, str(tmp_path / f"{number}"), "--compile"])
        pairs.append([*run, *flags, str(tmp_path / f"{number}-plain")])
    graphs(*pairs)
    off = []
    for number in range(len(runs)):
        found, expected = (metrics(tmp_path / f"{number}{which}") for which in ("", "-plain"))
        pairs = zip(found, expected, strict=True)
        off.append(max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs))
    assert max(off[:3]) < 1e-3 < 5e-3 < off[3]


def test_it_resumes_bit_for_bit(sample, recipe, tmp_path, once):
    run = [functools.partial(train_byol.main, Dropped), "--steps", "5", *FLAGS, recipe, "--out"]
    whole, part = str(tmp_path / "whole"), str(tmp_path / "part")
    assert graphs([*run, whole]) == [[1]]
    assert graphs([*run, part, "--stop-after", "2"]) == [[1]]
    assert graphs([*run, part, "--resume"]) == [[1]]
    same(tmp_path / "part", tmp_path / "whole", 5)


@pytest.mark.scale
@pytest.mark.parametrize("kind", ["sync", "local"])
def test_two_processes_have_one_graph_each(sample, recipe, tmp_path, once, kind):
    run = [train_byol.main, "--steps", "3", "--knn-every", "2", "--batch-norm", kind, *FLAGS]
    run += [recipe, "--batch-size", "8", "--out"]
    assert graphs([*run, str(tmp_path / "compiled")], ranks=2) == [[1], [1]]
    graphs([*run, str(tmp_path / "plain"), "--no-compile"], ranks=2)
    same(tmp_path / "compiled", tmp_path / "plain", 3)
