"""Perfect partners, exchanged readers and writers, and the one cycle of UnifiedBench."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from umm_kit.data.digits import Digits
from umm_kit.data.language import parse, prompts, vocabulary_corpus
from umm_kit.data.oracle import Oracle, holds, score_prompt
from umm_kit.data.shapes import SceneObject, Shapes
from umm_kit.evaluation.blame import (
    PerfectReader,
    PerfectWriter,
    ThroughTokenizer,
    WithoutPixels,
    arrange,
    blame,
    unified_bench,
)
from umm_kit.evaluation.survival import cosine
from umm_kit.models.base import Decoding
from umm_kit.models.masked import MaskedUMM

DATA = Shapes("test", n=24, seed=6)


class Half(PerfectReader, PerfectWriter):
    """Makes everything red as it reads, as it writes, or neither; its tokenizer blanks one picture in eight."""

    def __init__(self, reads=False, writes=False):
        PerfectReader.__init__(self, DATA)
        PerfectWriter.__init__(self, DATA)
        self.reads, self.writes = reads, writes

    @staticmethod
    def redden(text):
        told = [replace(p, colour="red") for p in parse(text).phrases]
        return ", ".join(map(str, told))

    def understand(self, images, prompts=None, decoding=None, generator=None):
        said = super().understand(images)
        return [self.redden(text) for text in said] if self.reads else said

    def generate(self, texts, images=None, mask=None, decoding=None, generator=None):
        return super().generate([self.redden(t) for t in texts] if self.writes else texts, generator=generator)

    class image_tokenizer:
        @staticmethod
        def reconstruct(images):
            return torch.where(torch.arange(len(images))[:, None, None, None] % 8 == 0, torch.full_like(images, 0.5), images)


def draw(texts, seed=0):
    return PerfectWriter(DATA).generate(texts, generator=torch.Generator().manual_seed(seed))


def test_the_perfect_writer_draws_what_any_prompt_says():
    texts = [p.text for p in prompts("test", 8, 0)] + [DATA.caption(i) for i in range(24)]
    readings = Oracle().read(draw(texts))
    assert all(score_prompt(text, reading).ok for text, reading in zip(texts, readings, strict=True))


def test_what_is_unsaid_is_drawn_at_random_and_repeatably():
    first, again, other = (draw(["a circle"] * 12, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    seen = [r.objects[0] for r in Oracle().read(first)]
    assert {o.shape for o in seen} == {"circle"} and all(
        len({getattr(o, n) for o in seen}) > 1 for n in ("colour", "size", "cell")
    )


def test_texts_that_cannot_be_drawn_as_they_are():
    nothing, many = Oracle().read(draw(["a red banana", "four circles and four squares"]))
    assert nothing.objects == [] and not nothing.unclear and len(many.objects) == 4
    rng = np.random.default_rng(0)
    crowded = arrange(parse("a red circle at the top and a blue square at the top"), rng)
    assert [o.colour for o in crowded] == ["red", "blue"] and len({o.cell for o in crowded}) == 2
    impossible = parse("a circle at the left right of a ring at the right")
    assert len(arrange(impossible, rng)) == 2 and not holds(impossible, arrange(impossible, rng), counted=False)
    for call in (
        lambda: PerfectWriter(DATA).generate(["a circle"], mask=1),
        lambda: PerfectReader(DATA).understand(None, ["what?"]),
    ):
        with pytest.raises(NotImplementedError, match="perfect"):
            call()


def test_the_perfect_reader_says_all_that_is_clear():
    assert PerfectReader(DATA).understand(DATA.images(range(24))) == [DATA.caption(i, "placed") for i in range(24)]
    assert PerfectReader(DATA).understand(torch.full((1, 3, 32, 32), 0.5)) == [""]


@pytest.fixture(scope="module")
def table():
    def of(model, **options):
        frame = blame(model, DATA, cycles=2, progress=False, **options)
        columns = ["reader", "writer", "mean_survival", "low", "high", "gain", "gain_low", "gain_high", "n"]
        assert list(frame.columns) == columns and (frame.n == 24).all()
        assert frame.gain.to_numpy() == pytest.approx(frame.mean_survival - frame.mean_survival[0])
        assert frame.iloc[0][["gain", "gain_low", "gain_high"]].tolist() == [0, 0, 0], "the model with itself"
        assert (frame.low <= frame.mean_survival + 1e-9).all() and (frame.mean_survival <= frame.high + 1e-9).all()
        return frame.set_index(["reader", "writer"]).mean_survival

    return of


@pytest.mark.parametrize("guilty", ["reader", "writer"])
def test_blame_names_the_guilty_part(table, guilty):
    found = table(Half(reads=guilty == "reader", writes=guilty == "writer"))
    alone = ("model", "oracle") if guilty == "reader" else ("oracle", "model")
    innocent = alone[::-1]
    assert found[alone] == pytest.approx(found["model", "model"]) and found[alone] < found[innocent] - 0.2
    assert found[innocent] == pytest.approx(found["oracle", "oracle"]) and found[innocent] > 0.99


def test_the_tokenizer_and_the_other_model_have_their_rows(table):
    found = table(Half(), other=Half(reads=True))
    assert len(found) == 3 * 3 + 1
    assert found["other", "model"] < found["oracle", "oracle"] - 0.2 and found["model", "other"] == pytest.approx(
        found["oracle", "oracle"]
    )
    through = found["oracle", "oracle, tokenized"]
    assert 0.7 < through < found["oracle", "oracle"] - 0.05  # what is blanked is lost


def test_through_the_tokenizer_is_a_round_trip():
    drawn = ThroughTokenizer(PerfectWriter(DATA), Half()).generate(["a circle"] * 9, generator=torch.Generator().manual_seed(0))
    assert (drawn[[0, 8]] == 0.5).all() and torch.equal(drawn[1:8], draw(["a circle"] * 9)[1:8])


def test_blame_asks_for_scenes():
    with pytest.raises(ValueError, match="Digits"):
        blame(Half(), Digits("test", n=4))


# --- one cycle -------------------------------------------------------------------------------------------------------


def hues(images):
    return (images - images.mean(1, keepdim=True)).flatten(1)


def test_unified_bench_against_a_loop():
    model = Half(writes=True)
    frame = unified_bench(model, DATA, hues, seed=3, batch_size=24, progress=False)
    assert list(frame.columns) == ["metric", "value", "low", "high", "n"] and (frame.n == 24).all()
    value = frame.set_index("metric").value
    assert set(value.index) == {"similarity", "ceiling", "floor", "lost", "survival"} and value["lost"] == 0
    images = DATA.images(range(24))
    again = model.image_tokenizer.reconstruct(images)
    assert value["ceiling"] == pytest.approx(cosine(hues(images).numpy(), hues(again).numpy()).mean(), abs=1e-5)
    assert 0 < value["floor"] < value["similarity"] < value["ceiling"]
    expected = (value["similarity"] - value["floor"]) / (value["ceiling"] - value["floor"])
    assert value["survival"] == pytest.approx(expected)
    perfect = unified_bench(Half(), DATA, hues, batch_size=24, progress=False).set_index("metric").value
    assert perfect["similarity"] > value["similarity"] + 0.1


def test_unified_bench_works_on_any_pictures_and_keeps_every_pair():
    class Mute(Half):
        def understand(self, images, **options):
            return [""] * len(images)

    scans = Digits("test", n=5)
    frame = unified_bench(Mute(), scans, lambda x: x.mean((2, 3)), progress=False).set_index("metric")
    assert frame.value["lost"] == 1 and (frame.n == 5).all()


def test_unified_bench_refuses_bad_input():
    with pytest.raises(ValueError, match=r"1 item\(s\)"):
        unified_bench(Half(), Shapes("test", n=1), hues)
    for embed in (lambda x: x.mean((0, 2, 3)), lambda x: x[:1].flatten(1), lambda x: hues(x) * float("nan")):
        with pytest.raises(ValueError, match="expected one finite vector each"):
            unified_bench(Half(), DATA, embed, progress=False)


def test_scenes_of_the_writer_are_those_of_the_renderer():
    text = "a small red circle at the top"
    assert Oracle().read(draw([text]))[0].shows([SceneObject("top", "circle", "red", "small")])


def test_codes_that_are_handed_on_skip_the_pixels():
    """The same drawing, read from its codes; pictures that were not drawn here are read as ever."""
    model = MaskedUMM.tiny(list(vocabulary_corpus()))
    both, texts, seed = WithoutPixels(model), [DATA.caption(i) for i in range(6)], 3
    drawn = both.generate(texts, decoding=Decoding(steps=2), generator=torch.Generator().manual_seed(seed))
    again = model.generate(texts, decoding=Decoding(steps=2), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(drawn, again)
    calls, encode = [], model.image_tokenizer.encode
    model.image_tokenizer.encode = lambda images: calls.append(len(images)) or encode(images)
    assert both.understand(drawn) == model.understand(drawn, codes=both.codes) and not calls
    others = DATA.images(range(6))
    assert both.understand(others) == model.understand(others) and calls == [6, 6]
    with pytest.raises(ValueError, match=r"codes are \(2, 3\); expected \(6, 64\)"):
        model.understand(others, codes=torch.zeros(2, 3, dtype=torch.long))
