"""Evaluation against fake models whose scores are known: perfect, constant, unreadable, wrong in one known thing."""

import json
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from umm_kit.data.digits import DIGITS, Digits
from umm_kit.data.language import CATEGORIES, NEGATIVES, NUMBERS, caption, main_relation, parse
from umm_kit.data.oracle import Oracle
from umm_kit.data.shapes import CELLS, SceneObject, Shapes
from umm_kit.evaluation import Evaluation, compare, evaluate
from umm_kit.evaluation.generation import object_mask
from umm_kit.statistics import wilson

SIZES = {"n_questions": 40, "n_prompts": 8, "progress": False}
ISSUE_METRICS = """caption_f1 caption_exact caption_nuisance_agreement qa_existence qa_colour qa_shape qa_count qa_relation
generation_overall generation_single_object generation_two_object generation_counting generation_colors generation_position
generation_color_attribution inpainting_objects""".split()
#: Not accuracies: 0 or one half is right here.
NOT_ONE = {"caption_unreadable": 0.0, **{f"qa_existence_{how}_yes_rate": 0.5 for how in NEGATIVES}, "qa_existence_yes_rate": 0.5}


def answer(objects, text):
    """The true answer, found from the question's words and not from the code that made the question."""
    words = text.rstrip("?").split()
    if text.startswith("is there"):
        return "yes" if any((o.colour, o.shape) == (words[3], words[4]) for o in objects) else "no"
    if text.startswith("what colour"):
        return next(o.colour for o in objects if o.shape == words[4])
    if text.startswith("what shape"):
        return next(o.shape for o in objects if o.colour == words[4])
    if text.startswith("how many"):
        named = [w.removesuffix("es") if w == "crosses" else w.removesuffix("s") for w in words[2:-2]]
        return NUMBERS[sum(all(w in (o.colour, o.shape, "thing") for w in named) for o in objects)]
    pairs = re.findall(r"the (\w+) (\w+)", text)
    found = [next(o for o in objects if (o.colour, o.shape) == pair) for pair in pairs]
    return found[0].cell if len(found) == 1 else main_relation(*found).removesuffix(" of")


def arrange(text):
    """Objects that make a prompt true: what was not said is chosen freely."""
    parsed = parse(text)
    free = {"left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom"), "below": ("bottom", "top")}
    cells = free[parsed.relations[0][1]] if parsed.relations else ("top left", "top right", "bottom left", "bottom right")
    things = [p for p in parsed.phrases for _ in range(p.number)]
    colours = ("red", "blue", "green", "yellow")
    return [SceneObject(p.cell or cells[k], p.shape, p.colour or colours[k], p.size or "large") for k, p in enumerate(things)]


class Perfect:
    """Reads scenes through the oracle and draws with the renderer."""

    grid, device = (8, 8), torch.device("cpu")
    image_tokenizer = SimpleNamespace(reconstruct=lambda images: images)

    def objects(self, images):
        return [reading.objects for reading in Oracle(32).read(images)]

    def understand(self, images, prompts=None, decoding=None, generator=None):
        if prompts is None:
            return [self.describe(objects) for objects in self.objects(images)]
        return [self.reply(objects, prompt) for objects, prompt in zip(self.objects(images), prompts, strict=True)]

    def describe(self, objects):
        return caption(objects, "list").capitalize() + "."

    def reply(self, objects, prompt):
        return answer(objects, prompt)

    def generate(self, texts, images=None, mask=None, decoding=None, generator=None):
        scenes = Shapes.of([arrange(text) for text in texts])
        return scenes.images(range(len(texts)))


class Constant(Perfect):
    def understand(self, images, prompts=None, decoding=None, generator=None):
        return ["a small red circle" if prompts is None else "yes"] * len(images)

    def generate(self, texts, images=None, mask=None, decoding=None, generator=None):
        return torch.full((len(texts), 3, 32, 32), 0.5)


@pytest.fixture(scope="module")
def data():
    return Shapes("test", n=48, seed=3)


@pytest.fixture(scope="module")
def perfect(data):
    return evaluate(Perfect(), data, **SIZES)


@pytest.fixture(scope="module")
def constant(data):
    return evaluate(Constant(), data, **SIZES)


