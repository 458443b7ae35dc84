"""Drift of models whose forgetting is known: perfect, constant, forgetful at a planted rate, garbled, with a private code."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import umm_kit as uk
from umm_kit.data.digits import Digits
from umm_kit.data.imagetext import ImageText
from umm_kit.data.language import caption, parse
from umm_kit.data.shapes import COLOUR_WEIGHTS, COLOURS, SHAPE_WEIGHTS, SHAPES, SIZES, Shapes
from umm_kit.evaluation.blame import PerfectReader, PerfectWriter, blame
from umm_kit.experiments.latentumm import of_drift
from umm_kit.models.base import Decoding
from umm_kit.models.masked import MaskedUMM
from umm_kit.models.teachers import EmbeddingTable

METRICS = {"survival", "recall", "floor", "ceiling", "lost", "contradictions", "caption_edit_distance"}
QUIET = {"progress": False}


class Perfect(PerfectReader, PerfectWriter):
    """Forgets nothing. What subclasses say of the objects they see is in ``retell``."""

    def __init__(self, data):
        PerfectReader.__init__(self, data)
        PerfectWriter.__init__(self, data)

    def understand(self, images, prompts=None, decoding=None, generator=None):
        self.rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        told = [self.retell(k, reading.objects) for k, reading in enumerate(self.oracle.read(images))]
        return [t if isinstance(t, str) else caption(t, "placed") if t else "" for t in told]

    def retell(self, k, objects):
        return objects


class Forgetful(Perfect):
    """Each attribute (or each object as a whole) is forgotten with probability p per cycle, and guessed as scenes are made."""

    def __init__(self, data, p, whole=False):
        super().__init__(data)
        self.p, self.whole = p, whole

    def guess(self):
        shape, colour = self.rng.choice(SHAPES, p=SHAPE_WEIGHTS), self.rng.choice(COLOURS, p=COLOUR_WEIGHTS)
        return {"shape": str(shape), "colour": str(colour), "size": str(self.rng.choice(SIZES))}

    def retell(self, k, objects):
        out = []
        for o in objects:
            gone = np.full(3, self.rng.random()) if self.whole else self.rng.random(3)
            out.append(replace(o, **{name: w for (name, w), u in zip(self.guess().items(), gone, strict=True) if u < self.p}))
        return out


class Constant(Perfect):
    def retell(self, k, objects):
        return "a small red circle and a large blue square"


class Swapped(Perfect):
    """Draws every colour as the next one, and reads it back: right in its own eyes, wrong in everybody else's."""

    def generate(self, texts, images=None, mask=None, decoding=None, generator=None):
        return super().generate([self.turn(text, 1) for text in texts], generator=generator)

    def retell(self, k, objects):
        return self.turn(caption(objects, "placed"), -1)

    def turn(self, text, by):
        return " ".join(COLOURS[(COLOURS.index(w) + by) % len(COLOURS)] if w in COLOURS else w for w in text.split())


class Faces:
    """A teacher that sees mean colours and counts letters."""

    dim = 3

    def embed_text(self, texts):
        return torch.tensor([[len(t), t.count("a"), t.count("e")] for t in texts], dtype=torch.float32)

    def embed_image(self, images):
        return images.mean((2, 3))


@pytest.fixture(scope="module")
def data():
    return Shapes("test", n=48, seed=4)


def column(drift, metric, **options):
    frame = drift.to_frame(**options)
    return frame[frame.metric == metric].set_index("cycle").value


