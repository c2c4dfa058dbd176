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