def test_a_perfect_model_scores_one_everywhere(perfect, data):
    frame = perfect.to_frame()
    assert list(frame.columns) == ["metric", "value", "low", "high", "n"]
    assert set(ISSUE_METRICS) <= set(frame.metric) and frame.metric.is_unique
    for row in frame.itertuples():
        assert row.value == NOT_ONE.get(row.metric, 1.0), row
        assert (row.low <= row.value <= row.high and row.low < row.high) or row.metric.endswith("yes_rate"), row
    assert list(perfect.items["caption_f1"]) == [item["id"] for item in data]
    n = dict(zip(frame.metric, frame.n, strict=True))
    assert n["caption_f1"] == len(data) and n["qa_existence"] == n["inpainting_objects"] == 40
    assert n["generation_overall"] == 6 * 8 and n["generation_counting"] == 8 and n["generation_heldout"] == 16
    # Everything right is not certainty.
    assert perfect["caption_exact"].interval == wilson(48, 48)
    assert perfect["generation_overall"].interval == wilson(48, 48)


def test_a_constant_model_is_near_chance(constant, data):
    assert constant["qa_existence"].value == 0.5 == constant.chance["qa_existence"]
    assert constant["qa_existence_f1"].value == pytest.approx(2 / 3) == constant.chance["qa_existence_f1"]
    assert constant["qa_existence_popular_yes_rate"].value == 1
    for kind in ("colour", "shape", "count", "relation", "position"):
        assert constant[f"qa_{kind}"].value == 0 < constant.chance[f"qa_{kind}"] < 0.75
    for metric in ("generation_overall", "generation_strict", "generation_heldout", "inpainting_objects"):
        assert constant[metric].value == 0 and constant[metric].high > 0
    # It says the same of every image, so what it says of one scene suits the next just as well.
    assert constant["caption_f1"].value == pytest.approx(constant.chance["caption_f1"]) and constant["caption_f1"].value < 0.4
    assert constant["caption_nuisance_agreement"].value == 1


def test_chance_is_the_share_of_the_most_frequent_answer(perfect, data):
    asked = []

    class Noting(Perfect):
        def reply(self, objects, prompt):
            if prompt.startswith("how many"):
                asked.append(answer(objects, prompt))
            return answer(objects, prompt)

    evaluate(Noting(), data, tasks=["questions"], **SIZES)
    assert perfect.chance["qa_count"] == max(Counter(asked).values()) / len(asked)
    # Captions of other scenes and pictures of other prompts are worth something, but not much.
    assert 0 < perfect.chance["caption_f1"] < 0.7 and perfect.chance["caption_exact"] < 0.1
    assert 0 < perfect.chance["generation_overall"] < 0.5
    assert perfect.chance["generation_overall"] == pytest.approx(np.mean([perfect.chance[f"generation_{c}"] for c in CATEGORIES]))


def test_unreadable_text_is_a_failure_and_is_never_dropped(data):
    class Mumbling(Perfect):
        def describe(self, objects):
            return super().describe(objects).rstrip(".") + " and umm"

        def reply(self, objects, prompt):
            return "i think " + answer(objects, prompt)

    result = evaluate(Mumbling(), data, tasks=["captions", "questions"], **SIZES)
    n = dict(result.to_frame().set_index("metric").n)
    assert result["caption_unreadable"].value == 1 and n["caption_f1"] == len(data)
    for metric in ("caption_exact", "caption_nuisance_agreement", "qa_existence", "qa_existence_f1", "qa_count", "qa_position"):
        assert result[metric].value == 0, metric


def test_one_wrong_attribute_counts_as_that(data):
    class Colourblind(Perfect):
        """Takes every red thing for an orange one."""

        def objects(self, images):
            return [[replace(o, colour="orange") if o.colour == "red" else o for o in scene] for scene in super().objects(images)]

    circle = SceneObject("right", "circle", "blue", "large")
    pairs = Shapes.of([[SceneObject("left", "square", colour, "small"), circle] for colour in ("red", "green", "red", "yellow")])
    result = evaluate(Colourblind(), pairs, tasks=["captions"], **SIZES)
    assert result["caption_exact"].value == 0.5
    assert result["caption_nuisance_agreement"].value == 1
    # Two objects have six facts: (shape), (colour, shape) and (size, shape) of each. One of them is wrong in two scenes.
    for metric in ("caption_f1", "caption_precision", "caption_recall"):
        assert list(result.items[metric].values()) == pytest.approx([5 / 6, 1, 5 / 6, 1])
        assert result[metric].value == pytest.approx(11 / 12)


