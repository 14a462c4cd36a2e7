"""Each known mistake is caught: made once in a copy of the code, it must fail the tests named.

The list follows the lines of the method's specification and the mistakes found in popular
re-implementations.  `python -m pytest -m slow tests/test_mutations.py`.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BYOL, GOLDEN = "tests/byol/test_byol.py", "tests/byol/test_golden.py"
VIEWS, LOADER, DATA = (f"tests/data/test_{n}.py" for n in ("views", "loader", "datasets"))
LARS, LOOP = "tests/training/test_optimizers.py", "tests/training/test_loop.py"
PLAN, RESUME = "tests/training/test_schedules.py", "tests/training/test_resume.py"
SCRIPTS, WEIGHTS = "tests/test_scripts.py", "tests/training/test_weights.py"
FEATURES, HELD = "tests/eval/test_features.py", "tests/eval/test_held_out.py"

# name: (file, text that stands there once, what a mistaken author would write, tests that fail)
MUTATIONS = {
    # loss
    "half of the sum": (
        "byol/byol.py", "regression_loss(q2, z1)).mean()", "regression_loss(q2, z1)).mean() / 2",
        f"{BYOL} -k sum_of_both"),
    "one direction only": (
        "byol/byol.py", "(regression_loss(q1, z2) + regression_loss(q2, z1))",
        "2 * regression_loss(q1, z2)", f"{BYOL} -k sum_of_both"),
    "each view predicts itself": (
        "byol/byol.py", "regression_loss(q1, z2) + regression_loss(q2, z1)",
        "regression_loss(q1, z1) + regression_loss(q2, z2)", f"{BYOL} -k sum_of_both"),
    "gradient to the target": (
        "byol/byol.py", 'outputs["target"].detach()', 'outputs["target"]',
        f"{BYOL} -k loss_detaches"),
    "loss in half precision": (
        "training/loop.py", "outputs = at_least_float32(outputs)", "pass", f"{LOOP} -k float32"),
    "loss inside autocast": (
        "training/loop.py", "loss, logs = method.loss(outputs, *known)",
        "with precision.autocast():\n                    loss, logs = method.loss(outputs, *known)",
        f"{LOOP} -k float32"),
    # networks
    "batch norm over both views at once": (
        "byol/byol.py", "representation = [self.encoder(view) for view in views]",
        "representation = list(self.encoder(torch.cat(views)).chunk(2))",
        f"{BYOL} -k statistics_are_those"),
    "target in eval mode": (
        "byol/byol.py", "target_representation = [",
        "self.target_encoder.eval()\n            target_representation = [",
        f"{BYOL} -k keeps_its_own"),
    "default initialisation of the heads": (
        "byol/networks.py", "nn.init.trunc_normal_(layer.weight, std=scale,", "dict(std=scale,",
        "tests/byol/test_networks.py -k heads_start"),
    "heads cut at two instead of two scales": (
        "byol/networks.py", "std=scale, a=-2 * scale, b=2 * scale", "std=scale",
        "tests/byol/test_networks.py -k heads_start"),
    "bias in the last layer of the heads": (
        "byol/networks.py", "nn.Linear(hidden, outputs, bias=False)", "nn.Linear(hidden, outputs)",
        f"{LARS} -k whole_byol"),
    # moving average
    "average of the buffers too": (
        "byol/byol.py", "torch._foreach_lerp_(target, online, 1 - tau)",
        "torch._foreach_lerp_(target, online, 1 - tau)\n"
        "        for a, b in zip(self.target_encoder.buffers(), self.encoder.buffers()):\n"
        "            a.copy_(b)", f"{BYOL} -k buffers_alone"),
    "constant tau": (
        "byol/byol.py", "tau = target_decay(tau, progress)", "pass",
        f"{BYOL} -k moving_average_of_the_new"),
    "tau by the epoch": (
        "training/loop.py", "method.after_step(k / total)",
        "method.after_step(k // loader.steps_per_epoch * loader.steps_per_epoch / total)",
        f"{LOOP} -k rate_and_progress"),
    "tau from the start after a resume": (
        "training/loop.py", "method.after_step(k / total)",
        "method.after_step((k - start) / total)", f"{LOOP} -k part_of_the_schedule"),
    "average in bf16": (
        "byol/byol.py", "torch._foreach_lerp_(target, online, 1 - tau)",
        "for t, o in zip(target, online):\n"
        "            t.copy_(t.bfloat16().lerp(o.bfloat16(), 1 - tau))", f"{BYOL} -k small_moves"),
    "average under a skipped step": (
        "training/loop.py", "        if applied:\n", "        if True:\n",
        f"{LOOP} -k skipped_step"),
    "average at each micro-batch": (
        "training/loop.py", "loss_of_step = loss_of_step + loss.detach()",
        "loss_of_step = loss_of_step + loss.detach()\n            method.after_step(k / total)",
        f"{LOOP} -k accumulation"),
    "average before the optimizer's step": (
        "training/loop.py", "applied = precision.step(optimizer)",
        "method.after_step(k / total); applied = precision.step(optimizer)", f"{GOLDEN}"),
    # schedules
    "cosine over a wrong total": (
        "training/schedules.py", "(step - warmup) / (total - warmup)", "(step - warmup) / total",
        f"{PLAN}"),
    "a first step above rate 0": (
        "training/schedules.py", "peak * step / warmup", "peak * (step + 1) / warmup", f"{PLAN}"),
    "Adam's rate scaled by the batch": (
        "training/schedules.py", 'return lr if optimizer == "adamw" else lr', "return lr",
        f"{PLAN} -k except_for_adam"),
    # LARS
    "rate inside the momentum": (
        "training/optimizers.py", "torch._foreach_add_(velocity, grads)",
        "torch._foreach_add_(velocity, grads, alpha=group['lr'])", f"{LARS} -k formula"),
    "no adaptation without weight decay": (
        "training/optimizers.py", 'if group["adapt"]:',
        'if group["adapt"] and group["weight_decay"]:', f"{LARS} -k formula"),
    "no weight decay in the trust ratio": (
        "training/optimizers.py", "w, g = torch._foreach_norm(weights), torch._foreach_norm(grads)",
        "w, g = torch._foreach_norm(weights), torch._foreach_norm([p.grad for p in weights])",
        f"{LARS} -k formula"),
    "groups by name": (
        "training/method.py",
        "trained = [p for p in self.parameters() if p.requires_grad]",
        "named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]\n"
        "        flat = {id(p) for n, p in named if 'bn' in n or 'bias' in n}\n"
        "        return [{'params': [p for _, p in named if id(p) not in flat],\n"
        "                 'weight_decay': weight_decay},\n"
        "                {'params': [p for _, p in named if id(p) in flat],\n"
        "                 'weight_decay': 0.0, 'adapt': False}]\n"
        "        trained = []", f"{LARS} -k whole_byol"),
    # augmentation
    "one draw for the whole batch": (
        "data/views.py", "drawn[name] = rng.random(count) <",
        "drawn[name] = np.full(count, rng.random()) <", f"{VIEWS} -k gets_its_own"),
    "the same draw for both views": (
        "data/loader.py", "draw(view, self.batch_size, height, width, rng)",
        "draw(view, self.batch_size, height, width, generator(self.seed, VIEWS, step))",
        f"{LOADER} -k differ"),
    "no normalisation": (
        "data/views.py", "x = x.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))", "pass",
        f"{VIEWS} {LOADER} -k normalise"),
    "normalisation before the colours": (
        "data/loader.py", "return tuple(\n            normalise(\n                apply(pixels,",
        "return tuple(\n            normalise(\n                apply(255 - pixels,", f"{GOLDEN}"),
    "blur ten times too small": (
        "data/views.py", "option([0.1, 2.0]", "option([0.1, 0.2]", f"{VIEWS} -k uniform_in_their"),
    "blur on both views alike": (
        "data/views.py", 'blur_p: float = option(0.1, "prob', 'blur_p: float = option(1.0, "prob',
        f"{VIEWS} -k probabilities"),
    "solarize on both views": (
        "data/views.py", 'solarize_p: float = option(0.0, "prob',
        'solarize_p: float = option(0.2, "prob', f"{VIEWS} -k probabilities"),
    "aspect drawn evenly instead of its logarithm": (
        "data/views.py", "np.exp(rng.uniform(*np.log(view.aspect), count))",
        "rng.uniform(*view.aspect, count)", f"{VIEWS} -k log_uniform"),
    "resize without antialiasing": (
        "data/views.py", "stretch = scale.clamp(min=1)", "stretch = scale.clamp(max=1)",
        f"{VIEWS} -k torchvision"),
    "torch's bicubic, a = -.75": (
        "data/views.py", "a: float = -0.5", "a: float = -0.75", f"{VIEWS} -k torchvision"),
    "colours in a fixed order": (
        "data/views.py", "rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)",
        "np.tile(np.arange(4), (count, 1))", f"{VIEWS} -k orders"),
    "statistics of another data set": (
        "train_byol.py", "initialise(encoder, e, *images.statistics())",
        "initialise(encoder, e, [0.491, 0.482, 0.447], [0.247, 0.243, 0.262])",
        f"{SCRIPTS} -k inputs_are_normalised"),
    # checkpoints and precision
    "scaler not saved": (
        "training/precision.py", "return self.scaler.state_dict()", "return {}",
        "tests/training/test_precision.py -k goes_on"),
    "a load that hides a mismatch": (
        "training/weights.py", "    if problems:\n", "    if False:\n", f"{WEIGHTS}"),
    # evaluation
    "the target network evaluated": (
        "train_byol.py", 'save_encoder(out / "encoder.pt", method.encoder',
        'save_encoder(out / "encoder.pt", getattr(method, "target_encoder", method.encoder)',
        f"{WEIGHTS} -k online"),
    "features in train mode": (
        "eval/features.py", "    encoder.eval()\n", "    encoder.train()\n", f"{FEATURES}"),
    "images counted twice by padding": (
        "eval/features.py", "features[rows[0] : rows[-1] + 1] = encoder(x).float()",
        "features[rows[0] : rows[-1] + 1] += 2 * encoder(x).float()", f"{FEATURES}"),
    "the probe sees what it is measured on": (
        "train_byol.py", "labels = hold_out_labels(labels, data.train_labels)", "pass",
        f"{LOOP} -k probe"),
    "settings chosen on test images": (
        "train_baseline.py", "labelled.hold_out(), []",
        "datasets.Split(labelled, datasets.load(config.data).evaluation(config.data).test), []",
        f"{SCRIPTS} -k sweep_chooses"),
    "queries in the bank": (
        "eval/held_out.py", "knn_top1(features[n:], self.labels[n:],",
        "knn_top1(features, self.labels,", f"{HELD} -k queries"),
    "penalised intercept": (
        "eval/classifiers.py", "strength / 2 * theta[:-1].square().sum()",
        "strength / 2 * theta.square().sum()", "tests/eval/test_classifiers.py -k intercept"),
    "overlapping label draws between rows": (
        "data/datasets.py", "np.random.SeedSequence([draw, 0x1ABE1])",
        "np.random.SeedSequence([draw, count])", f"{DATA} -k nested"),
}  # fmt: skip


def survives(folder: Path, file: str, text: str, mistake: str, tests: str) -> str:
    """ "" where the tests fail as they should, else what happened."""
    ignored = shutil.ignore_patterns(".*", "runs", "datasets", "docs", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    shutil.copytree(ROOT / "docs", folder / "docs")
    source = (folder / file).read_text()
    if source.count(text) != 1:
        return f"{file} holds {text!r} {source.count(text)} times"
    (folder / file).write_text(source.replace(text, mistake))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    shutil.rmtree(folder)
    return "" if run.returncode == 1 else f"pytest {tests} ended with {run.returncode}"


@pytest.mark.slow
def test_each_mistake_is_caught(tmp_path):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            name: pool.submit(survives, tmp_path / str(i), *mutation)
            for i, (name, mutation) in enumerate(MUTATIONS.items())
        }
    wrong = {name: job.result() for name, job in jobs.items() if job.result()}
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())