@pytest.mark.parametrize("start", ["text", "image"])
def test_a_perfect_model_keeps_everything(data, start):
    drift = uk.drift(Perfect(data), data, cycles=3, start=start, batch_size=20, **QUIET)
    frame = drift.to_frame()
    assert list(frame.columns) == ["cycle", "metric", "value", "low", "high", "n"] and set(frame.cycle) == {1, 2, 3}
    assert set(frame.metric) - METRICS == set() and (frame.n == 48).all() and (frame.low <= frame.high).all()
    assert column(drift, "survival").tolist() == pytest.approx([1, 1, 1]) and column(drift, "lost").sum() == 0
    assert column(drift, "contradictions").sum() == 0 and column(drift, "ceiling").tolist() == [1, 1, 1]
    assert drift.mean_survival.value == pytest.approx(1) and drift.mean_survival.low < 1
    assert drift.half_life.censored and drift.half_life.value == 3 and drift.half_life.interval == (3, np.inf)
    assert set(drift.transitions().after) == {"kept"} and drift.private_code.value == 0
    first = drift.first_failure().set_index("category").value
    assert first["none"] == 1 and first.drop("none").sum() == 0
    table = drift.by_category()
    assert table.value.dropna().to_numpy() == pytest.approx(1) and {"shape", "colour", "size", "object", "count"} <= set(
        table.category
    )
    assert ("position" in set(table.category)) == (start == "text")  # from an image, places do not count
    assert any("tokenizer" in note for note in drift.notes) and "half-life     > 3" in repr(drift)
    assert isinstance(drift, uk.Drift) and drift.record["start"] == start and drift.ids == [item["id"] for item in data]


def test_a_constant_model_keeps_no_more_than_chance(data):
    drift = uk.drift(Constant(data), data, cycles=2, **QUIET)
    assert column(drift, "survival").tolist() == pytest.approx([0, 0], abs=1e-12)
    assert column(drift, "recall")[1] == pytest.approx(column(drift, "floor")[1]) and column(drift, "recall")[1] > 0.1
    assert not drift.half_life.censored and drift.half_life.value == pytest.approx(0.5)
    assert column(drift, "contradictions")[2] > 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_planted_half_life_lies_in_its_interval(whole):
    """Each attribute of single objects, or each object of whole scenes, forgotten with probability p per cycle."""
    p, scenes = 0.2, Shapes("test", n=120, seed=5, style="list")
    if not whole:
        scenes = Shapes.of([scenes.objects(i)[:1] for i in range(120)], style="list")
    drift = uk.drift(Forgetful(scenes, p, whole), scenes, cycles=6, layers=(), **QUIET)
    low, high = drift.half_life.interval
    assert low < np.log(0.5) / np.log(1 - p) < high
    assert drift.mean_survival.low < np.mean((1 - p) ** np.arange(1, 7)) < drift.mean_survival.high
    assert not drift.exponential_fit().rejected
    share = drift.transitions().set_index(["category", "before", "after"]).share
    chance = {"shape": (SHAPE_WEIGHTS**2).sum(), "size": 0.5}
    if not whole:  # forgotten and not guessed right again
        for category, guessed in chance.items():
            assert share[category, "kept", "lost"] == pytest.approx(p * (1 - guessed), abs=0.05)
            assert share[category, "lost", "regained"] == pytest.approx(
                p * (1 / (len(SHAPES) if category == "shape" else 2)), abs=0.06
            )


def test_saying_less_is_no_contradiction(data):
    class Brief(Perfect):
        def retell(self, k, objects):
            return objects[:1]

    drift = uk.drift(Brief(data), data, cycles=1, **QUIET)
    assert column(drift, "recall")[1] < 0.9 and column(drift, "contradictions")[1] == 0


def test_a_table_is_no_teacher_of_new_texts_and_numbers_are_whole(data):
    table = EmbeddingTable(["a"], torch.ones(1, 2), torch.ones(1, 2))
    for wrong, said in (
        (dict(teacher=table), "EmbeddingTable.*embed_text"),
        (dict(cycles=1.5), "whole"),
        (dict(seed=None), "whole"),
    ):
        with pytest.raises(ValueError, match=said):
            uk.drift(Perfect(data), data, **wrong, **QUIET)