def test_agreement_across_nuisances_by_hand():
    first, second = SceneObject("left", "square", "red", "small"), SceneObject("right", "square", "red", "small")
    looked = []

    class Moody(Perfect):
        """Says the same in other words, or one thing less, depending on the nuisances."""

        def describe(self, objects):
            looked.append(len(objects))
            words = ["two small red squares", "a small red square and a small red square", self.third]
            return words[min((len(looked) - 1) // 2, 2)]  # two scenes per draw; the held-out scenes come last

    data = Shapes.of([[first, second], [first, second]])
    Moody.third = "a small red square at the left and a small red square at the right"
    assert evaluate(Moody(), data, tasks=["captions"], **SIZES | {"n_questions": 2})["caption_nuisance_agreement"].value == 1
    assert looked[:6] == [2] * 6
    looked.clear()
    Moody.third = "a small red square"
    result = evaluate(Moody(), data, tasks=["captions"], **SIZES | {"n_questions": 2})
    assert result["caption_nuisance_agreement"].value == pytest.approx(1 / 3)  # of three pairs of draws one agrees


def test_nuisance_draws_show_the_same_scene_differently():
    shown = []

    class Noting(Perfect):
        def understand(self, images, prompts=None, decoding=None, generator=None):
            shown.append(images)
            return super().understand(images, prompts)

    data = Shapes("test", n=12)
    evaluate(Noting(), data, tasks=["captions"], **SIZES | {"n_questions": 12})
    draws = shown[:3]
    assert torch.equal(draws[0], data.images(range(12)))
    assert all(Perfect().objects(d) == Perfect().objects(data.images(range(12))) for d in draws)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert ((draws[a] - draws[b]).abs().mean((1, 2, 3)) > 0.01).all()


def test_existence_by_hand():
    class Eager(Perfect):
        """Right about what is there; of absent things it denies those of one shape only."""

        def reply(self, objects, prompt):
            return "no" if "circle" in prompt and answer(objects, prompt) == "no" else "yes"

    data = Shapes("test", n=40, seed=5)
    result = evaluate(Eager(), data, tasks=["questions"], **SIZES)
    for how in NEGATIVES:
        accuracy, yes = result[f"qa_existence_{how}"].value, result[f"qa_existence_{how}_yes_rate"].value
        false = 2 * (1 - accuracy)  # every present thing is seen: what is wrong is a false yes
        assert yes == pytest.approx((1 + false) / 2)
        assert result[f"qa_existence_{how}_f1"].value == pytest.approx(2 / (2 + false))
    mean = np.mean([result[f"qa_existence_{how}"].value for how in NEGATIVES])
    assert result["qa_existence"].value == pytest.approx(mean) and 0.5 < mean < 0.9


def test_existence_f1_counts_what_is_missed():
    class Timid(Perfect):
        def reply(self, objects, prompt):
            return "yes" if answer(objects, prompt) == "yes" and "circle" in prompt else "no"

    result = evaluate(Timid(), Shapes("test", n=40, seed=5), tasks=["questions"], **SIZES)
    seen = 2 * result["qa_existence_yes_rate"].value  # share of present things that it sees; it never sees absent ones
    assert 0 < seen < 0.6 and result["qa_existence"].value == pytest.approx((1 + seen) / 2)
    assert result["qa_existence_f1"].value == pytest.approx(2 * seen / (1 + seen))


def test_generation_strict_and_categories(data):
    class Generous(Perfect):
        """Draws what is asked and one thing more; cannot count."""

        def generate(self, texts, images=None, mask=None, decoding=None, generator=None):
            scenes = []
            for text in texts:
                scene = arrange(text)
                number = parse(text).phrases[0].exact
                more = SceneObject("centre", "ring" if scene[0].shape != "ring" else "cross", "purple", "small")
                scenes.append(scene[:-1] if number else [*scene[:3], more])
            return Shapes.of(scenes).images(range(len(scenes)))

    result = evaluate(Generous(), data, tasks=["generation"], **SIZES)
    assert result["generation_counting"].value == 0 and result["generation_strict"].value == 0
    assert result["generation_color_attribution"].value == 1
    categories = [result[f"generation_{c}"].value for c in CATEGORIES]
    assert result["generation_overall"].value == pytest.approx(np.mean(categories))
    # The categories are as they are; only what varies within them can make the mean uncertain.
    spread = [c * (1 - c) / 8 for c in categories]
    assert result["generation_overall"].high - result["generation_overall"].low <= 4 * np.sqrt(sum(spread)) / 6 + 0.06


def test_inpainting_sees_the_hidden_object_and_the_others(data):
    class Forgetful(Perfect):
        """Leaves the hidden region empty and takes care of the rest."""

        def generate(self, texts, images=None, mask=None, decoding=None, generator=None):
            assert images is not None and mask.dtype == torch.bool and mask.shape == (len(texts), 8, 8)
            pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
            return torch.where(pixels, torch.full_like(images, 0.5), images)

    def covered(o, mask):
        return (mask & object_mask(np.array([CELLS.index(o.cell)]), (8, 8), 32)[0]).sum()

    class Smearing(Perfect):
        """Redraws the hidden object alone, on an empty image."""

        def generate(self, texts, images=None, mask=None, decoding=None, generator=None):
            scenes = [[max(arrange(text), key=lambda o, m=m: covered(o, m))] for text, m in zip(texts, mask, strict=True)]
            return Shapes.of(scenes).images(range(len(scenes)))

    forgetful = evaluate(Forgetful(), data, tasks=["inpainting"], **SIZES)
    assert forgetful["inpainting_objects"].value == 0 and forgetful["inpainting_kept"].value > 0.5
    smearing = evaluate(Smearing(), data, tasks=["inpainting"], **SIZES)
    assert smearing["inpainting_objects"].value == 1 and smearing["inpainting_kept"].value == 0


def test_object_mask_by_hand():
    mask = object_mask(np.array([0, 4, 8]), (8, 8), 32)
    assert mask.shape == (3, 8, 8)
    for k, (first, last) in enumerate([(0, 3), (2, 6), (5, 8)]):  # boxes of 12 pixels from 0, 10 and 20; tokens of 4
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[first:last, first:last] = True
        assert torch.equal(mask[k], expected)
    assert torch.equal(object_mask(np.array([1]), (4, 8), 64)[0].any(0).nonzero()[:, 0], torch.tensor([2, 3, 4, 5]))


def test_what_is_asked_does_not_depend_on_the_batch_size(perfect, data):
    seen = []

    class Noting(Perfect):
        def reply(self, objects, prompt):
            seen.append(prompt)
            return "no"

    a = evaluate(Noting(), data, tasks=["questions"], **SIZES)
    first, seen[:] = list(seen), []
    b = evaluate(Noting(), data, tasks=["questions"], batch_size=7, seed=9, **SIZES)
    assert first == seen and a.items == b.items


def test_a_generator_is_seeded_per_batch(data):
    drawn = []

    class Noisy(Perfect):
        def generate(self, texts, images=None, mask=None, decoding=None, generator=None):
            drawn.append(torch.rand(3, generator=generator).tolist())
            return super().generate(texts)

    options = SIZES | {"tasks": ["generation"], "batch_size": 16}
    evaluate(Noisy(), data, **options)
    first, drawn[:] = list(drawn), []
    evaluate(Noisy(), data, **options)
    assert first == drawn and len({tuple(d) for d in first}) == len(first) > 3
    evaluate(Noisy(), data, seed=1, **options)
    assert not {tuple(d) for d in drawn[len(first) :]} & {tuple(d) for d in first}


def test_compare_is_paired_and_refuses_other_items(perfect, constant, data):
    frame = compare(perfect, constant).set_index("metric")
    row = frame.loc["caption_exact"]
    assert row.difference == row.a - row.b and row.a == 1 and row.b == constant["caption_exact"].value
    assert row.low <= row.difference <= row.high and row.p_value < 0.01
    assert frame.loc["caption_f1"].difference == pytest.approx(1 - constant["caption_f1"].value)
    assert frame.loc["generation_overall"].difference == 1
    same = compare(perfect, perfect)
    assert (same.difference == 0).all() and (same.p_value == 1).all() and (same.high > 0).all()
    other = evaluate(Perfect(), Shapes("test", n=48, seed=4), tasks=["captions"], **SIZES)
    with pytest.raises(ValueError, match="caption_f1 was measured on different items: 96 ids"):
        compare(perfect, other)
    with pytest.raises(ValueError, match="no metric in common"):
        compare(other, evaluate(Perfect(), data, tasks=["inpainting"], **SIZES))


def test_save_load_and_print(perfect, tmp_path):
    perfect.save(tmp_path / "runs" / "scores.json")
    again = Evaluation.load(tmp_path / "runs" / "scores.json")
    assert again.to_frame().equals(perfect.to_frame()) and repr(again) == repr(perfect)
    assert (compare(perfect, again).difference == 0).all()
    stored = json.loads((tmp_path / "runs" / "scores.json").read_text())
    assert stored["metrics"][0]["metric"] == "caption_f1" and stored["record"]["versions"]["torch"] == torch.__version__
    assert stored["record"]["seconds"] > 0 and "Shapes('test', n=48, seed=3" in stored["record"]["data"]
    line = next(line for line in repr(perfect).splitlines() if line.startswith("qa_colour"))
    assert f"{perfect.chance['qa_colour']:.3f}" in line and "1.000" in line
    with pytest.raises(KeyError, match="'caption' was not measured; there are caption_f1"):
        perfect["caption"]


def test_what_a_family_cannot_do_is_said(data):
    class Blind(torch.nn.Module):
        grid = (8, 8)

        def understand(self, images, prompts=None, decoding=None, generator=None):
            assert not self.training and not torch.is_grad_enabled()
            return ["a red circle"] * len(images)

        def generate(self, texts, images=None, mask=None, decoding=None, generator=None):
            raise NotImplementedError("Blind draws nothing: it has no image head")

    model = Blind().train()
    result = evaluate(model, data, tasks=["captions", "inpainting"], **SIZES)
    assert model.training and "inpainting: Blind draws nothing: it has no image head" in result.notes
    assert "inpainting_objects" not in set(result.to_frame().metric) and "no image head" in repr(result)


class Bookish(Perfect):
    """Knows a data set's images by heart; draws the training scan of the digit that is asked for."""

    def __init__(self, data):
        self.known = {data[i]["images"].numpy().tobytes(): i for i in range(len(data))}
        self.data = data

    def understand(self, images, prompts=None, decoding=None, generator=None):
        rows = [self.known[image.numpy().tobytes()] for image in images]
        if prompts is None:
            return [self.data[i]["texts"].upper() for i in rows]
        return [next(q.answer for q in self.data.question(i) if q.text == p) for i, p in zip(rows, prompts, strict=True)]

    def generate(self, texts, images=None, mask=None, decoding=None, generator=None):
        train = Digits("train", n=200)
        scans = {int(train[i]["factors"]["digit"]): train[i]["images"] for i in range(200)}
        return torch.stack([scans[DIGITS.index(text.split()[-1])] for text in texts])


def test_digits():
    data = Digits("test", n=60)
    result = evaluate(Bookish(data), data, **SIZES)
    for metric in ("caption_digit", "caption_exact", "caption_token_f1", "qa_digit", "qa_thickness", "qa_slant"):
        assert result[metric].value == 1, metric
    assert result["generation_digit"].value == 1
    assert result["reconstruction_error"].value == 0
    assert 0.95 < result["generation_digit_ceiling"].value < 1 and result["generation_digit_ceiling"].n == len(Digits("test"))
    assert 0.05 < result.chance["qa_digit"] < 0.25
    blank = evaluate(Constant(), data, **SIZES)
    assert blank["generation_digit"].value < 0.3 and blank["caption_digit"].value == 0 and blank["caption_token_f1"].value < 0.5


def test_other_pairs_say_what_cannot_be_measured():
    class Pairs(list):
        def __repr__(self):
            return "Pairs"

    data = Pairs({"id": str(i), "images": torch.rand(3, 32, 32), "texts": f"a dog number {i}."} for i in range(10))

    class Dim(Perfect):
        image_tokenizer = SimpleNamespace(reconstruct=lambda images: images * 0.5)

        def understand(self, images, prompts=None, decoding=None, generator=None):
            return ["A dog number 3"] * len(images)

    result = evaluate(Dim(), data, progress=False)
    assert list(result.to_frame().metric) == ["caption_exact", "caption_token_f1", "reconstruction_error"]
    assert result["caption_exact"].value == 0.1
    assert result["caption_token_f1"].value == pytest.approx((9 * 3 + 4) / 40)
    mean = float(torch.stack([item["images"] for item in data]).mean())
    assert result["reconstruction_error"].value == pytest.approx(mean / 2, abs=1e-6)
    assert any("cannot be scored" in note for note in result.notes)
    with pytest.raises(ValueError, match=r"\['questions'\] cannot be measured on Pairs"):
        evaluate(Dim(), data, tasks=["questions"])
    with pytest.raises(ValueError, match="'3' occurs twice"):
        evaluate(Dim(), Pairs(data[3:] + data[3:4]), progress=False)


@pytest.mark.parametrize("wrong", [{"n_questions": 1}, {"n_prompts": 0}, {"batch_size": 0}])
def test_refuses_sizes(wrong, data):
    with pytest.raises(ValueError, match="expected at least 2"):
        evaluate(Perfect(), data, **wrong)
