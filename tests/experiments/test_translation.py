"""The translation example: token weighting against a naive float64 loop, data splits, beam search, restart, cost."""

import dataclasses
import hashlib
import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from timm.optim import create_optimizer_v2
from torch import Tensor

from experiments.translation import compare, data, evaluate, flops, train
from experiments.translation.data import BOS, EOS, PAD, Batch, load_corpus, split_of_file, token_batches
from experiments.translation.model import Translator, beam_search, token_loss
from experiments.translation.settings import Settings, load_settings
from experiments.translation.step import fill_gradients, inverse_sqrt
from samon import UserError
from samon.cli.program import run_script
from tests.reference import gradient_at, sam_gradient, scope_names

pytestmark = pytest.mark.slow

TINY = {"d_model": 16, "heads": 2, "layers": 1, "ffn": 16, "share_all": True}
RHO = 0.3
GERMAN = ["ein", "roter", "Apfel", "Baum", "grüner", "kleiner", "und", "Hund"]
ENGLISH = ["a", "red", "apple", "tree", "green", "small", "and", "dog"]


def tiny_model(vocabulary: int = 12, **changes: object) -> Translator:
    torch.manual_seed(0)
    return Translator(Settings(**{**TINY, "dropout": 0.0, **changes}), vocabulary).double().train()  # type: ignore[arg-type]


def micro_batches() -> list[Batch]:
    """4, 9 and 17 target tokens: equal weights would be far off."""
    draw = torch.Generator().manual_seed(1)
    pieces = [
        [torch.randint(4, 12, (n,), generator=draw).tolist() for n in sizes] for sizes in ([3], [6, 1], [5, 4, 5])
    ]
    return [data.collate([(p[::-1], p) for p in batch]) for batch in pieces]


# --- token weighting ------------------------------------------------------------------------------------------------
def naive_token_mean(model: Translator, batches: list[Batch]) -> Tensor:
    """The mean over all target tokens, sentence by sentence without padding."""
    terms = []
    for batch in batches:
        for source, shifted, target in zip(batch.source, batch.shifted, batch.target, strict=True):
            s, n = source[source != PAD], int((target != PAD).sum())
            log_p = model(s[None], shifted[None, :n])[0].log_softmax(-1)
            for row, piece in zip(log_p, target[:n], strict=True):
                terms.append(-0.9 * row[piece] - 0.1 * row.mean())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("opt", ["adamw", "samon-adamw"])
@pytest.mark.parametrize("m_sharpness", ["micro", "global"])
def test_update_is_the_mean_over_tokens(opt: str, m_sharpness: str) -> None:
    model, batches = tiny_model(), micro_batches()
    tokens = [batch.tokens for batch in batches]
    assert tokens == [4, 9, 17]
    whole = partial(naive_token_mean, model, batches)
    perturbed = partial(sam_gradient, model, names=scope_names(model, "samon"), geometry="", rho=RHO)
    if opt == "adamw":
        wanted = gradient_at(model, [whole])[1]
    elif m_sharpness == "global":
        wanted = perturbed([whole])[1]
    else:
        each = [perturbed([partial(naive_token_mean, model, [batch])])[1] for batch in batches]
        wanted = {n: sum(k / sum(tokens) * grads[n] for k, grads in zip(tokens, each, strict=True)) for n in each[0]}
    options = {"rho": RHO} if opt != "adamw" else {}
    optimizer = create_optimizer_v2(model, opt, lr=0.1, filter_bias_and_bn=False, **options)
    losses = [partial(token_loss, model, b.source, b.shifted, b.target, 0.1) for b in batches]
    loss = fill_gradients(optimizer, losses, tokens, m_sharpness)
    assert float(loss) == pytest.approx(whole().item(), rel=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-9, atol=1e-12)


def test_schedule() -> None:
    assert inverse_sqrt(0, 1.0, 100) == pytest.approx(0.01)
    assert inverse_sqrt(99, 1.0, 100) == 1.0
    assert inverse_sqrt(399, 1.0, 100) == pytest.approx(0.5)


def test_cost_of_a_step_of_the_papers_width() -> None:
    counts = {
        opt: flops.step_flops(
            load_settings("experiments/translation/iwslt14.yaml", {"opt": opt, "layers": 1}), length=25
        )
        for opt in ("adamw", "sam-adamw", "samon-adamw")
    }
    assert counts["sam-adamw"] == 2 * counts["adamw"]
    assert 1.5 < counts["samon-adamw"] / counts["adamw"] <= 1.7


# --- beam search ----------------------------------------------------------------------------------------------------
def score(model: Translator, source: Tensor, pieces: list[int]) -> float:
    """Mean log-probability of the pieces and EOS."""
    log_p = model(source[None], torch.tensor([[BOS, *pieces]]))[0].log_softmax(-1)
    return log_p[range(len(pieces) + 1), [*pieces, EOS]].mean().item()


