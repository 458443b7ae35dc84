"""The drift player: what it shows follows the sliders, and says which facts are kept, lost and denied."""

from datetime import datetime

import numpy as np
import pytest
import torch

import umm_kit as uk
from umm_kit.data.shapes import Shapes
from umm_kit.evaluation.blame import PerfectReader, PerfectWriter
from umm_kit.evaluation.facts import DENIED, KEPT
from umm_kit.models.masked import MaskedUMM
from umm_kit.widgets.drift import drift_player, make_it_drift

DATA = Shapes("test", n=12, seed=0)


class Repaint(PerfectWriter):
    """Draws everything red."""

    def generate(self, texts, **options):
        for colour in ("blue", "green", "yellow", "cyan", "magenta", "purple", "orange"):
            texts = [text.replace(colour, "red") for text in texts]
        return super().generate(texts, **options)


def untrained():
    """A model whose tokenizer keeps pictures as they are: only its latents are looked at."""
    torch.manual_seed(0)
    model = MaskedUMM.tiny(["a small red circle"])
    model.image_tokenizer.reconstruct = lambda images: images
    return model


@pytest.fixture(scope="module")
def found():
    model = untrained()
    return uk.drift(model, DATA, cycles=2, keep=4, reader=PerfectReader(DATA), writer=Repaint(DATA), progress=False)


def test_it_follows_both_sliders(found):
    player = drift_player(found)
    assert (player.item.max, player.step.max) == (3, 4)
    assert "half-step 0 of 4 (text, ok)" in player.said.value and found.traces[0].texts[0][0] in player.said.value
    before = player.picture.value, player.path.value
    player.step.value = 3
    assert "half-step 3 of 4 (image" in player.said.value and player.picture.value != before[0] and player.path.value != before[1]
    player.item.value = 2
    assert found.traces[0].texts[2][2] in player.said.value, "of a picture, the words it was drawn from"


def test_each_fact_of_the_origin_is_there_with_what_became_of_it(found):
    player = drift_player(found)
    player.step.value = 4
    for i in range(4):
        player.item.value = i
        rows = np.flatnonzero(found.table.owner == i)
        status = found.status[0, 4, rows]
        assert player.facts.value.count("✓") == (status == KEPT).sum()
        assert player.facts.value.count("✗") == (status == DENIED).sum()
        assert all(found.table.describe(row) in player.facts.value for row in rows)
    denied = found.table.category[found.status[0, 4] == DENIED]
    assert "colour" in denied and "shape" not in denied, "only colours were painted over"


def test_without_pictures_it_says_what_to_do(found):
    bare = uk.drift(untrained(), DATA, cycles=1, keep=0, reader=PerfectReader(DATA), writer=Repaint(DATA), progress=False)
    with pytest.raises(ValueError, match="keep=8"):
        drift_player(bare)


def png_of(image):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype("uint8")).save(file, "PNG")
    return file.getvalue()


def test_make_it_drift_takes_a_text_or_a_picture():
    class Model(PerfectReader, Repaint):
        image_size = 32

        def __init__(self):
            PerfectReader.__init__(self, DATA)
            Repaint.__init__(self, DATA)

    widget = make_it_drift(Model(), "a small blue circle at the top", cycles=2)
    widget.go.click()
    assert widget.said.value.endswith("has become &#x27;a small red circle at the top&#x27;") and len(widget.steps) == 5
    shown = widget.strip.value
    assert shown[:4] == b"\x89PNG"
    picture = {
        "name": "mine.png",
        "type": "image/png",
        "size": 1,
        "content": png_of(DATA.images([0])[0]),
        "last_modified": datetime.now(),
    }
    widget.upload.value = (picture,)
    assert len(widget.steps) == 5 and isinstance(widget.steps[0], torch.Tensor) and widget.strip.value != shown
    widget.upload.value = ({**picture, "content": b"no picture"},)
    assert "mine.png cannot be read as a picture" in widget.said.value
    widget.text.value = " "
    widget.go.click()
    assert "expected at least one cycle, and words to start from" in widget.said.value