def test_a_folder_of_pictures_goes_around(tmp_path):
    scenes = Shapes("test", n=6, seed=2)
    for k in range(6):
        pixels = (scenes[k]["images"].permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    pictures = ImageText(tmp_path, captions=False)
    drift = uk.drift(Perfect(scenes), pictures, cycles=2, start="image", **QUIET)
    assert drift.ids == [f"{k}.png" for k in range(6)] and drift.traces[0].texts[1][0]
    with pytest.raises(ValueError, match="6 items have no caption"):
        uk.drift(Perfect(scenes), pictures, cycles=2, **QUIET)


def test_lost_items_score_zero_and_stay(data):
    class Garbled(Perfect):
        def retell(self, k, objects):
            return "a red banana" if k % 4 == 0 else objects

    drift = uk.drift(Garbled(data), data, cycles=2, batch_size=48, **QUIET)
    assert column(drift, "lost").tolist() == [0.25, 0.25] and column(drift, "recall").tolist() == pytest.approx([0.75, 0.75])
    assert (drift.to_frame().n == 48).all() and column(drift, "contradictions").sum() == 0
    assert drift.traces[0].status(2)[:5] == ["lost", "ok", "ok", "ok", "lost"]
    first = drift.first_failure().set_index("category").value
    assert first["lost"] == 0.25 and first["none"] == 0.75
    assert column(drift, "lost", half_steps=True)[1.5] == 0.25  # nothing can be drawn from what nobody can read


def test_what_goes_first_and_what_stays(data):
    class Greyscale(Perfect):
        def retell(self, k, objects):
            return [replace(o, colour="red") for o in objects]

    drift = uk.drift(Greyscale(data), data, cycles=2, repeats=2, **QUIET)
    table = drift.by_category().set_index(["category", "cycle"]).value
    assert table["shape", 2] == pytest.approx(1) and table["size", 2] == pytest.approx(1)
    assert abs(table["colour", 2]) < 0.1 and table["count", 2] == pytest.approx(1) and table["object", 2] < 0.2
    first = drift.first_failure().set_index("category").value
    all_red = np.mean([all(o.colour == "red" for o in data.objects(i)) for i in range(48)])
    assert first["colour"] == pytest.approx(1 - all_red) and first["none"] == pytest.approx(all_red)
    assert set(drift.transitions().after) == {"kept", "lost"}
    # Nothing is left to chance: repeats agree on what is lost.
    noise = drift.noise().set_index("cycle")
    assert noise.sampling_sd[1] == 0 and noise.lost_again[1] == pytest.approx(1) and noise["lost"][1] > 0.1
    assert noise["drift"][1] == pytest.approx(1 - column(drift, "recall")[1])


def test_noise_is_told_from_drift_by_repeats(data):
    drift = uk.drift(Forgetful(data, 0.3), data, cycles=1, repeats=6, **QUIET)
    noise = drift.noise().iloc[0]
    assert noise["lost"] == pytest.approx(noise.lost_again, abs=0.06)  # pure chance: another repeat's losses say nothing
    assert noise.sampling_sd > 2 * noise.item_sd and noise.low < noise["drift"] < noise.high
    assert drift.mean_survival.n == 48 and len(drift.traces) == 6
    assert drift.status.shape[:2] == (6, 3) and len({tuple(run[2]) for run in drift.status.tolist()}) == 6
    with pytest.raises(ValueError, match="repeats=2 or more"):
        uk.drift(Perfect(data), data, cycles=1, **QUIET).noise()


def test_a_private_code_is_found(data):
    drift = uk.drift(Swapped(data), data, cycles=2, **QUIET)
    assert column(drift, "survival").tolist() == pytest.approx([1, 1])  # in its own words nothing is lost
    assert column(drift, "survival", half_steps=True)[0.5] < 0.8  # its pictures show something else
    assert drift.private_code.value == pytest.approx(1 / 3, abs=0.07)  # the colours, of shapes, colours and sizes
    assert drift.private_code.low > 0.2 and drift.private_code.p_value < 0.01
    from_image = uk.drift(Swapped(data), data, cycles=2, start="image", **QUIET)
    assert from_image.private_code.low > 0.2
    with pytest.raises(ValueError, match="at least 2 cycles"):
        _ = uk.drift(Swapped(data), data, cycles=1, start="image", **QUIET).private_code


def test_a_reader_that_errs_has_no_private_code(data):
    class Misread(Perfect):
        def retell(self, k, objects):
            return [replace(o, shape="ring") for o in objects]

    assert uk.drift(Misread(data), data, cycles=2, **QUIET).private_code.high < 0


def test_latents_and_teacher_are_followed(data, monkeypatch):
    model = MaskedUMM.tiny([data.caption(i) for i in range(48)] + [caption(data.objects(i), "placed") for i in range(48)])
    monkeypatch.setattr(model.image_tokenizer, "reconstruct", lambda images: images)  # an untrained one keeps nothing
    perfect = Perfect(data)
    drift = uk.drift(
        model, data, cycles=2, start="image", teacher=Faces(), reader=perfect, writer=perfect, layers=[1, 3], keep=2, **QUIET
    )
    frame = drift.to_frame()
    names = ("latent", "latent_1", "teacher")
    assert set(frame.metric) - METRICS == {f"{n}_{m}" for n in names for m in ("cosine", "step_cosine", "cosine_floor")} | {
        "retrieval_rank"
    }
    assert drift.layers == [1, 3] and drift.traces[0].images[2].shape == (2, 3, 32, 32)
    v = drift.traces[0].teacher
    near = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(v[4], v[0], strict=True)]
    assert column(drift, "teacher_cosine")[2] == pytest.approx(np.mean(near))
    states = drift.traces[0].latents[3]
    near = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(states[4], states[2], strict=True)]
    assert column(drift, "latent_step_cosine")[2] == pytest.approx(np.mean(near), abs=1e-6)
    half = drift.to_frame(half_steps=True)
    assert sorted(set(half.cycle)) == [0.5, 1, 1.5, 2] and "latent_cosine" not in set(half[half.cycle == 0.5].metric)
    # The same scenes under other nuisances: nearer to their own origin than to others'.
    assert (
        column(drift, "latent_cosine")[1] > column(drift, "latent_cosine_floor")[1] and column(drift, "retrieval_rank")[1] < 0.5
    )


