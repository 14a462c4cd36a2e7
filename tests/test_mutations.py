"""Each known mistake is caught: made once in a copy of the code, it must fail the tests named.

The list follows the lines of the method's specification and the mistakes found in popular
re-implementations.  `python -m pytest -m slow tests/test_mutations.py`.
"""

import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BYOL, GOLDEN = "tests/byol/test_byol.py", "tests/byol/test_golden.py"
VIEWS, LOADER, DATA = (f"tests/data/test_{n}.py" for n in ("views", "loader", "datasets"))
TWO = "tests/training/test_distributed.py"
LARS, LOOP = "tests/training/test_optimizers.py", "tests/training/test_loop.py"
PLAN, RESUME = "tests/training/test_schedules.py", "tests/training/test_resume.py"
SAVING, STOPPING = (f"tests/training/test_{n}.py" for n in ("checkpoints", "stopping"))
LISTING = "tests/data/test_listing.py"
NETWORKS = "tests/training/test_encoder.py"
SCRIPTS, WEIGHTS = "tests/test_scripts.py", "tests/training/test_weights.py"
FAKE = "tests/test_fake_devices.py"
FEATURES, ONLINE = "tests/eval/test_features.py", "tests/eval/test_online.py"

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
    "whitening by one rank's images": (
        "byol/byol.py", "everything = all_gather(z.transpose(0, 1))",
        "everything = z.transpose(0, 1)", f"{TWO} -k two_processes_are_one"),
    "whitening without the means": (
        "byol/byol.py", "x = (everything - mean).flatten(0, 1)", "x = everything.flatten(0, 1)",
        f"{BYOL} -k whitening_is"),
    "the factor instead of its inverse": (
        "byol/byol.py", "torch.linalg.solve_triangular(factor,",
        "(lambda f, x, upper: f @ x)(factor,",
        f"{BYOL} -k whiten"),
    "loss in half precision": (
        "training/loop.py", "outputs = at_least_float32(outputs)", "pass", f"{LOOP} -k float32"),
    "loss inside autocast": (
        "training/loop.py", "loss, terms = method.loss(outputs, *known)",
        "with precision.autocast():\n                loss, terms = method.loss(outputs, *known)",
        f"{LOOP} -k float32"),
    # networks
    "batch norm over both views at once": (
        "byol/byol.py", "[self.encoder(view) for view in views]",
        "list(self.encoder(torch.cat(views)).chunk(2))",
        f"{BYOL} -k statistics_are_those"),
    "target in eval mode": (
        "byol/byol.py", "target_y = [self.target_encoder(view)",
        "self.target_encoder.eval()\n            target_y = [self.target_encoder(view)",
        f"{BYOL} -k keeps_its_own"),
    "default initialization of the heads": (
        "byol/byol.py", "nn.init.trunc_normal_(layer.weight, std=scale,", "dict(std=scale,",
        f"{BYOL} -k heads_start"),
    "heads cut at two instead of two scales": (
        "byol/byol.py", "std=scale, a=-2 * scale, b=2 * scale", "std=scale",
        f"{BYOL} -k heads_start"),
    "bias in the last layer of the heads": (
        "byol/byol.py", "nn.Linear(hidden, outputs, bias=False)", "nn.Linear(hidden, outputs)",
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
        "training/loop.py", "progress=k / total",
        "progress=k // loader.steps_per_epoch * loader.steps_per_epoch / total",
        f"{LOOP} -k rate_and_progress"),
    "tau from the start after a resume": (
        "training/loop.py", "progress=k / total",
        "progress=(k - start) / total", f"{LOOP} -k part_of_the_schedule"),
    "average in bf16": (
        "byol/byol.py", "torch._foreach_lerp_(target, online, 1 - tau)",
        "for t, o in zip(target, online):\n"
        "            t.copy_(t.bfloat16().lerp(o.bfloat16(), 1 - tau))", f"{BYOL} -k small_moves"),
    "average under a skipped step": (
        "training/loop.py", "    if applied:\n", "    if True:\n",
        f"{LOOP} -k skipped_step"),
    "average at each micro-batch": (
        "training/loop.py", "loss_of_step = loss_of_step + loss.detach()",
        "loss_of_step = loss_of_step + loss.detach()\n        method.after_step(progress)",
        f"{LOOP} -k accumulation"),
    "average before the optimizer's step": (
        "training/loop.py", "applied = precision.step(optimizer)",
        "method.after_step(progress); applied = precision.step(optimizer)", f"{GOLDEN}"),
    # schedules
    "cosine over a wrong total": (
        "training/method.py", "(step - warmup) / (total - warmup)", "(step - warmup) / total",
        f"{PLAN}"),
    "a first step above rate 0": (
        "training/method.py", "peak * step / warmup", "peak * (step + 1) / warmup", f"{PLAN}"),
    "Adam's rate scaled by the batch": (
        "training/loop.py", 'return lr if optimizer == "adamw" else lr', "return lr",
        f"{PLAN} -k except_for_adam"),
    # LARS
    "rate inside the momentum": (
        "training/optimizers.py", "torch._foreach_add_(velocity, grads)",
        "torch._foreach_add_(velocity, grads, alpha=group['lr'])", f"{LARS} -k formula"),
    "no adaptation without weight decay": (
        "training/optimizers.py", 'if group["adapt"]:',
        'if group["adapt"] and group["weight_decay"]:', f"{LARS} -k formula"),
    "no weight decay in the trust ratio": (
        "training/optimizers.py", "for tensors in (weights, grads))",
        "for tensors in (weights, [p.grad for p in weights]))",
        f"{LARS} -k formula"),
    "groups by name": (
        "training/method.py", "others = [p for p in trained if id(p) not in kernels]",
        "named = {id(p): n for n, p in module.named_parameters()}\n"
        "    others = [p for p in trained if 'bn' in named[id(p)] or 'bias' in named[id(p)]]\n"
        "    kernels = set(named) - {id(p) for p in others}", f"{LARS} -k whole_byol"),
    "groups by dimension": (
        "training/method.py", "others = [p for p in trained if id(p) not in kernels]",
        "kernels = {id(p) for p in trained if p.ndim > 1}\n"
        "    others = [p for p in trained if id(p) not in kernels]", f"{LARS} -k no_kernel"),
    "a recipe's [optim] in labelled training": (
        "eval/supervised.py", 'ignored = ("optim",)', "ignored = ()",
        "tests/training/test_config.py -k pretraining_alone"),
    "warm-up cut to a tenth": (
        "training/loop.py", "total // 2)", "total // 10)", f"{PLAN} -k warmup"),
    "Barlow Twins divides by std + 1e-5": (
        "variants/barlow_twins.py", "(batch_norm(z, None, None, training=True) for",
        "((z - z.mean(0)) / (z.std(0, correction=0) + 1e-5) for",
        "tests/variants/test_losses.py -k authors"),
    # devices
    "labels left on the CPU": (
        "data/loader.py", "to_device(self.labels[chosen], self.device)",
        "torch.from_numpy(self.labels[chosen])", f"{FAKE} -k each_method"),
    "a copy that waits": (
        "core/device.py", "tensor.pin_memory().to(device, non_blocking=True)", "tensor.to(device)",
        f"{FAKE} -k byol"),
    "the loss read at each step": (
        "training/loop.py", "loss_of_step + loss.detach()", "loss_of_step + loss.item()",
        f"{FAKE} -k byol"),
    "flags read at each step": (
        "training/stopping.py", 'processes.device.type == "cpu" else 20', "True else 20",
        f"{FAKE} -k byol"),
    "Adam's steps among the weights": (
        "training/stopping.py",
        "values = [v for v in values if v.device == self.flags.device]", "pass",
        f"{FAKE} -k byol"),
    "float64 in the log of a device": (
        "training/run_folder.py", "v.double() if v.is_cpu else v.float()", "v.double()",
        f"{FAKE} -k byol"),
    "channels-last memory on mps": (
        "core/device.py", "torch.channels_last if device.type in BACKENDS",
        "torch.channels_last if True",
        f"{FAKE} -k without_cuda"),
    "fp16 on any device": (
        "training/loop.py", 'device.type not in ("cpu", "mps")', "False",
        "tests/training/test_precision.py -k nothing_was_tried"),
    # augmentation
    "one draw for the whole batch": (
        "data/views.py", "drawn[name] = rng.random(count) <",
        "drawn[name] = np.full(count, rng.random()) <", f"{VIEWS} -k gets_its_own"),
    "the same draw for both views": (
        "data/loader.py", "draw(view, self.batch_size, *self.images.shape, rng)",
        "draw(view, self.batch_size, *self.images.shape, generator(self.seed, VIEWS, step))",
        f"{LOADER} -k differ"),
    "no normalization": (
        "data/views.py", "x = x.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))", "pass",
        f"{VIEWS} {LOADER} -k normalize"),
    "gray before the colors": (
        "data/views.py",
        '    color_jitter(x, hue_place[sorting], t, drawn["hue"].any())\n'
        '    apply_at(t["grey"], x, luma)\n',
        '    apply_at(t["grey"], x, luma)\n'
        '    color_jitter(x, hue_place[sorting], t, drawn["hue"].any())\n', f"{GOLDEN}"),
    "one crop for the whole batch": (
        "data/views.py", "rng.uniform(*view.area, count)", "rng.uniform(*view.area)",
        f"{VIEWS} -k gets_its_own"),
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
    "colors after the hue before it": (
        "data/views.py", "for place in range(1, 4):", "for place in range(3):",
        f"{VIEWS} -k torchvision"),
    "contrast by the luma of each pixel": (
        "data/views.py", "rest * (order == CONTRAST)]", "rest * (order == SATURATION)]",
        f"{VIEWS} -k torchvision"),
    "colours in a fixed order": (
        "data/views.py", "rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)",
        "np.tile(np.arange(4), (count, 1))", f"{VIEWS} -k orders"),
    "batch norms with torchvision's momentum": (
        "training/encoder.py", "for norm in batch_norms(network):", "for norm in ():",
        "tests/training/test_networks.py -k fifty_steps"),
    "statistics of another data set": (
        "training/encoder.py", "return build_encoder(config), *images.statistics()",
        "return build_encoder(config), [0.491, 0.482, 0.447], [0.247, 0.243, 0.262]",
        f"{SCRIPTS} -k inputs_are_normalised"),
    # checkpoints and precision
    "scaler not saved": (
        "training/session.py", "self.precision.scaler.state_dict()", "{}", f"{RESUME} -k fp16"),
    "a load that hides a mismatch": (
        "training/weights.py", "module.load_state_dict(state)",
        "module.load_state_dict(state, strict=False)", f"{WEIGHTS} -k C11"),
    "an average for missing counters": (
        "training/weights.py", 'if not k.endswith("num_batches_tracked")', "if True",
        f"{WEIGHTS} -k other_libraries"),
    # evaluation
    "k-NN on the test set": (
        "eval/online.py", "self.images = images.subset(order)",
        "self.images = data.test.subset(order)", f"{SCRIPTS} -k watched_on_train"),
    "k-NN of the target network": (
        "eval/online.py", "method.encoder, self.images",
        'getattr(method, "target_encoder", method.encoder), self.images', f"{ONLINE} -k queries"),
    "the rate chosen on images it was trained on": (
        "eval/augmented.py", "held = frozen(part.test.images)",
        "part.test = part.train; held = frozen(part.test.images)",
        "tests/eval/test_augmented.py -k rate_is_the_best"),
    "Nesterov's momentum forgotten": (
        "training/session.py", "o.momentum, o.nesterov", "o.momentum", f"{SCRIPTS} -k nesterov"),
    "the settings of 1000 epochs for 100": (
        "recipes/stl10.toml", "base_tau = 0.99 ", "base_tau = 0.996 ",
        "tests/training/test_config.py -k preset"),
    "collapse judged by an absolute bound": (
        "eval/collapse.py", "start[std] / 4", "0.25 * size**-0.5", "tests/eval/test_collapse.py"),
    "the target network evaluated": (
        "training/session.py", 'save_encoder(out / "encoder.pt", self.method.encoder',
        'save_encoder(out / "encoder.pt", getattr(self.method, "target_encoder", None)',
        f"{WEIGHTS} -k online"),
    "features in train mode": (
        "eval/features.py", "    encoder.eval()\n", "    encoder.train()\n", f"{FEATURES}"),
    "images counted twice by padding": (
        "eval/features.py", "batches[processes.rank :: processes.world_size]",
        "(*batches, batches[0])[processes.rank :: processes.world_size]",
        f"{FEATURES} -k two_processes"),
    "the probe sees what it is measured on": (
        "train_byol.py", "labels[order[:queries]] = -1", "pass", f"{LOOP} -k shows_the_probe"),
    "the probe's mean over one rank's labels": (
        "eval/probe.py", "sum_over_ranks(torch.stack([known, torch.ones_like(known)]))",
        "torch.stack([known, torch.ones_like(known)])", "tests/test_scaling.py -k probe"),
    "small images evaluated below the size of their views": (
        "data/transform.py", "if data.crop_size > min(shape) else", "if False else",
        "tests/data/test_datasets.py -k transform"),
    "settings chosen on test images": (
        "eval/supervised.py", "split.train.hold_out() if config.sweep else None", "split",
        f"{SCRIPTS} -k sweep_chooses"),
    "queries in the bank": (
        "eval/online.py", "knn_top1(features[n:], labels[n:],",
        "knn_top1(features, labels,", f"{ONLINE} -k queries"),
    "penalised intercept": (
        "eval/classifiers.py", "strength / 2 * theta[:-1].square().sum()",
        "strength / 2 * theta.square().sum()", "tests/eval/test_classifiers.py -k intercept"),
    "overlapping label draws between rows": (
        "data/labelled.py", "np.random.SeedSequence([draw, 0x1ABE1])",
        "np.random.SeedSequence([draw, count])", f"{DATA} -k nested"),
    "test images in a report of validation images": (
        "eval/report.py", 'settings["flags"].get("data.evaluate_on", on)', '"test"',
        "tests/eval/test_report.py -k no_test_image"),
    "your own images normalized as ImageNet's": (
        "eval/trained.py", "EvalTransform.from_meta(missing | weights.meta)",
        "EvalTransform.from_meta(weights.meta | missing)",
        "tests/eval/test_trained.py -k predict_with"),
    "another library's moving average": (
        "training/weights.py", "not AVERAGES & _words(name)", "AVERAGES & _words(name)",
        f"{WEIGHTS} -k other_libraries"),
    "the wrong tap on a map of one pixel": (
        "training/encoder.py", "row, column = self.padding", "row, column = 0, 0",
        "tests/training/test_encoder.py -k one_pixel"),
    "convolutions of one pixel as torch does them": (
        "training/encoder.py", "if x.shape[2:] == (1, 1):", "if False:",
        "tests/training/test_encoder.py -k nobody_wrote"),
    "a classifier's last layer by its first word": (
        "training/weights.py", 'k.startswith(f"{last}.")', "k.startswith(last.split('.')[0])",
        "tests/training/test_networks.py -k last_layer"),
    "inputs of GoogLeNet as of all others": (
        "training/weights.py", "if arch in AUXILIARY else {}", "if False else {}",
        "tests/training/test_networks.py -k init_imagenet"),
    "sizes tried in evaluation alone": (
        "training/session.py", "[v.size or loader.crop_size for v in loader.views]", "[]",
        "tests/training/test_networks.py -k small_crops"),
    # what users bring
    "floats for 16 bits": (
        "data/decode.py", "not (signed or misread or wide or", "not (",
        "tests/data/test_pixels.py -k unknown"),
    "images that have changed places": (
        "data/listing.py", "status.st_mtime_ns, status.st_ctime_ns, status.st_ino",
        "status.st_mtime_ns",
        f"{LISTING} -k changed_places"),
    "validation images of a published set lost": (
        "data/published.py", 'TRAIN_AND_VAL = [{"split": "train"}, {"split": "val"}]',
        'TRAIN_AND_VAL = [{"split": "train"}]',
        "tests/data/test_published.py -k torchvision_reads"),
    "photographs lost for odd EXIF": (
        "data/decode.py",
        "    if (turn := _turn(image)) is not None:\n        image = image.transpose(turn)",
        "    image = ImageOps.exif_transpose(image)",
        "tests/data/test_pixels.py -k photographs_are_turned"),
    "each process warns": (
        "core/errors.py", 'if first_process():\n        put(f"warning',
        'if True:\n        put(f"warning',
        f"{LISTING} -k one_of_several"),
    "a closed terminal kills": (
        "training/stopping.py", 'handlers["SIGHUP"] = self._stop', "pass", f"{STOPPING} -k S1_S5"),
    # nothing lost
    "checksums that nobody looks at": (
        "training/checkpoints.py", "if expected.startswith(actual.encode()) else", "if True else",
        f"{SAVING} -k C5_C6"),
    "a fresh start where all checkpoints are bad": (
        "training/resume.py", "    if problems:\n", "    if not problems:\n",
        f"{SAVING} -k C8"),
    "free unpickling": (
        "training/weights.py", 'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False', f"{SAVING} -k C10"),
    "other settings taken over in silence": (
        "training/resume.py", "if changed and not config.run.override:", "if False:",
        f"{RESUME} -k R16_a_refused"),
    "metrics written twice": (
        "training/run_folder.py", 'if row["step"] < start]', "]", f"{RESUME} -k C17"),
    "two runs in a folder": (
        "core/files.py", "if lock_descriptor(file.fileno(), blocking=wait):", "if True:",
        "tests/training/test_run_folder.py -k S12"),
    "weights that are not finite saved": (
        "training/stopping.py", "bad += sum_over_ranks((~torch.isfinite(largest)).sum()).item()",
        "pass", f"{STOPPING} -k N2"),
    "each rank stops for itself": (
        "training/stopping.py", "sum_over_ranks(self.flags.clone())", "self.flags.clone()",
        f"{STOPPING} -k S3"),
}  # fmt: skip


