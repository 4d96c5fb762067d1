"""Parallel German-English text: plain text pairs, or the message catalogues of Django and of other programs."""

import importlib.util
import io
import random
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import polib
import sentencepiece as spm
import torch
from torch import Tensor

from experiments.translation.settings import Settings
from samon import UserError

PAD, UNK, BOS, EOS = range(4)
CODE = re.compile("[<{%]")
IDENTIFIERS = re.compile(r"[$&/_\[]")
Pair = tuple[str, str]  # German, English
Pieces = tuple[list[int], list[int]]  # the same as token indices, without BOS and EOS


@dataclass(frozen=True)
class Corpus:
    """The three splits; no German or English string of `valid` or `test` occurs in an earlier split."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


def load_corpus(settings: Settings) -> Corpus:
    """Load the plain text that the settings name, or message catalogues.

    Raises:
        UserError: files are missing, or a split is empty.
    """
    corpus = text_corpus(Path(settings.text)) if settings.text else catalogue_corpus(settings)
    for name, pairs in vars(corpus).items():
        if not pairs:
            raise UserError(f"the {name} split is empty; check text:, or catalogues: and held_out:")
    return corpus


def text_corpus(directory: Path) -> Corpus:
    """`train`, `valid` and `test`, each as `.de` and `.en` in UTF-8 with one sentence per line.

    The splits are used unchanged, as in published results.
    """
    return Corpus(*(_text_pairs(directory, split) for split in ("train", "valid", "test")))


def _text_pairs(directory: Path, split: str) -> list[Pair]:
    sides = []
    for language in ("de", "en"):
        path = directory / f"{split}.{language}"
        try:
            sides.append([line.strip() for line in path.read_text(encoding="utf-8").split("\n")])
        except FileNotFoundError:
            raise UserError(f"no {path}; the directory must hold train, valid and test, each .de and .en") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8; convert it") from None
    if len(sides[0]) != len(sides[1]):
        raise UserError(f"{directory / split}.de and .en have {len(sides[0])} and {len(sides[1])} lines; must be equal")
    return [pair for pair in zip(*sides, strict=True) if all(pair)]


def catalogue_corpus(settings: Settings) -> Corpus:
    """Message catalogues split by the hash of their path, repeated strings removed: see `Corpus`.

    `valid` and `test` also exclude strings with paths and identifiers (`/about/contact/`, `is_staff`): a few of them
    give an untranslated source the long matches that BLEU rewards. Training keeps them.
    """
    files = _catalogues(_django()) | (_catalogues(Path(settings.catalogues)) if settings.catalogues else {})
    splits: list[list[Pair]] = [[], [], []]
    for path, pairs in files.items():
        splits[split_of_file(path, settings.held_out)] += pairs
    seen: set[str] = set()
    for i, split in enumerate(splits):
        splits[i] = [pair for pair in dict.fromkeys(split) if not seen.intersection(pair)]
        seen.update(text for pair in splits[i] for text in pair)
    train, *others = splits
    return Corpus(train, *([pair for pair in split if not IDENTIFIERS.search("".join(pair))] for split in others))


def split_of_file(path: str, n: int) -> int:
    """0, 1 or 2 for a file of the training, validation or test split, see `Settings.held_out`."""
    return {0: 2, 1: 1}.get(int(sha256(path.encode()).hexdigest(), 16) % n, 0)


def _django() -> Path:
    spec = importlib.util.find_spec("django")
    if spec is None or spec.origin is None:
        raise UserError("Django is not installed; pip install -e '.[translation]'")
    return Path(spec.origin).parent


def _catalogues(root: Path) -> dict[str, list[Pair]]:
    """German catalogues in a directory, by path; those of Django itself start with `django/`."""
    if not root.is_dir():
        raise UserError(f"no directory {root}; install the packages of catalogues.txt there (docs/translation.md)")
    base = root.parent if (root / "conf" / "locale").is_dir() else root
    paths = sorted(root.glob("**/de/LC_MESSAGES/*.po"))
    if not paths:
        raise UserError(f"{root} holds no de/LC_MESSAGES/*.po")
    return {path.relative_to(base).as_posix(): read_catalogue(path) for path in paths}


def read_catalogue(path: Path) -> list[Pair]:
    """The finished translations of a `.po` file, plural forms as separate pairs, line breaks as spaces.

    Strings with markup or format fields (`<a>`, `%(name)s`, `{0}`) are excluded: this code is equal in both languages,
    so BLEU would mostly measure copying. So are strings that are equal in both languages (`URL`).
    """
    pairs = []
    for entry in polib.pofile(str(path), encoding="utf-8"):
        if entry.obsolete or entry.fuzzy:
            continue
        if entry.msgid_plural:
            forms = entry.msgstr_plural
            pairs += [(forms.get(0, ""), entry.msgid), (forms.get(1, ""), entry.msgid_plural)]
        else:
            pairs.append((entry.msgstr, entry.msgid))
    clean = [(" ".join(german.split()), " ".join(english.split())) for german, english in pairs]
    return [(de, en) for de, en in clean if de and en and de != en and not CODE.search(de + en)]


# --- tokens ---------------------------------------------------------------------------------------------------------


def train_bpe(pairs: list[Pair], vocabulary: int) -> bytes:
    """Train a joint BPE of both languages on the training pairs; returns sentencepiece's serialized model."""
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=(text for pair in pairs for text in pair),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
        )
    except RuntimeError as error:
        raise UserError(f"no BPE of {vocabulary} tokens from {len(pairs)} pairs ({error}); change vocabulary") from None
    return model.getvalue()


def encode(processor: spm.SentencePieceProcessor, pairs: list[Pair]) -> list[Pieces]:
    german, english = processor.encode([p[0] for p in pairs]), processor.encode([p[1] for p in pairs])
    return list(zip(german, english, strict=True))


def token_batches(pairs: list[Pieces], max_tokens: int, seed: int) -> list[list[int]]:
    """Indices of all pairs in batches of similar length, in random order that depends only on the arguments.

    A batch's number of pairs times its longest side, EOS included, is at most `max_tokens`.

    Raises:
        UserError: a single pair is longer than that.
    """
    shuffle = random.Random(seed)
    order = list(range(len(pairs)))
    shuffle.shuffle(order)
    lengths = [max(map(len, pair)) + 1 for pair in pairs]
    order.sort(key=lengths.__getitem__)  # stable: equal lengths stay shuffled
    batches: list[list[int]] = [[]]
    for i in order:  # lengths ascend, so the newest is the longest
        if lengths[i] > max_tokens:
            raise UserError(f"a sentence of {lengths[i]} tokens exceeds max_tokens={max_tokens}; raise max_tokens")
        if (len(batches[-1]) + 1) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    shuffle.shuffle(batches)
    return batches


def padded(sequences: list[list[int]]) -> Tensor:
    """[B, longest], the shorter ones padded at the end."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=PAD)


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded: source [B, S], decoder input [B, T] and targets [B, T] (the input shifted left by one)."""

    source: Tensor
    shifted: Tensor
    target: Tensor

    @property
    def tokens(self) -> int:
        """Number of target tokens in the loss's mean: EOS counts, padding does not."""
        return int((self.target != PAD).sum())


def collate(pairs: list[Pieces]) -> Batch:
    return Batch(
        padded([[*german, EOS] for german, _ in pairs]),
        padded([[BOS, *english] for _, english in pairs]),
        padded([[*english, EOS] for _, english in pairs]),
    )
