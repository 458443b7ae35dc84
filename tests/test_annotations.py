"""The shapes in signatures are true: every public function that takes or gives arrays is called under a type checker.

Nothing is checked at run time outside this file. ``CALLS`` holds good arguments for each function; every call verifies the
annotations of its arguments and of its result, and every array among the arguments is then made wrong, one at a time.
"""

import dataclasses
import functools
import inspect
from typing import Any, get_args, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from jaxtyping import AbstractArray, Bool, Float, Float32, Float64, Int, TypeCheckError, jaxtyped
from torch import Tensor

from umm_kit import statistics
from umm_kit.data.language import vocabulary_corpus
from umm_kit.data.shapes import Shapes
from umm_kit.diagnostics import collapse, geometry, maps, mutual_information, similarity, spectrum
from umm_kit.losses import alignment, preference
from umm_kit.models import base, tokenizers
from umm_kit.models.base import FlowOutput, collate
from umm_kit.models.masked import MaskedUMM

MODULES = (geometry, spectrum, similarity, mutual_information, maps, base, tokenizers, statistics)
MODULES += (alignment, preference, collapse)
CONF = BeartypeConf(is_pep484_tower=True)  # 1 is a float

# Few rows of noise: each diagnosis has something to warn about, and none of it matters here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


POOLED, OTHER, NARROW = randn(20, 4), randn(20, 4) + randn(20, 1), randn(20, 3)
TOKENS = randn(20, 6, 4)  # on a grid of 2 x 3
ARRAY = POOLED.double().numpy()
ARRAY_T = torch.from_numpy(ARRAY)
MASK = torch.arange(6).expand(20, 6) % 3 == 0
IMAGES, CODES, LEVELS = torch.rand(2, 3, 8, 8), torch.arange(8).view(2, 4), torch.tensor([4, 3])
BIT, SCORE = np.arange(20) % 3 == 0, ARRAY[:, 0]

SPECTRUM = spectrum.token_spectrum(TOKENS, (2, 3))
TOKENIZER = tokenizers.ImageTokenizer(
    tokenizers.ImageTokenizerConfig(image_size=8, patch_size=4, channels=8, depth=1, levels=(4, 3))
).eval()

ALIGNED = alignment.latent_alignment((POOLED, OTHER), (NARROW, NARROW), (POOLED, OTHER), "vicreg")

