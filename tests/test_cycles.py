"""Going around the cycle: what is kept of every half-step, in which order, with which draws."""

import numpy as np
import pytest
import torch
from families import FAMILIES, small

from umm_kit.data.language import caption
from umm_kit.data.oracle import Oracle
from umm_kit.data.shapes import Shapes
from umm_kit.evaluation.blame import PerfectReader, PerfectWriter
from umm_kit.evaluation.cycles import Cycles, around, batches, ceilings_of, choose_layers, origins
from umm_kit.evaluation.facts import FactTable, said, seen
from umm_kit.models.base import evaluating
from umm_kit.models.masked import MaskedUMM

DATA = Shapes("test", n=6, seed=2)


class Scribe:
    """Says how many pictures it has read, draws grey pictures, and remembers the draws it was given."""

    def __init__(self):
        self.draws = []

    def understand(self, images, prompts=None, decoding=None, generator=None):
        self.draws.append(float(torch.rand(1, generator=generator)))
        return ["a small red circle" for _ in images]

    def generate(self, texts, images=None, mask=None, decoding=None, generator=None):
        self.draws.append(float(torch.rand(1, generator=generator)))
        return DATA.images(range(len(texts)))


@pytest.fixture(scope="module")
def tiny():
    return MaskedUMM.tiny([DATA.caption(i) for i in range(6)] + ["a small red circle"])


class Faces:
    dim = 3

    def embed_text(self, texts):
        return torch.tensor([[len(t), 1.0, 0.0] for t in texts])

    def embed_image(self, images):
        return images.mean((2, 3))


def test_steps_alternate_and_are_kept():
    scribe = Scribe()
    trace = Cycles(scribe, scribe, scribe, Oracle()).run(DATA, 2, "text", 0, 4, keep=5)
    assert trace.kinds == ["text", "image", "text", "image", "text"]
    assert trace.texts[0] == [DATA.caption(i) for i in range(6)] and set(trace.texts) == {0, 2, 4}
    assert set(trace.images) == {1, 3} and trace.images[1].shape == (5, 3, 32, 32)
    assert trace.contents[0] == [said(t) for t in trace.texts[0]] and len(trace.contents[4]) == 6
    # Batches of 4 and 2: each batch was drawn from scenes 0, 1, ...
    assert trace.contents[1] == [seen(DATA.objects(i)) for i in (0, 1, 2, 3, 0, 1)]
    assert trace.lost.shape == (5, 6) and not trace.lost.any() and set(trace.status(4)) == {"ok"}
    back = Cycles(scribe, scribe, scribe, Oracle()).run(DATA, 1, "image", 0, 4)
    assert back.kinds == ["image", "text", "image"] and back.contents[0] == [seen(DATA.objects(i)) for i in range(6)]
    assert not back.images and back.teacher is None and not back.latents


def test_each_half_step_of_each_batch_has_its_own_draws_and_a_seed_repeats_them():
    draws = []
    for seed in (0, 0, 1):
        scribe = Scribe()
        Cycles(scribe, scribe, scribe).run(DATA, 2, "text", seed, 3)
        assert len(set(scribe.draws)) == len(scribe.draws) == 8
        draws.append(scribe.draws)
    assert draws[0] == draws[1] and not set(draws[0]) & set(draws[2])


def test_latents_are_the_pooled_states_of_the_flow_that_has_the_content_as_input(tiny):
    trace = Cycles(tiny, Scribe(), Scribe(), layers=[0, 3], teacher=Faces()).run(DATA, 1, "text", 0, 4)
    assert set(trace.latents) == {0, 3} and trace.latents[3].shape == (3, 6, tiny.hidden_size)
    texts, ids = trace.texts[0][:4], [str(i) for i in range(4)]
    batch = {"ids": ids, "texts": texts, "images": DATA.images(range(4))}
    everything = torch.ones(4, 64, dtype=torch.bool)
    drawn = tiny.generation_flow(batch | {"images": torch.rand(4, 3, 32, 32)}, mask=everything).hidden_states[3].mean(1)
    assert trace.latents[3][0, :4] == pytest.approx(drawn.detach().numpy(), abs=1e-5)  # whatever image is hidden
    read = tiny.understanding_flow(batch | {"texts": ["a circle"] * 4}).hidden_states[3].mean(1)
    assert trace.latents[3][1, :4] == pytest.approx(read.detach().numpy(), abs=1e-5)  # whatever caption it is asked for
    assert trace.teacher.shape == (3, 6, 3) and trace.teacher[0, :, 0].tolist() == [len(t) for t in trace.texts[0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_of_a_text_know_nothing_of_the_origin(family):
    """One text after two origins: a model without memory must look like one, by cosine and by retrieval."""
    model = small(family).eval()
    data = Shapes("test", n=4, image_size=model.image_size)
    around, texts = Cycles(model, Scribe(), Scribe(), layers=[1, 2]), ["a red circle", "two blue squares"]
    starts = [
        {"ids": ids, "texts": ["a ring"] * 2, "images": data.images(rows)} for ids, rows in (("ab", [0, 1]), ("cd", [2, 3]))
    ]
    with torch.no_grad():
        first, second = (around.latents(texts, origin) for origin in starts)
    for layer in (1, 2):
        assert first[layer] == pytest.approx(second[layer], abs=1e-5) and not np.allclose(first[layer][0], first[layer][1])


def test_without_an_oracle_only_silence_is_lost():
    class Mute(Scribe):
        def understand(self, images, **options):
            return ["gibberish", " "] + ["fine"] * (len(images) - 2)

    trace = Cycles(None, Mute(), Mute()).run(DATA, 1, "image", 0, 6)
    assert trace.status(1) == ["ok", "lost", "ok", "ok", "ok", "ok"] and trace.status(2) == ["ok"] * 6


def test_lost_is_a_text_that_does_not_parse_or_a_picture_without_objects():
    class Garbled(Scribe):
        def understand(self, images, **options):
            return [caption(DATA.objects(0)), *["a red banana"] * (len(images) - 1)]

        def generate(self, texts, **options):
            return torch.full((len(texts), 3, 32, 32), 0.5)

    trace = Cycles(None, Garbled(), Garbled(), Oracle()).run(DATA, 1, "text", 0, 6)
    assert trace.lost.tolist() == [[False] * 6, [True] * 6, [False, *[True] * 5]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"understand": lambda images, **o: ["a circle"]}, "1 texts for 6 images"),
        ({"generate": lambda texts, **o: torch.zeros(2, 3, 32, 32)}, "2 images for 6 texts"),
        ({"generate": lambda texts, **o: torch.full((6, 3, 32, 32), float("nan"))}, "NaN"),
    ],
)
def test_readers_and_writers_that_do_not_keep_their_contract(change, words):
    scribe = Scribe()
    for name, function in change.items():
        setattr(scribe, name, function)
    with pytest.raises(ValueError, match=words):
        Cycles(None, scribe, scribe).run(DATA, 1, "text", 0, 6)


