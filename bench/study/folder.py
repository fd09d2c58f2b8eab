"""The data sets of the paper, from a folder of the user."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import PARTS, TEST, TRAIN, VALID, Data, Part, Sentence, part_of, sentences, table

HELP = """The data sets of the paper are expected in sub-folders of --data:

  credit-card/train.csv, test.csv
      https://huggingface.co/datasets/imodels/credit-card: numbers under a line of column names, of
      which default.payment.next.month is the target
  conll2003/eng.train, eng.testa, eng.testb   (or train.txt, valid.txt, test.txt)
      https://www.clips.uantwerpen.be/conll2003/ner/: a word per line, its tag (B-PER, I-PER, O ...)
      last, an empty line after every sentence
  ham10000/HAM10000_metadata.csv, ham10000/**/ISIC_*.jpg
      https://doi.org/10.7910/DVN/DBW86T: columns lesion_id, image_id and dx; the images may lie in
      HAM10000_images_part_1 and _2 or anywhere below

--tasks takes those that are there; without --data, data of this machine stand in for them."""

# The paper's, section 4.
BATCHES = {"credit-card": 2000, "conll2003": 150, "ham10000": 80}
TARGET = "default.payment.next.month"
CONLL_FILES = {
    TRAIN: ("eng.train", "train.txt"),
    VALID: ("eng.testa", "valid.txt"),
    TEST: ("eng.testb", "test.txt"),
}
CONLL_LENGTH = 50  # the longest sentence has 124 words; few are longer than 50
SIDE = 64  # pixels that the skin images, 600 x 450, are scaled to


class FolderError(Exception):
    """A file is missing or is not what is expected; the message says what to do."""


def _missing(path: Path) -> FolderError:
    return FolderError(f"{path}: no such file\n\n{HELP}")


# -- credit default --------------------------------------------------------------------------------


def credit_card(folder: Path) -> Data:
    """30,000 card owners; a tenth of the training part is held out for validation.

    Raises: FolderError naming a file that is missing, or the line that cannot be read.
    """
    root = folder / "credit-card"
    x, y = _numbers(root / "train.csv")
    test_x, test_y = _numbers(root / "test.csv")
    if x.shape[1] != test_x.shape[1]:
        raise FolderError(f"{root}: train.csv and test.csv have different columns\n\n{HELP}")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held, rest = order[: max(1, len(y) // 10)], order[max(1, len(y) // 10) :]
    return table(
        "credit default",
        {TRAIN: x[rest], VALID: x[held], TEST: test_x},
        {TRAIN: y[rest], VALID: y[held], TEST: test_y},
        BATCHES["credit-card"],
    )


def _numbers(path: Path) -> tuple[Tensor, Tensor]:
    rows = _rows(path, [TARGET])
    try:
        values = torch.tensor([[float(value) for value in row.values()] for row in rows])
    except (TypeError, ValueError) as error:
        raise FolderError(f"{path}: not all fields are numbers: {error}\n\n{HELP}") from error
    target = list(rows[0]).index(TARGET)
    kept = [i for i in range(values.shape[1]) if i != target]
    return values[:, kept], values[:, target]


def _rows(path: Path, columns: Iterable[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise _missing(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    lacking = [column for column in columns if not rows or column not in rows[0]]
    if lacking:
        raise FolderError(f"{path}: no rows with the columns {', '.join(lacking)}\n\n{HELP}")
    return rows


# -- named entities --------------------------------------------------------------------------------


def conll2003(folder: Path) -> Data:
    """CoNLL-2003, English; both ways to write the tags (IOB1 and IOB2) are understood.

    Raises: FolderError naming a file that is missing, or the line that cannot be read.
    """
    root = folder / "conll2003"
    lines = {part: _conll_sentences(_first(root, CONLL_FILES[part])) for part in PARTS}
    return sentences("CoNLL-2003", lines, CONLL_LENGTH, BATCHES["conll2003"])


def _first(root: Path, candidates: Iterable[str]) -> Path:
    paths = [root / name for name in candidates]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise _missing(paths[0])
    return found[0]


def _conll_sentences(path: Path) -> list[Sentence]:
    result: list[Sentence] = [[]]
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            result += [[]] if result[-1] else []
        elif len(fields) < 2 or not (fields[-1] == "O" or fields[-1][:2] in ("B-", "I-")):
            raise FolderError(f"{path}, line {number}: no word and tag in {line!r}\n\n{HELP}")
        else:
            result[-1].append((fields[0], fields[-1]))
    found = [sentence for sentence in result if sentence]
    if not found:
        raise FolderError(f"{path}: no sentences\n\n{HELP}")
    return found


# -- skin lesions ----------------------------------------------------------------------------------


def ham10000(folder: Path) -> Data:
    """10,015 images of seven kinds of lesion; all images of one lesion are in one part.

    Raises: FolderError naming a file that is missing, and without Pillow.
    """
    if find_spec("PIL") is None:
        raise FolderError("the images need Pillow: pip install pillow")
    root = folder / "ham10000"
    rows = _rows(root / "HAM10000_metadata.csv", ("lesion_id", "image_id", "dx"))
    paths = {path.stem: path for path in root.rglob("*.jpg")}
    absent = [row["image_id"] for row in rows if row["image_id"] not in paths]
    if absent:
        raise FolderError(f"{root}: {absent[0]}.jpg and {len(absent) - 1} others are not there")
    kinds = sorted({row["dx"] for row in rows})
    pixels = torch.stack([_pixels(paths[row["image_id"]]) for row in rows])
    labels = torch.tensor([kinds.index(row["dx"]) for row in rows])
    parts = [part_of(row["lesion_id"]) for row in rows]
    return _scaled(pixels, labels, parts, len(kinds))


def _pixels(path: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        image.draft("RGB", (2 * SIDE, 2 * SIDE))  # decodes at a fraction of the size
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def _scaled(pixels: Tensor, labels: Tensor, parts: list[str], kinds: int) -> Data:
    rows = {part: torch.tensor([p == part for p in parts]) for part in PARTS}
    for part, chosen in rows.items():
        if not chosen.any():
            raise FolderError(f"ham10000: too few lesions: none is in the {part} part")
    deviation, mean = torch.std_mean(pixels[rows[TRAIN]].float(), (0, 2, 3), keepdim=True)
    made: list[Part] = [((pixels[r].float() - mean) / deviation, labels[r]) for r in rows.values()]
    return Data("HAM10000", *made, inputs=3, outputs=kinds, batch=BATCHES["ham10000"])
