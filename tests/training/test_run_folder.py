"""Who may write where, and what the metrics hold."""

import json
import os
import time
from types import SimpleNamespace

import forked
import pytest
import torch

from core.errors import UserError
from core.files import write_json
from training.distributed import SINGLE, Processes
from training.run_folder import RunFolder, check_free, read_metrics

QUIET = Processes(0, 1, torch.device("cpu"), quiet=True)


def started(out, **options) -> None:
    RunFolder(out, {"a": 1}, QUIET, **options).close()


def test_the_config_says_what_ran(tmp_path):
    started(tmp_path / "new" / "run")
    facts = json.loads((tmp_path / "new" / "run" / "config.json").read_text())
    assert facts["config"] == {"a": 1} and facts["torch"] == torch.__version__
    assert {"commit", "command", "host", "threads", "python"} <= facts.keys()


def test_S13_an_existing_run_is_refused(tmp_path):
    out = tmp_path / "run"
    started(out)
    before = (out / "config.json").read_bytes()
    with pytest.raises(UserError, match="--overwrite renames it away, --resume continues"):
        RunFolder(out, {"a": 2}, QUIET)
    assert (out / "config.json").read_bytes() == before
    started(out, resume=True)
    assert (out / "config.json").read_bytes() == before


def test_overwrite_renames_the_old(tmp_path):
    out = tmp_path / "run"
    started(out)
    (out / "result.json").write_text("old")
    RunFolder(out, {"a": 2}, QUIET, overwrite=True).close()
    assert json.loads((out / "config.json").read_text())["config"] == {"a": 2}
    assert not (out / "result.json").exists()
    old = [p for p in tmp_path.iterdir() if p != out]
    assert len(old) == 1 and (old[0] / "result.json").read_text() == "old"


def hold(out, ready):
    with RunFolder(out, {}, SINGLE, resume=True):
        ready.touch()
        time.sleep(30)


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_S12_a_folder_in_use_names_the_process(tmp_path, how):
    out, ready = tmp_path / "run", tmp_path / "ready"
    child = forked.Children(hold, out, ready)
    child.until(ready.exists)
    with pytest.raises(UserError, match=f"in use by process {child.pids[0]}$"):
        RunFolder(out, {}, QUIET, **{how: True})
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["run"]
    os.kill(child.pids[0], 9)
    assert child.wait()[0].code == -9
    started(out, **{how: True})  # the lock died with its holder


def test_C16_a_file_in_its_place(tmp_path):
    (tmp_path / "run").write_text("precious")
    for out in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(UserError, match=f"{tmp_path}/run is not a writable folder"):
            check_free(out, False, True)
    assert (tmp_path / "run").read_text() == "precious"


def step(index: int, loss: float, total: int = 10, **logs):
    return SimpleNamespace(
        index=index, total=total, epoch=0, loss=torch.tensor(loss), lr=0.5, images=8,
        logs=logs, last=index == total - 1,
    )  # fmt: skip


def test_rows_at_the_cadence_the_first_and_the_last(tmp_path):
    with RunFolder(tmp_path / "run", {}, QUIET) as folder:
        folder.begin(0, 10)
        for k in range(10):
            extra = {"knn_top1": 12.0} if k == 5 else {}
            folder.log(step(k, float(k), tau=0.25, figure=torch.tensor(2.0)), 4, **extra)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 4, 5, 8, 9]
    assert [r["loss"] for r in rows] == [0, 4, 5, 8, 9]
    assert rows[2]["knn_top1"] == 12 and "knn_top1" not in rows[1]
    assert all(r["lr"] == 0.5 and r["tau"] == 0.25 and r["figure"] == 2 for r in rows)
    assert all(r["images_per_second"] > 0 for r in rows)
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_C17_a_resume_cuts_later_rows_and_broken_lines_away(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    lines = [json.dumps({"step": k}) + "\n" for k in range(6)]
    lines[2:2] = ["[1]\n", '{"step": null}\n', '{"st\n']  # of these alone nothing is kept
    (out / "metrics.jsonl").write_text("".join(lines) + '{"step": 6, "lo')
    with RunFolder(out, {}, QUIET, resume=True) as folder:
        folder.begin(4, 10)
        folder.log(step(4, 1.0), 1)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4]


def log_on_ranks(out):
    import torch.distributed as dist

    processes = Processes(dist.get_rank(), 2, torch.device("cpu"), quiet=True)
    with RunFolder(out, {}, processes) as folder:
        folder.begin(0, 2)
        value = float(processes.rank)
        folder.log(step(0, value, total=2, figure=torch.tensor(10 * value)), 1)


def test_figures_are_means_over_the_processes_and_one_writes(tmp_path):
    forked.run(log_on_ranks, tmp_path / "run", ranks=2)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 1 and rows[0]["loss"] == 0.5 and rows[0]["figure"] == 5


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2]} and len(list(tmp_path.iterdir())) == 1


def test_tensorboard_has_metrics_in_groups_and_views(trained_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(trained_run))
    found.Reload()
    tags = found.Tags()
    expected = {"train/loss", "train/lr", "train/tau", "train/images_per_second",
                "train/knn_top1", "collapse/std representation"}  # fmt: skip
    assert expected <= set(tags["scalars"])
    assert {tag.split("/")[0] for tag in tags["scalars"]} == {"train", "collapse"}
    rows = {row["step"]: row for row in read_metrics(trained_run / "metrics.jsonl")}
    events = found.Scalars("train/tau")
    assert {e.step: pytest.approx(e.value) for e in events} == {
        k: r["tau"] for k, r in rows.items()
    }
    (views,) = found.Images("views")
    assert (views.width, views.height) == (16 * 16, 2 * 16)
