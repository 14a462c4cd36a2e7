"""Classify your own images.

python -m eval.predict --ckpt runs/byol-mine/linear image.jpg DIR
python -m eval.predict --ckpt runs/byol-mine --json DIR > predictions.jsonl

RUN is a run of linear_eval.py, finetune.py or train_baseline.py, or a pretraining run that was
evaluated by linear_eval.py.
"""

import json

from core.errors import printable
from eval.trained import command, load_classifier, parser, read_images


def run(args) -> list[dict]:
    """Print each image's classes, the most probable first; returns what --json prints."""
    frozen, classifier, classes = load_classifier(args.ckpt, args.device)
    images, names = read_images(args.images, frozen.transform.stored)
    probabilities = classifier(frozen(images)).double().softmax(1)
    lines = []
    for name, row in zip(names, probabilities.tolist(), strict=True):
        ranked = sorted(zip(row, classes, strict=True), key=lambda pair: -pair[0])
        by_class = {label: round(p, 6) for p, label in ranked}
        lines.append({"file": name, "class": ranked[0][1], "probabilities": by_class})
        text = ", ".join(f"{label} {100 * p:.1f} %" for p, label in ranked[: args.top])
        print(json.dumps(lines[-1]) if args.json else f"{printable(name)}: {text}")
    return lines


def main(argv: list[str] | None = None) -> list[dict]:
    """Run from the command line."""
    arguments = parser(__doc__)
    arguments.add_argument("images", nargs="+", help="image files or folders")
    arguments.add_argument(
        "--json", action="store_true", help="one JSON line per image, all classes"
    )
    arguments.add_argument("--top", type=int, default=3, help="classes in a line of text [3]")
    return command(run, arguments, argv)


if __name__ == "__main__":
    main()