def test_wide_beam_finds_the_best_of_all_translations() -> None:
    vocabulary, longest = 7, 3
    model = tiny_model(vocabulary).eval()
    batch = torch.tensor([[4, 5, 6, EOS], [6, 4, EOS, PAD], [5, EOS, PAD, PAD]])
    limits = torch.tensor([longest, longest, 2])
    found = beam_search(model, batch, beam=256, max_length=limits)
    allowed = [p for p in range(vocabulary) if p not in (PAD, BOS, EOS)]
    for source, limit, pieces in zip(batch, limits, found, strict=True):
        every = [list(p) for n in range(int(limit) + 1) for p in itertools.product(allowed, repeat=n)]
        best = max(every, key=partial(score, model, source[source != PAD]))
        assert pieces == best


# --- data -----------------------------------------------------------------------------------------------------------
def test_batches_hold_each_pair_once_within_the_tokens() -> None:
    pairs = [([5] * (i % 13 + 1), [6] * (i % 7 + 1)) for i in range(200)]
    batches = token_batches(pairs, max_tokens=60, seed=3)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert max(len(b) * max(len(pairs[i][0]) + 1 for i in b) for b in batches) <= 60
    assert batches == token_batches(pairs, 60, seed=3) != token_batches(pairs, 60, seed=4)
    with pytest.raises(UserError, match="raise max_tokens"):
        token_batches(pairs, 10, seed=0)


def test_catalogue(tmp_path: Path) -> None:
    path = tmp_path / "django.po"
    path.write_text(
        'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'
        'msgid "Log\\nin"\nmsgstr "Anmelden  jetzt"\n\n#, fuzzy\nmsgid "Out"\nmsgstr "Falsch"\n\n'
        'msgid "open"\nmsgstr ""\n\nmsgid "year"\nmsgid_plural "years"\nmsgstr[0] "Jahr"\nmsgstr[1] "Jahre"\n\n'
        'msgid "Hello %(name)s"\nmsgstr "Hallo %(name)s"\n\n#~ msgid "old"\n#~ msgstr "alt"\n',
        encoding="utf-8",
    )
    assert data.read_catalogue(path) == [("Anmelden jetzt", "Log in"), ("Jahr", "year"), ("Jahre", "years")]


def test_catalogues_are_held_out_by_the_hash_of_their_path_and_share_no_string() -> None:
    """Nobody chooses which: 0 modulo n is test text, 1 validation text."""
    path = "django/contrib/admin/locale/de/LC_MESSAGES/django.po"
    number = int.from_bytes(hashlib.sha256(path.encode()).digest(), "big")
    assert [split_of_file(path, n) for n in (number, number - 1, number - 2)] == [2, 1, 0]
    files, corpus = data._catalogues(data._django()), load_corpus(Settings(held_out=5))
    splits = (corpus.train, corpus.valid, corpus.test)
    for index, split in enumerate(splits):
        mine = {pair for path, pairs in files.items() if split_of_file(path, 5) == index for pair in pairs}
        assert set(split) <= mine
    assert not [text for pair in corpus.valid + corpus.test for text in pair if set(text) & set("<{%$&/_[")]
    texts = [{text for pair in split for text in pair} for split in splits]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(texts, 2))


def test_compare_chooses_rho_by_validation_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = dataclasses.asdict(small_settings(tmp_path))
    recipe.write_text(yaml.safe_dump({k: v for k, v in values.items() if k not in ("opt", "rho", "seed")}))
    command = ["-c", str(recipe), "--output", str(tmp_path / "out")]
    compare.main([*command, "--only", "SAM", "--seeds", "1"])
    compare.main(command)
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["method"] for row in rows] == ["Adam", "SAM", "SAM-ON"]
    assert [len(row["test_bleu"]) for row in rows] == [2, 2, 2]
    held = rows[1]["valid_bleu_by_rho"]
    assert rows[1]["rho"] == float(max(held, key=held.__getitem__))
    log = [json.loads(line) for line in (tmp_path / "out/SAM-rho0.01-seed0/log.jsonl").read_text().splitlines()]
    assert held["0.01"] == log[0]["valid_bleu"]  # at half of the epochs
    monkeypatch.setattr(compare.train, "main", lambda words: pytest.fail("finished runs are done again"))
    compare.main(command)