IGNORED = shutil.ignore_patterns(".*", "runs", "datasets", "__pycache__")


# Each run is forked from a process that has imported these: seconds less for each of a hundred.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch._dynamo", "torchvision.models", "torch.utils.tensorboard", "sklearn.linear_model"]
)


def in_the_copy(folder: Path, arguments: tuple[str, ...]) -> None:
    """pytest in `folder`, whose modules are found there and nowhere else."""
    os.chdir(folder)
    ours = [p for p in sys.path if Path(p) in (ROOT, *ROOT.glob("tests"), *ROOT.glob("tests/*"))]
    sys.path[:] = [str(folder), *(p for p in sys.path if p not in (*ours, ""))]
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])
    (folder / "exit_code").write_text(str(int(code)))


def run_tests(folder: Path, *arguments: str) -> int:
    """pytest's exit code, from a file: Process.exitcode is wrong when two threads start and join
    (start polls all other processes, and who asks second gets 255). -1 where pytest crashed."""
    process = SERVER.Process(target=in_the_copy, args=(folder, arguments))
    process.start()
    process.join()
    code = folder / "exit_code"
    return int(code.read_text()) if code.exists() else -1


def survives(folder: Path, file: str, text: str, mistake: str, tests: str) -> str:
    """Empty where the tests fail as they should, else what happened."""
    shutil.copytree(ROOT, folder, ignore=IGNORED)
    source = (folder / file).read_text()
    if source.count(text) != 1:
        return f"{file} holds {text!r} {source.count(text)} times"
    (folder / file).write_text(source.replace(text, mistake))
    code = run_tests(folder, *tests.split())
    shutil.rmtree(folder)
    return "" if code == 1 else f"pytest {tests} ended with {code}"


def fails(folder: Path, files: str, words: set[str]) -> str:
    """Empty where the tests that are to catch mistakes pass on the code as it is."""
    shutil.copytree(ROOT, folder, ignore=IGNORED)
    code = run_tests(folder, *files.split(), *(["-k", " or ".join(words)] if all(words) else []))
    return "" if code == 0 else (folder / "output").read_text()[-2000:]


@pytest.mark.slow
def test_each_mistake_is_caught_by_tests_that_pass_without_it(tmp_path):
    selections: dict[str, set[str]] = {}
    for *_, tests in MUTATIONS.values():
        files, _, word = tests.partition(" -k ")
        selections.setdefault(files, set()).add(word)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            files: pool.submit(fails, tmp_path / f"as-it-is-{i}", files, words)
            for i, (files, words) in enumerate(selections.items())
        }
        jobs |= {
            name: pool.submit(survives, tmp_path / str(i), *mutation)
            for i, (name, mutation) in enumerate(MUTATIONS.items())
        }
    wrong = {name: job.result() for name, job in jobs.items() if job.result()}
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())
