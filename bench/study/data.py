"""Data of the three kinds of task that need no download; those of the paper are in `folder`."""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import re
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyoptim import demo

Part = tuple[Tensor, Tensor]
Sentence = list[tuple[str, str]]  # words with their tags: O, B-kind or I-kind
TRAIN, VALID, TEST = "train", "valid", "test"
PARTS = (TRAIN, VALID, TEST)
IGNORED = -100  # tag of what fills a sentence up, as in torch's cross-entropy


@dataclass(frozen=True)
class Data:
    """One data set, split.

    Args:
        name: for titles.
        train, valid, test: inputs and targets, equal in their first dim.
        inputs: columns of a table, entries of a vocabulary, or channels of images.
        outputs: classes or tags; 1 for a binary target.
        batch: examples of a step.
    """

    name: str
    train: Part
    valid: Part
    test: Part
    inputs: int
    outputs: int
    batch: int

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-len(self.train[1]) // self.batch)


def part_of(key: str) -> str:
    """The part of everything that has this key: 70 % train, 10 % valid, 20 % test."""
    return [TEST, TEST, VALID, *[TRAIN] * 7][zlib.crc32(key.encode()) % 10]


# -- a table: does a function loop? ----------------------------------------------------------------

LOOPS = (ast.For, ast.AsyncFor, ast.While)
COUNTED = (
    *(ast.Return, ast.If, ast.Try, ast.With, ast.Raise, ast.Assert, ast.Call, ast.Attribute),
    *(ast.Name, ast.Constant, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Subscript),
    *(ast.Assign, ast.AugAssign, ast.Lambda, ast.ListComp, ast.Yield, ast.JoinedStr, ast.Tuple),
    *(ast.Dict, ast.FunctionDef),
)
# Tests, what is installed beside the standard library, and generated grammars.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(steps: int) -> Data:
    """Whether each function of the standard library has a loop, from 33 other numbers about it.

    As in the paper's table about one row in five is positive, and the columns do not decide.
    Modules, not functions, are split: neighbours are alike. Depends on the version of Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    rows: dict[str, list[tuple[list[float], bool]]] = {part: [] for part in PARTS}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not LEFT_OUT & set(inside.parts):
            rows[part_of(inside.as_posix())] += functions_of(ast.parse(path.read_bytes()))
    x, y = (
        {part: torch.tensor([row[i] for row in rows[part]]).float() for part in PARTS}
        for i in (0, 1)
    )
    return table("functions that loop", x, y, batch=-(-len(y[TRAIN]) // steps))


def functions_of(tree: ast.AST) -> Iterator[tuple[list[float], bool]]:
    """Numbers and target of every function, also of inner ones and methods."""
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, Function):
                yield _described(node, isinstance(parent, ast.ClassDef))


def _described(node: Function, is_method: bool) -> tuple[list[float], bool]:
    counts = Counter(type(inner) for statement in node.body for inner in ast.walk(statement))
    arguments = node.args
    shape = [
        *(len(arguments.args), len(arguments.defaults), len(node.decorator_list), len(node.body)),
        *(arguments.vararg is not None, arguments.kwarg is not None, is_method),
        *(len(node.name), len(node.name) - len(node.name.lstrip("_"))),
    ]
    numbers = [float(number) for number in (*shape, *(counts[kind] for kind in COUNTED))]
    return numbers, any(counts[kind] for kind in LOOPS)


def table(name: str, x: dict[str, Tensor], y: dict[str, Tensor], batch: int) -> Data:
    """Columns get mean 0 and deviation 1 over the training part; targets are 0 and 1."""
    deviation, mean = torch.std_mean(x[TRAIN], 0)
    parts = [((x[part] - mean) / deviation.clamp_min(1e-6), y[part].float()) for part in PARTS]
    return Data(name, *parts, inputs=x[TRAIN].shape[1], outputs=1, batch=batch)


# -- tagging: what is a name? ----------------------------------------------------------------------

# Of code, per part. As many steps as with the paper's 14,041 sentences, of a smaller batch.
LINES = {TRAIN: 3000, VALID: 750, TEST: 3000}
LENGTH = 24  # longer lines are cut
BUILTIN_CLASSES = {name for name, value in vars(builtins).items() if isinstance(value, type)}


def names(steps: int) -> Data:
    """Lines of the standard library whose names are tagged: class, function, module, parameter.

    A word is a token. The tag of a name follows from its whole module, of which the network sees
    one line: it has to guess, as in named entity recognition. Modules are split, not lines.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    lines: dict[str, list[Sentence]] = {part: [] for part in PARTS}
    for path in sorted(root.glob("*.py")):
        lines[part_of(path.name)] += tagged_lines(path.read_text(encoding="utf-8"))
    for part in PARTS:
        order = torch.randperm(len(lines[part]), generator=torch.Generator().manual_seed(0))
        lines[part] = [lines[part][i] for i in order[: LINES[part]].tolist()]
    return sentences("names in Python code", lines, LENGTH, batch=-(-LINES[TRAIN] // steps))


def tagged_lines(source: str) -> Iterator[Sentence]:
    """The logical lines of a module, of at least three tokens."""
    known = _Known(ast.parse(source))
    line: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            if len(line) > 2:
                yield known.tagged(line)
            line = []
        elif token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            line.append(token)


class _Known:
    """What a module says about its names."""

    def __init__(self, tree: ast.AST) -> None:
        self.classes, self.functions, self.modules = set(BUILTIN_CLASSES), set(), set()
        self.parameters: dict[int, set[str]] = {}  # by line
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                self.classes.add(node.name)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.functions.add(node.name)
                self._see_parameters(node)
            elif isinstance(node, ast.Import):
                self.modules |= {a.asname or a.name.partition(".")[0] for a in node.names}

    def _see_parameters(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        found = {inner.arg for inner in ast.walk(node.args) if isinstance(inner, ast.arg)}
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            self.parameters.setdefault(line, set()).update(found)

    def tagged(self, line: Sequence[tokenize.TokenInfo]) -> Sentence:
        befores = ["", *(token.string for token in line)]
        tags = [self._tag(token, before) for token, before in zip(line, befores, strict=False)]
        if line[0].string in ("import", "from"):
            path = _import_tags(befores[1:])
            tags[: len(path)] = path
        return [(_word(token), tag) for token, tag in zip(line, tags, strict=True)]

    def _tag(self, token: tokenize.TokenInfo, before: str) -> str:
        name = token.string
        # self is what its name says: nothing to guess.
        if token.type != tokenize.NAME or keyword.iskeyword(name) or name in ("self", "cls"):
            return "O"
        if before != "." and name in self.parameters.get(token.start[0], ()):
            return "B-PARAMETER"
        if before != "." and name in self.modules:
            return "B-MODULE"
        if name in self.classes:
            return "B-CLASS"
        return "B-FUNCTION" if name in self.functions else "O"


def _import_tags(words: Sequence[str]) -> list[str]:
    """Of an import up to what is imported from a module: each dotted path is one entity."""
    end = words.index("import", 1) if words[0] == "from" else len(words)
    tags = []
    for i, word in enumerate(words[:end]):
        if word in ("from", "import", "as", ",", "(", ")"):
            tags.append("O")
        else:
            inside = i > 1 and "." in (word, words[i - 1])
            tags.append("I-MODULE" if inside else "B-MODULE")
    return tags


def _word(token: tokenize.TokenInfo) -> str:
    return {tokenize.STRING: '""', tokenize.NUMBER: "0"}.get(token.type, token.string)


def sentences(name: str, lines: dict[str, list[Sentence]], length: int, batch: int) -> Data:
    """Numbers for words and tags.

    A word is three entries of one vocabulary: itself in lower case, its last three letters, its
    shape. Entries seen less than twice in the training part are unknown, 1; 0 fills up.
    """
    seen = Counter(e for line in lines[TRAIN] for word, _ in line for e in _entries(word))
    frequent = sorted(entry for entry, count in seen.items() if count > 1)
    vocabulary = {entry: i for i, entry in enumerate(frequent, 2)}
    kinds = sorted({tag[2:] for line in lines[TRAIN] for _, tag in line if tag != "O"})
    tags = {"O": 0}
    for kind in kinds:
        tags |= {f"B-{kind}": len(tags), f"I-{kind}": len(tags) + 1}
    parts = [_numbered(lines[part], vocabulary, tags, length) for part in PARTS]
    return Data(name, *parts, inputs=len(vocabulary) + 2, outputs=len(tags), batch=batch)


def _entries(word: str) -> tuple[str, str, str]:
    shape = re.sub(r"[^A-Za-z0-9]+", ".", word)
    for letters, sign in (("[A-Z]+", "X"), ("[a-z]+", "x"), ("[0-9]+", "0")):
        shape = re.sub(letters, sign, shape)
    return f"word {word.lower()}", f"end {word[-3:].lower()}", f"shape {shape[:6]}"


def _numbered(
    lines: Sequence[Sentence], vocabulary: dict[str, int], tags: dict[str, int], length: int
) -> Part:
    words, targets = [], []
    for line in lines:
        filling = [(0, 0, 0)] * (length - len(line))
        cut = [[vocabulary.get(e, 1) for e in _entries(word)] for word, _ in line[:length]]
        words.append([*cut, *filling])
        cut_tags = [tags.get(tag, 0) for _, tag in line[:length]]
        targets.append([*cut_tags, *[IGNORED] * len(filling)])
    return torch.tensor(words), torch.tensor(targets)


# -- images ----------------------------------------------------------------------------------------

# Half of the paper's, in as many steps; of smaller sets, a fifth is the validation part.
TRAIN_IMAGES, VALID_IMAGES = 4790, 1245


def pictures(steps: int) -> Data:
    """Fashion-MNIST where Debian's package puts it, cut; else scikit-learn's digits."""
    found = demo.find_data(None)
    total = len(found.train_labels)
    valid = min(VALID_IMAGES, total // 5)
    train = min(TRAIN_IMAGES, total - valid)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    here, held = order[:train], order[train : train + valid]
    parts = [(found.train_images[rows], found.train_labels[rows]) for rows in (here, held)]
    test = (found.test_images, found.test_labels)
    return Data(found.name, *parts, test, inputs=1, outputs=10, batch=-(-train // steps))