def test_compare_refuses_runs_of_another_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run, command = tmp_path / "recipe.yaml", tmp_path / "Adam-seed0", ["--only", "Adam", "--seeds", "1"]
    command += ["-c", str(recipe), "--output", str(tmp_path)]
    recipe.write_text("epochs: 4\nlr: 0.1\n")
    run.mkdir()
    settings = dataclasses.asdict(load_settings(str(recipe), {"opt": "adamw"}))
    torch.save({"settings": settings, "bpe": torch.zeros(1, dtype=torch.uint8)}, run / "last.pt")
    (run / "log.jsonl").write_text('{"epoch": 0}\n' * 4)
    (run / "test.json").write_text('{"bleu": 12.3, "bleu_of_copying": 1, "pairs": 5}')
    compare.main(command)
    for changed in ("epochs: 4\nlr: 0.5\n", "epochs: 2\nlr: 0.1\n"):
        recipe.write_text(changed)
        for words in (command, [*command, "--table"]):
            with pytest.raises(UserError, match="Adam-seed0 comes from another recipe"):
                compare.main(words)
    recipe.write_text("epochs: 8\nlr: 0.1\n")
    extensions: list[list[str]] = []
    monkeypatch.setattr(compare.train, "main", extensions.append)
    compare.main(command)
    assert extensions == [["--resume", str(run), "--epochs", "8"]]
    assert not (run / "test.json").exists()  # it was the shorter run's
    with pytest.raises(UserError, match="--only: unknown adam; known are Adam"):
        compare.main([*command, "--only", "adam"])


def write_text(directory: Path) -> Path:
    """Pairs of three to five words, word for word."""
    draw = torch.Generator().manual_seed(5)
    directory.mkdir()
    for split, count in (("train", 60), ("valid", 6), ("test", 6)):
        rows = [torch.randint(0, 8, (3 + i % 3,), generator=draw).tolist() for i in range(count)]
        for language, words in (("de", GERMAN), ("en", ENGLISH)):
            text = "".join(" ".join(words[w] for w in row) + "\n" for row in rows)
            (directory / f"{split}.{language}").write_text(text, encoding="utf-8")
    return directory


def test_text_pairs_must_be_parallel(tmp_path: Path) -> None:
    directory = write_text(tmp_path / "text")
    assert len(data.text_corpus(directory).train) == 60
    (directory / "valid.en").write_text("one line\n", encoding="utf-8")
    with pytest.raises(UserError, match="must be equal"):
        data.text_corpus(directory)


# --- runs -----------------------------------------------------------------------------------------------------------
def small_settings(tmp_path: Path) -> Settings:
    text = str(write_text(tmp_path / "text"))
    small = {**TINY, "text": text, "vocabulary": 50, "max_tokens": 60, "epochs": 2, "warmup": 4}
    return load_settings(None, {**small, "lr": 0.01, "opt": "samon-adamw", "accumulate": 2})


def test_resumed_and_extended_run_is_bit_identical(tmp_path: Path) -> None:
    settings = small_settings(tmp_path)
    whole = train.begin(settings, tmp_path / "whole")
    whole.train()
    train.begin(dataclasses.replace(settings, epochs=1), tmp_path / "extended").train()
    resumed = train.resume(tmp_path / "extended", epochs=2)
    assert (resumed.epoch, resumed.updates) == (1, whole.updates // 2)
    resumed.train()
    a, b = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("whole", "extended"))
    assert a["progress"] == b["progress"]
    for part in ("model", "optimizer", "random", "bpe"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


def test_train_and_evaluate_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A word-for-word language is learnt: far above copying, whose words share nothing with the target's."""
    text, recipe, run = write_text(tmp_path / "text"), tmp_path / "recipe.yaml", tmp_path / "run"
    small = {**TINY, "d_model": 32, "dropout": 0.0, "vocabulary": 50, "max_tokens": 100, "valid_every": 40}
    recipe.write_text(json.dumps({**small, "warmup": 40}), encoding="utf-8")
    settings = ["--text", str(text), "--epochs", "40", "--lr", "0.01", "--rho", "0.05", "--seed", "1"]
    train.main(["-c", str(recipe), *settings, "--output", str(run)])
    capsys.readouterr()
    evaluate.main([str(run)])
    result = json.loads(capsys.readouterr().out)
    assert result["bleu_of_copying"] < 5
    assert result["bleu"] > 30
    with pytest.raises(UserError, match="already holds a run"):
        train.main(["-c", str(recipe), *settings, "--output", str(run)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "no.yaml"], "--config no.yaml cannot be read"),
        (["--text", "nowhere"], "no nowhere/train.de"),
        (["--resume", "nowhere"], "no checkpoint at nowhere/last.pt"),
        (["--resume", "nowhere", "--lr", "1"], "only --epochs can be changed"),
        (["--opt", "adamw", "--rho", "0.1"], "leave rho out"),
        (["--opt", "adamw", "--lr", "-1"], "--opt adamw: Invalid learning rate: -1"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {**TINY, "text": str(write_text(tmp_path / "text")), "vocabulary": 50}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    recipe = [] if {"-c", "--resume"} & set(arguments) else ["-c", str(tmp_path / "small.yaml")]
    with pytest.raises(SystemExit) as stop:
        run_script(partial(train.main, [*recipe, *arguments, "--output", str(tmp_path / "run")]))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("values", [{"rh": 1}, {"lr": "1e-4"}, {"heads": 3.5}, {"m_sharpness": "all"}])
def test_settings_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        load_settings(None, values)


def test_recipes_load() -> None:
    for name in ("iwslt14", "django"):
        assert load_settings(f"experiments/translation/{name}.yaml", {}).opt == "samon-adamw"