#: function -> calls that are right: one for each kind of array and number of axes that it promises to take
CALLS: dict[Any, list[tuple]] = {
    geometry.effective_rank: [(POOLED,), (TOKENS,), (ARRAY,)],
    geometry.effective_rank_increment: [(POOLED, ARRAY), (TOKENS, POOLED), (POOLED, NARROW, "columns")],
    geometry.reconstruction_residual: [(POOLED, OTHER), (TOKENS, ARRAY), (NARROW, POOLED, 0.9, 2, "sample")],
    geometry.residual_curve: [(TOKENS, POOLED), (ARRAY, OTHER), (POOLED, NARROW, "sample"), (NARROW, POOLED, "sample")],
    geometry.random_subspace_residual: [(POOLED, 2, 3), (TOKENS, 2, 4)],
    geometry.shuffled_ids_residual: [(POOLED, ARRAY, 2, 3), (TOKENS, TOKENS, 2, 4), (POOLED, NARROW, 2, 3)],
    geometry.principal_angles: [(POOLED, TOKENS), (ARRAY, OTHER[:9])],
    spectrum.token_spectrum: [(TOKENS, (2, 3)), (TOKENS[0], (2, 3)), (TOKENS.numpy(), (2, 3))],
    spectrum.high_frequency_energy_ratio: [(TOKENS, (2, 3)), (TOKENS[0].numpy(), (2, 3))],
    spectrum.radial_spectrum: [(TOKENS, (2, 3)), (TOKENS[0], (2, 3), 5)],
    spectrum.input_matched: [(TOKENS, MASK, (2, 3)), (TOKENS.numpy(), MASK.numpy(), (2, 3)), (TOKENS[0], MASK[0], (2, 3))],
    spectrum.filling: [(MASK, (2, 3)), (MASK, (2, 3), "masked")],
    spectrum.Spectrum.above: [(SPECTRUM, 0.5)],
    spectrum.Spectrum.radial: [(SPECTRUM, 4)],
    similarity.cka: [(POOLED, NARROW), (ARRAY, OTHER)],
    similarity.cka_matrix: [([POOLED, NARROW],), ([POOLED, NARROW], [OTHER]), (randn(3, 20, 4), [ARRAY])],
    similarity.cka_matrix_minibatch: [([([POOLED], [NARROW]), ([POOLED[:9]], [NARROW[:9]])],), ([(randn(3, 20, 4), None)],)],
    similarity.procrustes_similarity: [(POOLED, NARROW), (ARRAY, OTHER)],
    similarity.procrustes_distance: [(POOLED, NARROW), (ARRAY, OTHER)],
    mutual_information.mutual_information: [(POOLED, NARROW, "gaussian"), (ARRAY[:, 0], POOLED[:, 1], "ksg", 2)],
    maps.latent_map: [(POOLED,), (ARRAY,)],
    maps.paired_map: [(POOLED, OTHER, range(20)), (ARRAY, ARRAY[::-1], range(20))],
    maps.nearness: [(POOLED, [0, 1] * 10), (ARRAY, range(20), OTHER[:9], range(9))],
    base.check_images: [(IMAGES,), (IMAGES, (8, 8))],
    base.check_questions: [(IMAGES, None, 8), (IMAGES, ["what", "who"], 8)],
    base.draw_mask: [(5, (2, 3)), (1, (4, 4), 1), (3, (4, 2), (0.2, 0.6), "contiguous")],
    base.choose_mask: [(MASK, 20, (2, 3), 0.5, "dispersed", None), (None, 3, (4, 2), 0.5, "dispersed", None)],
    base.elbo_masks: [(3, 5, 4), (1, 4)],
    base.token_losses: [(randn(2, 5, 7), torch.randint(7, (2, 5)))],
    tokenizers.ChannelNorm.forward: [(tokenizers.ChannelNorm(3), IMAGES)],
    tokenizers.ResidualBlock.forward: [(tokenizers.ResidualBlock(8), randn(2, 8, 3, 4))],
    tokenizers.reconstruction_loss: [(IMAGES, IMAGES)],
    tokenizers.fsq: [(randn(3, 2), LEVELS), (randn(5, 4, 3, 2), LEVELS)],
    tokenizers.code_digits: [(CODES, (4, 3)), (CODES[0], [4, 3, 2])],
    tokenizers.ImageTokenizer.encode: [(TOKENIZER, IMAGES)],
    tokenizers.ImageTokenizer.quantized: [(TOKENIZER, CODES)],
    tokenizers.ImageTokenizer.decode: [(TOKENIZER, CODES)],
    tokenizers.ImageTokenizer.reconstruct: [(TOKENIZER, IMAGES)],
    tokenizers.ImageTokenizer.forward: [(TOKENIZER, IMAGES)],
    tokenizers.codebook_use: [(CODES, 8), (CODES[0], 8)],
    alignment.vicreg: [(POOLED,), (NARROW, 0.5)],
    alignment.latent_alignment: [((POOLED, OTHER),), ((POOLED, OTHER), (NARROW, NARROW), (ARRAY_T, ARRAY_T), "vicreg")],
    preference.released_preference: [(POOLED,)],
    preference.best_and_worst: [(POOLED,), (NARROW, 0.5)],
    preference.dpo: [tuple(POOLED.T)],
    collapse.collapse: [(POOLED, OTHER), (ARRAY, POOLED)],
    collapse.CollapseMonitor.update: [(collapse.CollapseMonitor(), POOLED, OTHER)],
    statistics.bootstrap: [(SCORE,), (BIT,), (POOLED[:, 0],), (pd.Series(SCORE),), ([1, 0, 1],)],
    statistics.bootstrap_ratio: [(BIT, np.ones(20)), ([1, 0, 1], [1, 2, 3])],
    statistics.paired_difference: [(SCORE, BIT), (ARRAY[:, :2], ARRAY[:, 1:3] ** 2), ([1, 0, 1], [0, 0, 1])],
}
#: What has arrays, or anything, in its signature and stays without an entry, and why.
EXCEPTIONS = {
    "UnifiedModel.generation_flow": "the body is the family's",
    "UnifiedModel.understand": "the body is the family's",
    "UnifiedModel.generate": "the body is the family's",
    "LatentAlignment.weighted": "its arguments are named after the parts, as many as are wanted; tested in test_alignment",
    "checksum": "of a model; no array",
    "check_loaded": "of what transformers says; no array",
    "cast": "of a model; no array",
    "DrawsCodes.generation_flow": "of a model; every family's in tests/test_contract.py",
    "evaluating": "a context of models; no array",
    "Draws.generate": "of a model; each family's is called in its own test file",
    "Decoding.word": "of a model's scores; every family says its words by it",
    "scores_of": "of a FlowOutput, whose fields it returns; every family's in tests/test_contract.py",
    "example_losses": "of a FlowOutput; compared with every family's own losses in tests/test_contract.py",
    "recording": "a context; its arrays are those of the blocks (tests/test_pretrained.py compares them with transformers)",
}
#: They take any number of leading axes.
ANY_AXES = (tokenizers.fsq, tokenizers.code_digits, tokenizers.codebook_use)


