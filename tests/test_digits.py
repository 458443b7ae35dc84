"""Scanned digits: words that are measured on the scan, splits that nobody can cross, questions that agree with the caption."""

import numpy as np
import pytest
import torch

from umm_kit.data.digits import DIGITS, SLANT, Digits, digit_word, slant, stroke_width, to_scan
from umm_kit.models.base import collate


def naive_width(scan):
    total = sum(
        scan[y, x] * scan[y + dy, x + dx]
        for y in range(8) for x in range(8) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
        if 0 <= y + dy < 8 and 0 <= x + dx < 8
    )  # fmt: skip
    return total / (3 * scan.sum())


def naive_slant(scan):
    y, x = np.divmod(np.arange(64), 8)
    covariance = np.cov(np.stack([x, y]), aweights=scan.flatten(), bias=True)
    return -covariance[0, 1] / covariance[1, 1]


def test_stroke_width_and_slant_by_hand():
    bars = np.zeros((2, 8, 8))
    bars[0, :, 3] = 1
    bars[1, :, 3:5] = 1
    # Every ink pixel of a bar of width w sees 3 w, but for the two rows at the ends, which see 2 w.
    assert np.allclose(stroke_width(bars), [1 - 2 / 8 / 3, 2 - 2 * 2 / 8 / 3])
    assert np.allclose(slant(bars), 0)
    diagonal = np.eye(8)[::-1][None]  # from the bottom left to the top right: one column per row upwards
    assert np.allclose(slant(diagonal), 1) and np.allclose(slant(diagonal[:, :, ::-1]), -1)
    scan = np.random.default_rng(0).random((1, 8, 8))
    assert np.allclose(slant(scan[:, :, ::-1]), -slant(scan)) and np.allclose(slant(scan * 0.3), slant(scan))
    assert np.allclose(stroke_width(scan[:, ::-1]), stroke_width(scan))
    assert np.allclose(stroke_width(scan * 0.5), 0.5 * stroke_width(scan))


@pytest.fixture(scope="module")
def digits():
    return {split: Digits(split) for split in ("train", "validation", "test")}


def test_splits_are_disjoint_exhaustive_and_stratified(digits):
    ids = [i for data in digits.values() for i in data.ids]
    assert len(ids) == len(set(ids)) == 1797
    assert [len(digits[s]) for s in digits] == pytest.approx([1797 * share for share in (0.7, 0.15, 0.15)], abs=10)
    for data in digits.values():
        counts = np.bincount([digit_word(text) for text in data.texts], minlength=10)
        assert counts.max() - counts.min() <= 0.08 * counts.mean() + 1
    # A seed changes the order, never the members: nobody can train on a test scan by choosing another one.
    other = Digits("test", seed=7)
    assert set(other.ids) == set(digits["test"].ids) and other.ids != digits["test"].ids
    assert Digits("test", n=5, seed=7).ids == other.ids[:5]


def test_digit_words_against_a_naive_reference(digits):
    from sklearn.datasets import load_digits

    loaded = load_digits()
    row = {split: [int(i.removeprefix("digits-")) for i in data.ids] for split, data in digits.items()}
    limits, checked = {}, 0
    for k in range(10):
        mine = [loaded.images[r] / 16 for r in row["train"] if loaded.target[r] == k]
        limits[k] = [np.quantile([measure(s) for s in mine], [1 / 3, 2 / 3]) for measure in (naive_width, naive_slant)]
    for split, data in digits.items():
        for text, r in zip(data.texts, row[split], strict=True):
            k, scan = int(loaded.target[r]), loaded.images[r] / 16
            (thin, thick), (back, lean) = limits[k]
            width, shear = naive_width(scan), naive_slant(scan)
            if min(np.abs(np.subtract(width, limits[k][0])).min(), np.abs(np.subtract(shear, limits[k][1])).min()) < 1e-9:
                continue  # a scan that is itself the tertile: rounding decides
            words = ["thin"] if width < thin else ["thick"] if width > thick else []
            words.append("backslanted" if shear < back else "slanted" if shear > lean else "upright")
            assert text.split()[1:] == [*words, DIGITS[k]]
            checked += 1
    assert checked > 1750