def test_a_teacher_must_give_one_finite_row_each():
    class Odd(Faces):
        def embed_image(self, images):
            return torch.full((len(images), self.dim), float("nan"))

    with pytest.raises(ValueError, match=r"teacher's embeddings hold 18 NaN"):
        Cycles(None, Scribe(), Scribe(), teacher=Odd()).run(DATA, 1, "image", 0, 6)
    Odd.dim = 4
    with pytest.raises(ValueError, match=r"teacher gave \(6, 3\); expected \(6, 4\)"):
        Cycles(None, Scribe(), Scribe(), teacher=Odd()).run(DATA, 1, "text", 0, 6)


def test_batches_refuse_what_cannot_be_followed():
    items = [{"id": str(i), "images": torch.zeros(3, 8, 8), "texts": "a circle"} for i in range(4)]
    assert [len(b["ids"]) for b in batches(items, 3, "text")] == [3, 1]
    with pytest.raises(ValueError, match=r"ids repeat.*'0'"):
        list(batches([*items, items[0]], 2, "text"))
    bare = [{k: v for k, v in item.items() if k != "texts"} for item in items]
    assert next(batches(bare, 4, "image"))["texts"] == [""] * 4
    with pytest.raises(ValueError, match=r"4 items have no caption, such as '0'"):
        list(batches(bare, 4, "text"))
    with pytest.raises(ValueError, match="NaN"):
        list(batches([item | {"images": torch.full((3, 8, 8), float("nan"))} for item in items], 4, "text"))


def test_ceilings_are_of_true_images_and_of_round_trips(tiny):
    table = FactTable(origins(DATA, "image"))
    found = ceilings_of(tiny, DATA, Oracle(), table, 4, "image")
    assert set(found) == {"true images", "round trips"}
    assert found["true images"].mean() == 1  # the oracle reads its own renders
    assert found["round trips"].mean() < 0.5  # an untrained tokenizer
    assert set(ceilings_of(Scribe(), DATA, Oracle(), table, 4, "image")) == {"true images"}


def test_origins_say_what_the_captions_say_and_show_the_scenes_without_places():
    assert origins(DATA, "text") == [said(DATA.caption(i)) for i in range(6)]
    assert origins(DATA, "image") == [seen(DATA.objects(i), placed=False) for i in range(6)]


def test_layers(tiny):
    assert choose_layers(tiny, None) == [1, 3] and choose_layers(tiny, [-1]) == [3] and choose_layers(tiny, ()) == []
    assert choose_layers(Scribe(), None) == []
    with pytest.raises(ValueError, match="Scribe has no flows"):
        choose_layers(Scribe(), [1])
    with pytest.raises(ValueError, match="do not exist"):
        choose_layers(tiny, [9])


def test_evaluation_mode_is_given_back(tiny):
    tiny.train()
    with evaluating(tiny, Scribe()):
        assert not tiny.training
    assert tiny.training
    tiny.eval()


def test_one_text_or_picture_goes_around():
    class Perfect(PerfectReader, PerfectWriter):
        def __init__(self):
            PerfectReader.__init__(self, DATA)
            PerfectWriter.__init__(self, DATA)

    both = Perfect()
    words = around(both, "a small red circle at the top", cycles=2)
    assert [isinstance(step, str) for step in words] == [True, False, True, False, True] and words[4] == words[0]
    pictures = around(both, DATA.images([0])[0], cycles=1)
    assert [isinstance(step, str) for step in pictures] == [False, True, False] and pictures[1] == DATA.caption(0, "placed")
    for first, cycles in ((" ", 1), ("a circle", 0)):
        with pytest.raises(ValueError, match="expected at least one cycle, and words"):
            around(both, first, cycles)
