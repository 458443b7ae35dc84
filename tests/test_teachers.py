"""Teachers: real classes of transformers at tiny sizes, saved and read again; tables by id; retrieval by hand; refusals."""

import json

import pyarrow
import pytest
import torch
import transformers
from datasets import Dataset
from pyarrow import feather, parquet
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from umm_kit.data.shapes import Shapes
from umm_kit.models.teachers import CLIPTeacher, EmbeddingTable, Teacher, embeddings, load_teacher, retrieval, retrieved
from umm_kit.models.tokenizers import train_text_tokenizer
from umm_kit.trainers.stages import facts_of

TEXTS = ["a red circle", "a blue square and a red circle", "a large green triangle"]


def teacher(kind="clip"):
    torch.manual_seed(0)
    words = train_text_tokenizer(TEXTS)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    text = dict(
        sizes, vocab_size=len(words), max_position_embeddings=12, eos_token_id=words.eos_token_id, bos_token_id=1, pad_token_id=0
    )
    vision = dict(sizes, image_size=16, patch_size=8)
    if kind == "clip":
        return CLIPTeacher(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)), words)
    ends = {f"{name}_token": getattr(words, f"{name}_token") for name in ("pad", "unk", "bos", "eos")}
    words = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, model_input_names=["input_ids"], **ends)
    config = SiglipConfig(text_config=dict(text, projection_size=16), vision_config=vision)
    return CLIPTeacher(SiglipModel(config), words, ((0.5,) * 3, (0.5,) * 3))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_real_classes_give_unit_vectors_whatever_the_batch(kind, tmp_path):
    one = teacher(kind)
    assert isinstance(one, Teacher)
    images = Shapes("test", n=5, seed=0).images(range(5))
    text, image = one.embed_text(TEXTS), one.embed_image(images)
    assert text.shape == (3, one.dim) and image.shape == (5, one.dim) and not text.requires_grad
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    one.batch_size = 2
    torch.testing.assert_close(one.embed_text(TEXTS), text)
    torch.testing.assert_close(one.embed_image(images), image)
    one.save_pretrained(tmp_path / "t")
    again = CLIPTeacher.from_pretrained(tmp_path / "t", device="cpu")
    torch.testing.assert_close(again.embed_text(TEXTS), text)
    torch.testing.assert_close(again.embed_image(images), image)
    assert {p.suffix for p in (tmp_path / "t").iterdir()} <= {".json", ".safetensors"}


def test_pixels_by_hand():
    """White through CLIP's statistics; another size is resized first."""
    one = teacher()
    pixels = one.pixels(torch.ones(1, 3, 32, 32))
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels[0, :, 0, 0].tolist() == pytest.approx(
        [(1 - 0.4815) / 0.2686, (1 - 0.4578) / 0.2613, (1 - 0.4082) / 0.2758], rel=1e-4
    )


def test_long_texts_are_cut_and_empty_lists_are_empty():
    one = teacher()
    assert one.embed_text(["a red circle " * 20]).shape == (1, 8)
    assert one.embed_text([]).shape == (0, 8)


def test_retrieval_by_hand():
    """Two of three texts find their image, one image of three its text back; equal facts count as found."""
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.9]])
    scores = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(image, dim=1).T
    naive = [float(max(range(3), key=lambda j: m[i][j]) == i) for m in (scores.tolist(), scores.T.tolist()) for i in range(3)]
    assert retrieval(text, image) == pytest.approx(sum(naive) / 6) and retrieval(text, image) < 1
    assert retrieval(text, image, ["x", "y", "y"]) > retrieval(text, image)
    assert retrieval(torch.eye(4), torch.eye(4)) == 1.0


# --- tables ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    rng = torch.Generator().manual_seed(0)
    return EmbeddingTable(["a", "b", "c"], 3 * torch.randn(3, 5, generator=rng), torch.randn(3, 5, generator=rng))


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_tables_are_read_again(table, tmp_path, suffix):
    file = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        Dataset.from_dict({"id": ["a", "b", "c"], "text": table.text.tolist(), "image": table.image.tolist()}).to_parquet(
            str(file)
        )
    else:
        table.save(file)
    text, image = EmbeddingTable.load(file).of(["c", "a"])
    torch.testing.assert_close(text, table.text[[2, 0]])
    torch.testing.assert_close(image, table.image[[2, 0]])
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("suffix", [".arrow", ".feather"])
@pytest.mark.parametrize("kind", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_arrow_tables_are_read_whether_files_or_streams(table, tmp_path, suffix, kind):
    file = tmp_path / f"table{suffix}"
    rows = pyarrow.table({"id": ["a", "b", "c"], "text": table.text.tolist(), "image": table.image.tolist()})
    with kind(str(file), rows.schema) as writer:
        writer.write_table(rows)
    torch.testing.assert_close(EmbeddingTable.load(file).of(["c", "a"])[1], table.image[[2, 0]])


@pytest.mark.parametrize("what", ["cut", "null", "ragged", "words", "junk", "nothing"])
@pytest.mark.parametrize("suffix", [".arrow", ".feather", ".parquet"])
def test_tables_that_cannot_be_read_are_named(tmp_path, suffix, what):
    file = tmp_path / f"table{suffix}"
    text = {"null": [[1.0, 0.0], None], "ragged": [[1.0, 0.0], [1.0]], "words": ["x", "y"]}.get(what, [[1.0, 0.0], [0.0, 1.0]])
    rows = pyarrow.table({"id": ["a", "b"], "text": text, "image": [[1.0, 0.0], [0.0, 1.0]]})
    (parquet.write_table if suffix == ".parquet" else feather.write_feather)(rows, str(file))
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-40], "junk": b"junk" * 10, "nothing": b""}.get(what, whole))
    with pytest.raises(
        ValueError, match=rf"table\{suffix} holds no table of embeddings .*; expected ids, text and image vectors"
    ):
        EmbeddingTable.load(file)


