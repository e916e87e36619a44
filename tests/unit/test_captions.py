"""Caption metrics against published examples, other libraries and values worked out by hand; nothing is downloaded."""

import socket

import pytest
from nltk.translate.bleu_score import corpus_bleu

from geodistill.evaluate.captions import bleu4, captioning, cider, libraries, meteor, rouge, words

SAID = "It is a guide to action which ensures that the military always obeys the commands of the party"
TRUE = "It is a guide to action that ensures that the military will forever heed Party commands"


def test_rouge_of_the_librarys_published_example() -> None:
    one, longest = rouge("The quick brown dog jumps on the log.", ["The quick brown fox jumps over the lazy dog"])
    assert (one, longest) == pytest.approx((70.58823529411765, 58.82352941176471))


def test_rouge_by_hand() -> None:
    # prediction 4 words, reference 6; common words: a, red, ship (3); longest common subsequence: a red (2)
    one, longest = rouge("a red docked ship", ["the ship is a red one"])
    assert one == pytest.approx(100 * 2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6))  # 60
    assert longest == pytest.approx(100 * 2 * (2 / 4) * (2 / 6) / (2 / 4 + 2 / 6))  # 40
    assert rouge("ships", ["ship"])[0] == 0  # no stemming


@pytest.mark.parametrize(
    "said, true, value",
    [
        (SAID, TRUE, 69.44),  # the example of nltk's documentation
        ("the cat sat on the mat", "the cat sat on the mat", 99.77),  # the three of the encyclopedia's article on METEOR
        ("on the mat sat the cat", "the cat sat on the mat", 50.00),
        ("the cat was sat on the mat", "the cat sat on the mat", 96.54),
        ("non matching hypothesis", "this is a cat", 0.0),
        ("", "a ship", 0.0),
    ],
)
def test_meteor_of_published_examples(said: str, true: str, value: float) -> None:
    assert meteor(said, [true]) == pytest.approx(value, abs=0.005)


def test_meteor_knows_stems_and_synonyms_and_takes_the_best_reference(monkeypatch) -> None:
    monkeypatch.setattr(socket, "socket", None)  # nothing may be fetched
    one = 100 * (1 - 0.5 * 1**3)  # one word in one chunk
    assert meteor("ships", ["ship"]) == meteor("auto", ["car"]) == pytest.approx(one)
    assert meteor("auto", ["tree", "car"]) == pytest.approx(one) and meteor("auto", ["tree"]) == 0
    # 3 of 4 words match in 2 chunks; precision 3/4, recall 3/3
    mean = 10 * 0.75 * 1 / (1 + 9 * 0.75)
    assert meteor("a big red car", ["a red car"]) == pytest.approx(100 * mean * (1 - 0.5 * (2 / 3) ** 3))


def test_bleu_equals_another_library() -> None:
    said = [SAID, "two planes stand on the runway of an airport", "a storage tank in a green field"]
    guiding = "It is the guiding principle which guarantees the military forces always being under the command of the Party"
    meadow = ["a storage tank is in a field", "a storage tank in a green meadow"]
    true = [[TRUE, guiding], ["two planes on the runway of an airport"], meadow]
    other = corpus_bleu([[words(r) for r in refs] for refs in true], [words(s) for s in said])
    assert bleu4(said, true) == pytest.approx(100 * other, rel=1e-6) and 30 < 100 * other < 90


def test_cider_by_hand() -> None:
    # four words and no n-gram in common between the two images: each of the four n-gram likenesses is 1, scaled by ten
    said = ["a ship docks here", "many small green trees"]
    assert cider(said, [[said[0]], [said[1]]]) == pytest.approx(1000)
    # an n-gram that every image has weighs log(2/2) = 0, so "ship" alone says nothing
    assert cider(["ship", "ship"], [["ship"], ["ship"]]) == 0
    # only 1-grams are there: a quarter of the scale
    assert cider(["ship", "tree"], [["ship"], ["tree"]]) == pytest.approx(250)


def test_captioning_by_size_and_its_libraries() -> None:
    def made(said: str, size: str, *true: str) -> dict:
        return {"prediction": said, "references": list(true), "size_group": size}

    result = captioning([made("a red ship", "small", "x", "a red ship"), made("", "large", "b"), made("b", "large", "b")])
    assert result["ROUGE-L"] == pytest.approx(200 / 3)
    assert result["size_groups"]["small"] == pytest.approx(
        {"samples": 1, "ROUGE-1": 100, "ROUGE-L": 100, "METEOR": meteor("a red ship", ["a red ship"])}
    )
    assert result["size_groups"]["large"] == pytest.approx({"samples": 2, "ROUGE-1": 50, "ROUGE-L": 50, "METEOR": 25})
    assert set(libraries()) < set(result) | {"samples", "size_groups"} and "WordNet 3.0" in libraries()["METEOR"]


def test_words_are_those_of_the_coco_evaluation() -> None:
    assert words("There's 1 T-shaped, small ship (docked).") == ("there", "'s", "1", "t-shaped", "small", "ship", "docked")


def test_texts_without_a_word_do_not_stop_the_others():
    said = [{"prediction": "", "references": ["."]}, {"prediction": "a ship", "references": ["a ship", ""]}]
    assert captioning(said)["ROUGE-L"] == pytest.approx(50)