def test_data_without_factors_are_followed_by_words_latents_and_teacher():
    scans = Digits("test", n=6)
    model = MaskedUMM.tiny(scans.texts)
    for start in ("text", "image"):
        drift = uk.drift(
            model, scans, cycles=2, start=start, teacher=Faces(), decoding=Decoding(steps=1, max_new_tokens=3), **QUIET
        )
        found = set(drift.to_frame().metric)
        assert {"latent_cosine", "teacher_cosine", "lost", "caption_edit_distance"} <= found
        assert not {"survival", "recall", "floor", "ceiling"} & found
        assert "no known factors" in drift.notes[0] and "note:" in repr(drift)
        for ask in ("mean_survival", "half_life", "private_code"):
            with pytest.raises(ValueError, match="no known factors"):
                getattr(drift, ask)
        with pytest.raises(ValueError, match="no known factors"):
            drift.by_category()


def test_items_too_alike_are_refused_before_anything_is_run(data):
    class Never:
        def generate(self, *args, **options):
            raise AssertionError("it was run")

    same = Shapes.of([data.objects(0)] * 6, style="list")
    with pytest.raises(ValueError, match=r"ceiling is 1\.000 and the floor at cycle 0 is 1\.000"):
        uk.drift(Never(), same, cycles=1, **QUIET)


