"""BLEU of a checkpoint: `python -m experiments.translation.evaluate output/translation/run`."""

import argparse
import json
from pathlib import Path

import sacrebleu
import sentencepiece as spm
import torch

from experiments.translation.data import EOS, Pair, load_corpus, padded
from experiments.translation.model import Translator, beam_search
from experiments.translation.settings import Settings
from samon import UserError
from samon.cli.program import run_script
from samon.trainer.state import Tree

SENTENCES = 64  # decoded at a time


def device_of_choice() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def translate(model: Translator, processor: spm.SentencePieceProcessor, sources: list[str], beam: int) -> list[str]:
    """Translate German into English, with at most 1.2 times the source's tokens plus 10, as in fairseq's recipe."""
    device = next(model.parameters()).device
    model.eval()
    pieces = processor.encode(sources)
    order = sorted(range(len(sources)), key=lambda i: len(pieces[i]))  # little padding
    translations: dict[int, str] = {}
    for start in range(0, len(order), SENTENCES):
        batch = order[start : start + SENTENCES]
        limits = torch.tensor([int(1.2 * len(pieces[i])) + 10 for i in batch], device=device)
        source = padded([[*pieces[i], EOS] for i in batch]).to(device)
        translations.update(zip(batch, processor.decode(beam_search(model, source, beam, limits)), strict=True))
    return [translations[i] for i in range(len(sources))]


def bleu(translations: list[str], pairs: list[Pair]) -> sacrebleu.metrics.bleu.BLEUScore:
    """Corpus BLEU of plain text against the English side of the pairs: sacrebleu's 13a tokens, cased."""
    return sacrebleu.metrics.bleu.BLEU().corpus_score(translations, [[english for _, english in pairs]])


def read_checkpoint(path: Path) -> tuple[Settings, bytes, Tree]:
    """Settings, BPE model and content of a checkpoint; raise UserError if it does not exist or is damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return Settings(**content["settings"]), bytes(content["bpe"].numpy()), content
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; give the directory of a run, or train one") from None
    except Exception as error:  # unpickling damaged bytes can raise anything
        reason = str(error).partition("\n")[0][:90]
        raise UserError(f"{path} is damaged or no checkpoint of this example ({reason})") from None


def evaluate(checkpoint: Path, split: str, beam: int) -> dict[str, object]:
    """BLEU of a checkpoint's translations and of the untranslated source, on a split of its corpus."""
    settings, bpe, content = read_checkpoint(checkpoint)
    processor = spm.SentencePieceProcessor(model_proto=bpe)
    model = Translator(settings, processor.get_piece_size())
    model.load_state_dict(content["model"])
    model.to(device_of_choice())
    pairs: list[Pair] = getattr(load_corpus(settings), split)
    sources = [german for german, _ in pairs]
    translations = translate(model, processor, sources, beam)
    return {
        "checkpoint": str(checkpoint),
        "split": split,
        "pairs": len(pairs),
        "beam": beam,
        "opt": settings.opt,
        "rho": settings.rho,
        "seed": settings.seed,
        "epoch": content["progress"][0],
        "bleu": round(bleu(translations, pairs).score, 2),
        "bleu_of_copying": round(bleu(sources, pairs).score, 2),
        "examples": [[*pair, translation] for pair, translation in list(zip(pairs, translations, strict=True))[::40]],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="directory of a run (its best.pt is used), or a checkpoint file")
    parser.add_argument("--split", choices=("test", "valid"), default="test")
    parser.add_argument("--beam", type=int, default=5)
    options = parser.parse_args(arguments)
    path = Path(options.run)
    path = path / "best.pt" if path.is_dir() else path
    print(json.dumps(evaluate(path, options.split, options.beam), ensure_ascii=False, indent=1))


if __name__ == "__main__":
    run_script(main)