@functools.cache
def checked(function):
    return jaxtyped(function, typechecker=beartype(conf=CONF))


def with_result(function, hint):
    """The same function with another annotation of its result."""
    copy = type(function)(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copy.__annotations__ = function.__annotations__ | {"return": hint}
    return copy


def name(function):
    return function.__qualname__


def leaves(hint):
    return [leaf for inner in get_args(hint) for leaf in leaves(inner)] or [hint]


def shaped(hint):
    return any(isinstance(leaf, type) and issubclass(leaf, AbstractArray) for leaf in leaves(hint))


def bare(hint):
    return hint is Any or any(leaf in (Tensor, np.ndarray) for leaf in leaves(hint))


def public(module):
    """Public functions, and methods of public classes, that the module defines."""
    own = [v for k, v in vars(module).items() if not k.startswith("_") and getattr(v, "__module__", "") == module.__name__]
    methods = [m for c in own if inspect.isclass(c) for k, m in vars(c).items() if not k.startswith("_")]
    found = [m.fget if isinstance(m, property) else m for m in own + methods]
    return [f for f in found if inspect.isfunction(f)]


def hints(function):
    """Of arguments and result, without ``**options``, which go to where they are checked."""
    rest = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD}
    return {k: hint for k, hint in get_type_hints(function).items() if k not in rest}


def holds_arrays(value):
    return any(map(holds_arrays, value)) if isinstance(value, list | tuple) else isinstance(value, Tensor | np.ndarray)


def spoiled(value, how):
    """The value with every array in it made wrong."""
    if isinstance(value, list | tuple):
        return type(value)(spoiled(v, how) for v in value)
    return how(value) if holds_arrays(value) else value


def of_another_type(array):
    return array.to(torch.complex64) if isinstance(array, Tensor) else array.astype(complex)


def with_more_axes(array):
    return array[None, None, None]


# --- functions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", CALLS, ids=name)
def test_annotations_of_arguments_and_result_hold(function):
    assert any(map(shaped, hints(function).values())), "an entry that verifies no shape"
    for args in CALLS[function]:
        checked(function)(*args)


WRONG = [(f, of_another_type) for f in CALLS] + [(f, with_more_axes) for f in CALLS if f not in ANY_AXES]


@pytest.mark.parametrize(("function", "how"), [(f, how) for f, how in WRONG if holds_arrays(CALLS[f])], ids=name)
def test_each_array_is_refused_when_it_is_wrong(function, how):
    for args in CALLS[function]:
        for k, good in enumerate(args):
            if holds_arrays(good):
                with pytest.raises(TypeCheckError, match="checking the parameters"):
                    checked(function)(*args[:k], spoiled(good, how), *args[k + 1 :])