def test_a_run_whose_floor_rises_to_the_ceiling_is_kept_without_survival(tmp_path):
    """Every caption says all that there is to say, so that other items' facts are kept as often as one's own."""

    data = Shapes("test", n=48, seed=4, style="list")
    every = ", ".join(f"a {size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES)

    class Everything(Perfect):
        def retell(self, k, objects):
            return every

    model = Everything(data)
    drift = uk.drift(model, data, cycles=2, teacher=Faces(), **QUIET)
    asked = (lambda: drift.mean_survival, lambda: drift.half_life, drift.survival, drift.by_category, drift.exponential_fit)
    for ask in (*asked, lambda: of_drift(drift), lambda: blame(model, data, cycles=1, progress=False)):
        with pytest.raises(ValueError, match=r"ceiling is .* floor at cycle \d is .*expected C - F"):
            ask()
    frame = drift.to_frame()
    assert {"recall", "floor", "ceiling", "lost", "teacher_cosine"} <= set(frame.metric) and "survival" not in set(frame.metric)
    assert column(drift, "ceiling")[1] - column(drift, "floor")[1] < 0.2 and column(drift, "lost").sum() == 0
    assert sum("survival is not measured: the ceiling is" in note for note in drift.notes) == 1
    assert replace(drift).notes == drift.notes and "survival is not measured" in repr(drift) and "half-life" not in repr(drift)
    assert not drift.measured and len(drift.traces[0].texts) == 3 and len(drift.first_failure()) and drift.private_code.n == 48
    drift.save(tmp_path / "drift.json")
    saved = json.loads((tmp_path / "drift.json").read_text())
    assert saved["results"] == {} and {"recall", "lost"} <= {row["metric"] for row in saved["rows"]}
    titles = {axes.get_title() for axes in drift.plot().axes}
    assert any("facts" in title for title in titles) and not any("category" in title for title in titles)


def test_a_tokenizer_that_keeps_nothing_lowers_the_ceiling_until_refusal(data):
    class Blind(Perfect):
        class image_tokenizer:
            @staticmethod
            def reconstruct(images):
                return torch.full_like(images, 0.5)

    with pytest.raises(ValueError, match=r"ceiling is 0\.000"):
        uk.drift(Blind(data), data, cycles=1, **QUIET)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cycles": 0}, "cycles=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"start": "sound"}, "start is 'sound'"),
        ({"layers": [1]}, "no flows"),
    ],
)
def test_bad_settings(data, options, words):
    with pytest.raises(ValueError, match=words):
        uk.drift(Perfect(data), data, **(QUIET | options))


def test_bad_data(data):
    with pytest.raises(ValueError, match=r"has 1 item\(s\)"):
        uk.drift(Perfect(data), Shapes("test", n=1), **QUIET)
    items = [{"id": str(i), "images": torch.full((3, 32, 32), 0.1 * i), "texts": ""} for i in range(3)]
    with pytest.raises(ValueError, match="no caption"):
        uk.drift(Perfect(data), items, cycles=1, **QUIET)
    assert uk.drift(Perfect(data), items, cycles=1, start="image", **QUIET).to_frame().metric.tolist() == ["lost"]
    items[1]["images"] = torch.full((3, 32, 32), float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        uk.drift(Perfect(data), items, cycles=1, start="image", **QUIET)


def test_a_seed_repeats_a_run_and_parse_keeps_what_is_said(data):
    runs = [uk.drift(Forgetful(data, 0.3), data, cycles=1, seed=s, **QUIET).traces[0].texts[2] for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2] and all(parse(text).ok for text in runs[0])


def test_paths_are_on_a_plane_fitted_at_step_0_and_the_plot_has_its_panels(data):
    torch.manual_seed(0)
    model = MaskedUMM.tiny(["a small red circle"])
    model.image_tokenizer.reconstruct = lambda images: images
    perfect = Perfect(data)
    found = uk.drift(model, data, cycles=2, reader=perfect, writer=perfect, **QUIET)
    where = found.paths()
    assert where.shape == (1, 3, len(data), 2)
    first = found.traces[0].latents[found.layers[-1]][0].astype(float)
    spread = np.linalg.svd(first - first.mean(0), compute_uv=False)
    np.testing.assert_allclose(np.sort(np.linalg.norm(where[0, 0], axis=0))[::-1], spread[:2], rtol=1e-6)
    with pytest.raises(ValueError, match="were not kept"):
        found.paths(99)
    assert [ax.get_title() for ax in found.plot().axes][:2] == ["what survives", "by category"]
