"""Folders that are not what they should be: each is refused by name, no code of theirs runs, nothing is written."""

import json
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import umm_kit as uk
from umm_kit.models import CHECKPOINTS

WEIGHTS = "model.safetensors"


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (open, (str(self.folder / "pwned"), "w"))


def weights(change):
    """A damage to the tensors."""

    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors, next(iter(tensors)))
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def header(change):
    """A damage to the header of the weights, the data as they were."""

    def damage(folder):
        content = (folder / WEIGHTS).read_bytes()
        n = struct.unpack("<Q", content[:8])[0]
        about = json.loads(content[8 : 8 + n])
        change(about, next(name for name in about if name != "__metadata__"))
        said = json.dumps(about).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(said)) + said + content[8 + n :])

    return damage


def settings(**values):
    """Other values in config.json."""

    def damage(folder):
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | values))

    return damage


def truncated(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def header_of_exabytes(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + content[8:])


def pickled(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps(Evil(folder)))


def old_format(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"a": Evil(folder)}, folder / "pytorch_model.bin")


def shards_elsewhere(folder):
    (folder / WEIGHTS).unlink()
    places = {"metadata": {}, "weight_map": {"a": "../../../../etc/hostname"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


def text_in(name, text):
    return lambda folder: (folder / name).write_text(text)


DAMAGES = {
    "truncated weights": (truncated, "incomplete|fully covered"),
    "a header of exabytes": (header_of_exabytes, "header too large"),
    "offsets outside the file": (header(lambda h, k: h[k].update(data_offsets=[0, 10**15])), "offset"),
    "a shape of exabytes": (header(lambda h, k: h[k].update(shape=[2**40, 2**20])), "shape"),
    "an unknown dtype": (header(lambda h, k: h[k].update(dtype="PICKLE")), "PICKLE|dtype|variant"),
    "another shape": (weights(lambda t, k: t.update({k: torch.zeros(3, 3)})), "have other shapes of blocks.0.attention"),
    "a weight missing": (weights(lambda t, k: t.pop(k)), "lack blocks.0.attention"),
    "a weight too many": (weights(lambda t, k: t.update(backdoor=torch.zeros(1))), "know no backdoor"),
    "NaN": (weights(lambda t, k: t[k].fill_(float("nan"))), "hold NaN or infinity: blocks.0.attention"),
    "a pickle in their place": (pickled, "header"),
    "the old format": (old_format, "no file named model.safetensors"),
    "shards elsewhere": (shards_elsewhere, "no umm_masked model could be read"),
    "half a configuration": (text_in("config.json", '{"model_type": "umm_masked"'), "no model's configuration"),
    "a list as configuration": (text_in("config.json", "[1]"), "no model's configuration"),
    "no model type": (text_in("config.json", "{}"), "no model's configuration"),
    "a width in words": (settings(hidden_size="wide"), "hidden_size is 'wide'; expected a whole number"),
    "a width of gigabytes": (settings(hidden_size=4 * 10**8), "hidden_size is 400000000"),
    "ten million layers": (settings(num_layers=10**7), "num_layers is 10000000"),
    "a code book of exabytes": (
        settings(image_tokenizer={"levels": [2**20, 2**20, 2**20]}),
        "codebook_size is 1152921504",
    ),
    "half a tokenizer": (text_in("tokenizer.json", "{"), "no umm_masked model could be read"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(tmp_path, damage):
    folder, (do, said) = tmp_path / "model", DAMAGES[damage]
    shutil.copytree(CHECKPOINTS / "tiny-tight-0", folder)
    uk.load(folder, device="cpu")
    do(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"(?i){said}") as error:
        uk.load(folder, device="cpu")
    assert str(folder) in str(error.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINTS / "tiny-tight-0", folder)
    settings(auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config", "AutoTokenizer": "evil.Words"})(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'pwned')!r}, 'w')")
    uk.load(folder, device="cpu")
    assert not (folder / "pwned").exists()