@pytest.mark.parametrize(
    ("function", "args", "false"),
    [
        (geometry.residual_curve, (POOLED, OTHER), Float64[np.ndarray, " d"]),
        (geometry.residual_curve, (POOLED, OTHER), Float32[np.ndarray, " d+1"]),
        (geometry.random_subspace_residual, (POOLED, 2, 3), Float64[np.ndarray, " {components}"]),
        (spectrum.filling, (MASK, (2, 3)), Float64[Tensor, "B N d N"]),
        (spectrum.input_matched, (TOKENS, MASK, (2, 3)), Float64[Tensor, "B d N"]),
        (base.draw_mask, (5, (2, 3)), Bool[Tensor, "{grid[0]*grid[1]} {n}"]),
        (base.token_losses, CALLS[base.token_losses][0], tuple[Float[Tensor, " B"], Float[Tensor, ""]]),
        (tokenizers.code_digits, (CODES, (4, 3)), Int[Tensor, "{len(levels)} *batch"]),
        (tokenizers.ImageTokenizer.encode, (TOKENIZER, IMAGES), Float[Tensor, "B N"]),
        (tokenizers.ImageTokenizer.decode, (TOKENIZER, CODES), Float[Tensor, "B H W 3"]),
    ],
)
def test_a_false_result_annotation_would_be_seen(function, args, false):
    with pytest.raises(TypeCheckError, match="return value"):
        checked(with_result(function, false))(*args)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (geometry.principal_angles, (POOLED, NARROW)),
        (spectrum.input_matched, (TOKENS, MASK[:9], (2, 3))),
        (similarity.cka, (POOLED, OTHER[:9])),
        (mutual_information.mutual_information, (POOLED, OTHER[:9], "gaussian")),
        (maps.paired_map, (POOLED, NARROW, range(20))),
        (maps.nearness, (POOLED, range(20), NARROW, range(20))),
        (base.choose_mask, (MASK, 19, (2, 3), 0.5, "dispersed", None)),
        (statistics.paired_difference, (ARRAY[:, :2], ARRAY[:9, :2])),
    ],
)
def test_axes_of_one_name_agree_and_users_get_our_words(function, args):
    """Under the checker the annotations refuse what does not match; without it the function itself does, in its own words."""
    with pytest.raises(TypeCheckError, match="checking the parameters"):
        checked(function)(*args)
    with pytest.raises(ValueError, match="expected"):
        function(*args)


# --- fields ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instances():
    """Type -> instances of it, as the library makes them."""
    torch.manual_seed(0)
    model, data = MaskedUMM.tiny(list(vocabulary_corpus())), Shapes("test", n=3)
    batch = collate([data[i] for i in range(3)])
    made = [
        model.understanding_flow(batch),
        model.generation_flow(batch),
        SPECTRUM,
        geometry.reconstruction_residual(POOLED, OTHER),
        maps.latent_map(POOLED),
        maps.paired_map(POOLED, OTHER, range(20)),
        alignment.vicreg(POOLED),
        ALIGNED,
        preference.dpo(*POOLED.T),
    ]
    return {kind: [x for x in made if type(x) is kind] for kind in dict.fromkeys(map(type, made))}


def fields_hold(instance):
    with jaxtyped("context"):
        return all(is_bearable(getattr(instance, k), hint, conf=CONF) for k, hint in get_type_hints(type(instance)).items())


def test_fields_hold_and_every_class_with_arrays_is_among_them(instances):
    classes = [
        c
        for m in MODULES
        for c in vars(m).values()
        if dataclasses.is_dataclass(c) and c.__module__ == m.__name__ and "__annotations__" in vars(c)
    ]
    with_arrays = {c for c in classes if any(shaped(hint) or bare(hint) for hint in get_type_hints(c).values())}
    assert with_arrays == set(instances)
    for kind, made in instances.items():
        assert not any(map(bare, get_type_hints(kind).values())), f"{kind.__name__} has an array field without a shape"
        assert all(map(fields_hold, made)), kind.__name__


def test_a_false_field_would_be_seen(instances):
    flow, shares = instances[FlowOutput][1], instances[spectrum.Spectrum][0]
    assert not fields_hold(dataclasses.replace(flow, per_example_loss=flow.loss))
    assert not fields_hold(dataclasses.replace(flow, mask=flow.mask[:2]))
    assert not fields_hold(dataclasses.replace(flow, labels=flow.logits))
    assert not fields_hold(dataclasses.replace(shares, share=shares.share.T))


# --- nothing is left out -----------------------------------------------------------------------------------------------


def test_every_public_function_with_arrays_has_an_entry():
    known = {f.__qualname__: hints(f) for module in MODULES for f in public(module)}
    with_arrays = {name for name, types in known.items() if any(shaped(hint) or bare(hint) for hint in types.values())}
    entries = {function.__qualname__ for function in CALLS}
    assert with_arrays - entries == set(EXCEPTIONS)
    assert entries <= with_arrays
    without = {f"{name}: {k}" for name in entries for k, hint in known[name].items() if bare(hint)}
    assert not without, f"arrays without a shape, or arguments that are anything: {without}"


def test_users_are_not_slowed_down():
    assert not [f.__qualname__ for f in CALLS if hasattr(f, "__wrapped__")], "a checker belongs in tests"
