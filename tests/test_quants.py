"""Bytes of quantized weights, against files that exist and tensors counted by hand."""

from __future__ import annotations

import pytest

from fitcheck import catalog, quants
from fitcheck.errors import FitCheckError
from fitcheck.model import Model
from fitcheck.plan import QUANTS
from fitcheck.weights import has_closed_form


@pytest.fixture(scope="module")
def llama() -> Model:
    return catalog.find_model("meta-llama/Llama-3.1-8B-Instruct")


# Sizes of the files in huggingface.co/bartowski/Meta-Llama-3.1-8B-Instruct-GGUF: recalled, not
# downloaded. 7 841 184 B of each are header, vocabulary and padding (q4_0: 7 837 088).
GGUF_FILES = {
    "q8_0": 8_540_775_840,
    "q6_k": 6_596_011_424,
    "q5_k_m": 5_732_992_416,
    "q5_k_s": 5_599_298_976,
    "q4_k_m": 4_920_739_232,
    "q4_k_s": 4_692_673_952,
    "q4_0": 4_661_212_576,
    "iq4_xs": 4_447_667_616,
    "q3_k_l": 4_321_961_376,
    "q3_k_m": 4_018_922_912,
    "q3_k_s": 3_664_504_224,
    "q2_k": 3_179_136_416,
}


@pytest.mark.parametrize("quant", GGUF_FILES)
def test_gguf_files_of_llama(llama: Model, quant: str) -> None:
    metadata = 7_837_088 if quant == "q4_0" else 7_841_184
    assert quants.weight_bytes(llama, quant) == GGUF_FILES[quant] - metadata