def test_a_batch_is_looked_up_by_id_and_not_by_place(table):
    batch = {"ids": ["b", "c"], "texts": ["?", "?"], "images": torch.zeros(2, 3, 8, 8)}
    assert torch.equal(embeddings(table, batch)[0], table.text[1:])
    one = teacher()
    batch = {"ids": ["x"], "texts": TEXTS[:1], "images": torch.zeros(1, 3, 16, 16)}
    assert torch.equal(embeddings(one, batch)[0], one.embed_text(TEXTS[:1]))


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda t, p: t.of(["a", "z", "q"]), "2 of 3 ids have no vector.*'z'"),
        (lambda t, p: EmbeddingTable(["a", "a"], torch.eye(2), torch.eye(2)), "more than once.*'a'"),
        (lambda t, p: EmbeddingTable([1, "1"], torch.eye(2), torch.eye(2)), "more than once.*'1'"),
        (lambda t, p: EmbeddingTable(["a", "b"], torch.eye(2), torch.eye(3)), r"\(3, 3\)"),
        (lambda t, p: EmbeddingTable(["a"], torch.tensor([[float("nan")]]), torch.ones(1, 1)), "NaN"),
        (lambda t, p: EmbeddingTable(["a"], torch.zeros(1, 2), torch.ones(1, 2)), "zeros"),
        (lambda t, p: EmbeddingTable.load(p / "none.safetensors"), "no table of embeddings"),
        (lambda t, p: load_teacher(p / "none"), "no teacher could be read"),
        (lambda t, p: load_teacher("someone/some-clip"), "download=True"),
        (lambda t, p: CLIPTeacher(torch.nn.Linear(1, 1), None), "neither CLIP-like"),
        (lambda t, p: teacher().embed_text(["a", 3]), "int"),
        (lambda t, p: teacher().embed_image(torch.zeros(1, 1, 8, 8)), "RGB|3"),
    ],
)
def test_refusals(call, said, table, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=said):
        call(table, tmp_path)


def test_a_table_without_ids_and_a_truncated_one_are_refused(table, tmp_path):
    save_file({"text": table.text, "image": table.image}, tmp_path / "bare.safetensors")
    table.save(tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for name in ("bare", "cut"):
        with pytest.raises(ValueError, match="no table of embeddings"):
            EmbeddingTable.load(tmp_path / f"{name}.safetensors")


def test_a_folder_of_pickled_weights_is_refused(tmp_path):
    one = teacher()
    one.save_pretrained(tmp_path)
    torch.save(one.model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no teacher could be read"):
        CLIPTeacher.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_mean"][0] == pytest.approx(0.4815)


def test_ids_may_be_numbers():
    assert EmbeddingTable([7, 8], torch.eye(2), torch.eye(2)).of([8])[0].tolist() == [[0, 1]]


def test_each_pair_adds_its_own_hits():
    text, image = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.9, 0.1, 0]])
    assert retrieved(text, image).tolist() == [1.0, 1.0, 0.0] and retrieval(text, image) == pytest.approx(2 / 3)


@pytest.mark.slow
def test_the_shipped_teacher_finds_partners_among_512():
    """Scenes that it has not seen; equal facts count as right."""
    items = Shapes("test", n=512, seed=11).__getitems__(range(512))
    shipped = load_teacher("tiny-teacher", device="cpu")
    with torch.no_grad():
        text = shipped.embed_text([item["texts"] for item in items])
        image = shipped.embed_image(torch.stack([item["images"] for item in items]))
    assert retrieval(text, image, facts_of(items).tolist()) >= 0.95


@pytest.mark.parametrize("kind", ["Dinov2", "ViT"])
def test_a_vision_transformer_alone_embeds_images_by_its_class_token_and_refuses_texts(kind, tmp_path):
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=28, patch_size=7)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 14, "width": 14}}))
    if kind == "ViT":  # its places are of one size
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    seen, images = load_teacher(tmp_path, device="cpu"), torch.rand(3, 3, 32, 32)
    assert seen.image_size == ((14, 14) if kind == "Dinov2" else (28, 28)) and seen.dim == 16
    with torch.no_grad():
        by_hand = model(seen.pixels(images)).last_hidden_state[:, 0]
    torch.testing.assert_close(seen.embed_image(images), torch.nn.functional.normalize(by_hand, dim=1))
    with pytest.raises(ValueError, match=f"{kind}Model embeds images alone"):
        seen.embed_text(["a red circle"])
    seen.save_pretrained(tmp_path / "again")
    assert torch.equal(load_teacher(tmp_path / "again", device="cpu").embed_image(images), seen.embed_image(images))