def test_words_do_not_depend_on_the_digit(digits):
    for words in (("thin", "thick"), ("backslanted", "upright", "slanted")):
        for word in words:
            share = [np.mean([word in t.split() for t in digits["train"].texts if digit_word(t) == k]) for k in range(10)]
            assert np.allclose(share, 1 / 3, atol=0.02)


def test_digit_items(digits):
    data = digits["test"]
    item = data[3]
    assert item["images"].shape == (3, 32, 32) and 0 <= item["images"].min() and item["images"].max() <= 1
    assert torch.equal(item["images"][0], item["images"][2])
    factors = item["factors"]
    assert int(factors["digit"]) == digit_word(item["texts"])
    assert SLANT[factors["slant_word"]] in item["texts"].split()
    for other in (data.__getitems__([3])[0], data[3 - len(data)], list(data)[3], Digits("test", n=4)[3]):
        assert torch.equal(other["images"], item["images"]) and other["id"] == item["id"] and other["texts"] == item["texts"]
        assert all(torch.equal(other["factors"][k], v) for k, v in factors.items())
    batch = collate(data.__getitems__(range(5)))
    assert batch["factors"]["thickness"].shape == (5,) and len(batch["ids"]) == 5
    assert Digits("test", n=2, image_size=64)[0]["images"].shape == (3, 64, 64)
    assert repr(Digits("test", n=2)) == "Digits('test', n=2, seed=0, image_size=32)"


def test_digits_do_not_drift():
    data = Digits("test", n=3)
    pinned = [("digits-1449", "a thin upright six"), ("digits-0462", "a slanted eight"), ("digits-0838", "a thick slanted three")]
    assert list(zip(data.ids, data.texts, strict=True)) == pinned
    assert [len(Digits(split)) for split in ("train", "validation", "test")] == [1262, 269, 266]


def test_an_independent_classifier_reads_the_enlarged_digits(digits):
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    items = list(digits["test"])
    pixels = to_scan(torch.stack([i["images"] for i in items])).flatten(1).numpy()
    labels = [int(i["factors"]["digit"]) for i in items]
    rows = [int(i.removeprefix("digits-")) for i in digits["test"].ids]
    originals = load_digits().images[rows].reshape(len(rows), -1)
    assert np.abs(pixels - originals).mean() < 0.8  # of 16 levels
    train = [int(i.removeprefix("digits-")) for i in digits["train"].ids]
    classifier = KNeighborsClassifier(3).fit(load_digits().data[train], load_digits().target[train])
    assert classifier.score(pixels, labels) > 0.97


def test_questions_agree_with_the_caption(digits):
    data = digits["validation"]
    answers = set()
    for i in range(60):
        words = data.texts[i].split()
        for question in data.question(i):
            if question.kind == "digit":
                assert question.answer == words[-1]
            else:
                word = question.text.removeprefix("is it ").removesuffix("?")
                assert question.answer == ("yes" if word in words else "no")
                answers.add((word, question.answer))
    assert len(answers) == 10  # each of five words is answered both ways
    every = [(q.text, q.answer) for q in data.question(0)]
    assert sorted(data.questions([0], 6)[0]) == sorted(every) and data.questions([0], 2)[0] == data.questions([0], 12)[0][6:8]
    assert len({asked[0][0] for asked in data.questions(range(60), 1)}) == 6


def test_digit_word():
    assert [digit_word(DIGITS[k]) for k in range(10)] == list(range(10))
    assert digit_word("A thick, slanted SEVEN.") == 7 and digit_word("seven seven") == 7
    assert digit_word("a seven and a two") is None and digit_word("") is None and digit_word("sevenths of someone") is None


def test_mistaken_digits_are_refused():
    for option, value in (("split", "heldout"), ("n", 0), ("n", 5000), ("image_size", 7)):
        with pytest.raises(ValueError, match=rf"{option} is '?{value}"):
            Digits(**{option: value})
    with pytest.raises(IndexError):
        Digits("test", n=2)[2]