@pytest.mark.parametrize(("quant", "width"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_plain_types(llama: Model, quant: str, width: int) -> None:
    assert quants.weight_bytes(llama, quant) == width * 8_030_261_248


LINEAR = 6_979_321_856  # of the 8 030 261 248: what is in the linear layers of the blocks


@pytest.mark.parametrize(
    ("quant", "per_weight"),
    [
        ("nf4", 0.5 + 1 / 64 + 4 / (64 * 256)),  # arXiv 2305.14314, section 3
        ("fp8", 1 + 4 / (128 * 128)),
        ("awq", 0.5 + 2.5 / 128),
        ("gptq", 0.5 + 2.5 / 128),
        ("mxfp4", 0.5 + 1 / 32),
    ],
)
def test_quantized_linears_beside_16_bit_tables(
    llama: Model, quant: str, per_weight: float
) -> None:
    rest = 2 * (llama.params - LINEAR)
    assert quants.weight_bytes(llama, quant) == rest + LINEAR * per_weight


def test_int8_keeps_a_scale_a_row(llama: Model) -> None:
    rows = 32 * (2 * 4096 + 2 * 1024 + 2 * 14_336 + 4096)
    rest = 2 * (llama.params - LINEAR)
    assert quants.weight_bytes(llama, "int8") == rest + LINEAR + 4 * rows


def test_rows_that_are_no_multiple_of_256_fall_back() -> None:
    """Qwen2.5-0.5B: 896 wide, so llama.cpp cannot use q4_k there and takes q5_0, 22 B per 32."""
    qwen = catalog.find_model("Qwen/Qwen2.5-0.5B")
    assert qwen.hidden_size == 896
    assert quants._size(896 * 10, 896, "q4_k") == 896 * 10 // 32 * 22
    assert quants._size(896 * 10, 896, "q6_k") == 896 * 10 // 32 * 34
    assert quants._size(100, 10, "q8_0") == 200  # not even a multiple of 32: 16 bit


def test_every_quant_of_every_closed_form_is_smaller_than_fp32() -> None:
    for model in catalog.models():
        if has_closed_form(model):
            sizes = {quant: quants.weight_bytes(model, quant) for quant in QUANTS}
            assert all(0 < size <= sizes["fp32"] for size in sizes.values()), model.id
            assert sizes["q4_k_s"] <= sizes["q4_k_m"] <= sizes["q5_k_m"] <= sizes["q8_0"], model.id
            assert sizes["q3_k_s"] <= sizes["q3_k_m"] <= sizes["q3_k_l"], model.id
            assert sizes["nf4"] < sizes["int8"] < sizes["bf16"] or model.moe, model.id


def test_tensors_that_are_not_known_are_an_error() -> None:
    model = next(m for m in catalog.models() if m.params and not has_closed_form(m))
    assert quants.weight_bytes(model, "bf16") == 2 * model.params
    with pytest.raises(FitCheckError, match="its single tensors are not known"):
        quants.weight_bytes(model, "q4_k_m")


# Sizes of files as a public list of these repositories gives them (bartowski, unsloth, Qwen):
# published figures, not fetched here. A file is its tensors and a header that is the same for all.
PUBLISHED = {
    "meta-llama/Llama-3.1-8B": {
        "iq4_nl": 4_677_993_888,
        "iq4_xs": 4_447_667_616,
        "q2_k": 3_179_136_416,
        "q3_k_l": 4_321_961_376,
        "q3_k_m": 4_018_922_912,
        "q3_k_s": 3_664_504_224,
        "q4_k_m": 4_920_739_232,
        "q4_k_s": 4_692_673_952,
        "q5_k_m": 5_732_992_416,
        "q5_k_s": 5_599_298_976,
        "q6_k": 6_596_011_424,
        "q8_0": 8_540_775_840,
    },
    "Qwen/Qwen3-4B": {
        "q4_k_m": 2_497_280_256,
        "q5_0": 2_823_710_976,
        "q5_k_m": 2_889_513_184,
        "q6_k": 3_306_260_704,
        "q8_0": 4_280_404_704,
    },
    "Qwen/Qwen3-8B": {
        "q4_k_m": 5_027_783_488,
        "q5_0": 5_720_761_152,
        "q5_k_m": 5_851_112_224,
        "q6_k": 6_725_899_040,
        "q8_0": 8_709_518_112,
    },
    "meta-llama/Llama-3.2-3B": {
        "iq4_nl": 1_917_190_592,
        "iq4_xs": 1_829_110_208,
        "q2_k": 1_363_935_680,
        "q3_k_m": 1_687_159_232,
        "q3_k_s": 1_542_848_960,
        "q4_1": 2_093_351_360,
        "q4_k_m": 2_019_377_600,
        "q4_k_s": 1_928_200_640,
        "q5_k_m": 2_322_153_920,
        "q5_k_s": 2_269_512_128,
        "q6_k": 2_643_853_760,
        "q8_0": 3_421_898_816,
    },
    "microsoft/Phi-3.5-mini-instruct": {
        "iq4_xs": 2_059_853_088,
        "q2_k": 1_416_204_576,
        "q3_k_l": 2_087_597_856,
        "q3_k_m": 1_955_477_280,
        "q3_k_s": 1_681_798_944,
        "q4_k_m": 2_393_232_672,
        "q4_k_s": 2_188_760_352,
        "q5_k_m": 2_815_276_320,
        "q5_k_s": 2_641_474_848,
        "q6_k": 3_135_853_344,
        "q8_0": 4_061_222_688,
    },
    "meta-llama/Llama-3.2-1B": {
        "iq4_xs": 743_141_504,
        "q3_k_l": 732_524_672,
        "q4_k_m": 807_694_464,
        "q4_k_s": 775_647_360,
        "q5_k_m": 911_503_488,
        "q5_k_s": 892_563_584,
        "q6_k": 1_021_800_576,
        "q8_0": 1_321_083_008,
    },
    "Qwen/Qwen2.5-Coder-32B": {
        "q2_k": 12_313_098_432,
        "q3_k_m": 15_935_047_872,
        "q4_0": 18_640_230_592,
        "q4_k_m": 19_851_335_872,
        "q5_0": 22_638_254_272,
        "q5_k_m": 23_262_156_992,
        "q6_k": 26_886_154_432,
        "q8_0": 34_820_884_672,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_our_tensors_and_one_header(name: str) -> None:
    model = catalog.find_model(name)
    headers = [size - quants.weight_bytes(model, q) for q, size in PUBLISHED[name].items()]
    assert max(headers) - min(headers) < 1024  # of 0.7 to 35 GB
    assert 0 < min(headers) < 8_000_000  # the vocabulary


def test_q4_0_with_an_importance_matrix_has_a_few_better_layers() -> None:
    """unsloth's and bartowski's: `down` of the first eighth of the layers in q4_1."""
    model = catalog.find_model("meta-llama/Llama-3.2-3B")
    plain = quants.weight_bytes(model, "q4_0") + 7_838_144  # the header of its other files
    better = model.num_layers // 8 * model.hidden_size * (model.intermediate_size or 0) // 32 * 2
    assert plain + better == 1_921_909_184
