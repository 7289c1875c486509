"""The compiled CPU operations against torch's: the same results, and a row's bits whatever stands beside it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from loadtest.gpu.random_models import random_model
from tests.unit.worker.models.paged_driver import Driver, Row, relative_error
from tests.unit.worker.native.kinds import compiles, library_of
from worker.forward import DecodeRows, KVCache, StepTokens
from worker.models.attention import AttentionPlan
from worker.models.dense import Dense
from worker.models.linear import PackedLinear
from worker.models.moondream import Moondream
from worker.native import build
from worker.native.library import use_threads
from worker.native.operations import Operations, operations
from worker.native.products import PLAIN, Products, products

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Native operations are for one compute thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def native() -> Operations:
    found = operations(CPU)
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture
def multiplying() -> Products:
    found = products(CPU)
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_gate(native: Operations, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 96).to(dtype), torch.randn(96).to(dtype)
    want = F.rms_norm(x.float(), (96,), weight.float(), 1e-5)
    assert relative_error(native.rms_norm(x, weight, 1e-5), want) < TOLERANCE[dtype]
    both = (torch.randn(5, 192) * 4).to(dtype)
    both[0, :4] = torch.tensor([0.0, 200.0, -200.0, -80.0])
    want = F.silu(both[:, :96].float()) * both[:, 96:].float()
    assert relative_error(native.silu_gate(both), want) < TOLERANCE[dtype]
    x[2, 3] = torch.nan
    assert native.rms_norm(x, weight, 1e-5)[2].isnan().all(), "a faulty row must stay visible"
    assert native.rms_norm(x, weight, 1e-5)[:2].isfinite().all()
    bias = torch.randn(96).to(dtype)
    want = F.layer_norm(x[:2].float(), (96,), weight.float(), bias.float(), 1e-5)
    assert relative_error(native.layer_norm(x, weight, bias, 1e-5)[:2], want) < TOLERANCE[dtype]
    assert native.layer_norm(x, weight, bias, 1e-5)[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 16), (64, 96), (192, 576), (1024, 256)])
def test_products(multiplying: Products, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    if not multiplying.can_multiply(dtype, inputs, outputs):
        pytest.skip("this processor has no native product of this dtype")
    torch.manual_seed(1)
    weight, bias = torch.randn(outputs, inputs).to(dtype) / 8, torch.randn(outputs).to(dtype)
    linear = PackedLinear(weight, bias)
    x, residual = torch.randn(70, inputs).to(dtype), torch.randn(70, outputs).to(dtype)
    plain = F.linear(x.float(), weight.float(), bias.float())
    found = linear(x), linear.gelu(x), linear.add(x, residual)
    wanted = plain, F.gelu(plain, approximate="tanh"), plain + residual.float()
    for got, want in zip(found, wanted, strict=True):
        assert relative_error(got, want) < TOLERANCE[dtype]
    for count in (1, 2, 5, 6, 7, 15, 16, 17, 31, 32, 33, 64, 65):
        assert torch.equal(linear(x[:count]), found[0][:count]), count
        assert torch.equal(linear.gelu(x[-count:]), found[1][-count:]), count
        assert torch.equal(linear.add(x[:count], residual[:count]), found[2][:count]), count
    if outputs % 32 == 0:
        gated = PackedLinear(weight, bias, gated=True)
        gate, up = plain.chunk(2, dim=-1)
        got = gated.silu_gate(x)
        assert relative_error(got, F.silu(gate) * up) < TOLERANCE[dtype]
        assert torch.equal(gated.silu_gate(x[:33]), got[:33])
    x[3, 1] = torch.nan
    assert linear.gelu(x)[3].isnan().all()
    assert torch.equal(linear(x)[4:], found[0][4:])


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary", "page_tokens"),
    [(3, 3, 64, 32, 16), (6, 2, 64, 64, 16), (14, 2, 32, 32, 5), (5, 1, 16, 16, 40), (2, 1, 80, 32, 16)],
)
@pytest.mark.parametrize("normed", [False, True])
def test_decode_equals_torch(
    native: Operations,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary: int,
    page_tokens: int,
    normed: bool,
) -> None:
    torch.manual_seed(2)
    lengths = torch.tensor([1, 37, 16, 50, 17], dtype=torch.int32)
    rows, pages = len(lengths), -(-50 // page_tokens)
    tables = (1 + torch.randperm(rows * pages)).to(torch.int32).view(rows, pages)
    shape = (rows * pages + 1, page_tokens, kv_heads, dim)
    kept = torch.randn(shape).to(kv_dtype), torch.randn(shape).to(kv_dtype)
    last = (lengths - 1).long()
    write_index = tables.long()[torch.arange(rows), last // page_tokens] * page_tokens + last % page_tokens
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim).to(dtype)
    qkv[3, -1] = torch.inf  # in v: it must reach neither the pages nor another row
    rotation = torch.polar(torch.ones(rows, 1, rotary // 2), torch.randn(rows, 1, rotary // 2))
    weight = torch.rand(heads + kv_heads, dim) + 0.5 if normed else None

    def split(product: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = product.float().nan_to_num(0.0, 0.0, 0.0).view(-1, heads + 2 * kv_heads, dim)
        both, value = parts.split((heads + kv_heads, kv_heads), 1)
        if weight is not None:
            both = F.rms_norm(both, (dim,), None, 1e-6) * weight
        both = both.clone()
        pairs = (
            torch.view_as_complex(both[..., :rotary].reshape(-1, heads + kv_heads, rotary // 2, 2)) * turns
        )
        both[..., :rotary] = torch.view_as_real(pairs).flatten(2)
        return both[:, :heads], both[:, heads:], value

    def run(used: Operations | None, chosen: slice) -> tuple[torch.Tensor, KVCache]:
        cache = KVCache([kept[0].clone()], [kept[1].clone()], page_tokens)
        own = lengths[chosen]
        decode = DecodeRows(len(own), tables[chosen], own, int(own.max()))
        tokens = StepTokens(last[chosen], write_index[chosen], decode)
        plan = AttentionPlan(tokens, cache, None, used, rotation[chosen], dtype)
        eps = 1e-6 if normed else 0.0
        return plan.attend_product(0, qkv[chosen], heads, split, qk_weight=weight, eps=eps), cache

    everything = slice(0, rows)
    (got, got_cache), (want, want_cache) = run(native, everything), run(None, everything)
    assert got.dtype == dtype and got.shape == (rows, heads * dim)
    assert relative_error(got, want.float()) < 4 * TOLERANCE[max(dtype, kv_dtype, key=TOLERANCE.__getitem__)]
    for ours, theirs in zip(
        got_cache.keys + got_cache.values, want_cache.keys + want_cache.values, strict=True
    ):
        assert ours.isfinite().all()
        assert relative_error(ours, theirs.float()) < TOLERANCE[kv_dtype]
    for row in range(rows):
        alone, _ = run(native, slice(row, row + 1))
        assert torch.equal(alone[0], got[row]), row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3", "tiny-moondream"])
def test_layers_in_one_call_equal_layers_one_by_one(
    multiplying: Products, shape: str, dtype: torch.dtype
) -> None:
    model = random_model(shape, CPU, dtype).model
    assert isinstance(model, Dense | Moondream)
    stack = model._stack
    if stack is None:
        pytest.skip("this processor has no native product of this dtype")
    ids = torch.arange(5, 45)

    @torch.inference_mode()
    def run(whole: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        model._stack = stack if whole else None
        driver = Driver(model, kv_dtype=model.kv_dtype)
        rows = [Row() for _ in range(3)]
        for number, row in enumerate(rows):  # 1, 14 and 27 tokens of context
            driver.step([], [(row, model.embed(ids[: 1 + 13 * number]), 0)])
        found = [
            driver.step([(row, model.embed(ids[at : at + 1])) for row in rows], padding=step % 2)
            for step, at in enumerate((3, 9, 30))
        ]
        found.append(driver.step([(rows[0], model.embed(ids[:1]))], [(Row(), model.embed(ids), 0)]))
        return found, driver.cache.keys + driver.cache.values

    (whole, whole_cache), (single, single_cache) = run(True), run(False)
    use_threads(3)
    shared, shared_cache = run(True)
    use_threads(1)
    for got, want, by_three in zip(
        whole + whole_cache, single + single_cache, shared + shared_cache, strict=True
    ):
        assert torch.equal(got, want) and torch.equal(got, by_three)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3", "tiny-moondream"])
def test_compiled_attention_of_chunks_equals_torch(
    native: Operations, shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(shape, CPU, dtype).model
    ids = torch.arange(5, 105)
    prefix = 30 if shape == "tiny-moondream" else 0

    @torch.inference_mode()
    def run() -> list[torch.Tensor]:
        driver = Driver(model, kv_dtype=model.kv_dtype)
        rows = [Row() for _ in range(4)]
        found = [
            driver.step([], [(rows[0], model.embed(ids[:37]), prefix), (rows[1], model.embed(ids[:5]), 0)])
        ]
        chunks = [(rows[1], model.embed(ids[5:24]), 0), (rows[2], model.embed(ids[9:10]), 0)]
        found.append(driver.step([(rows[0], model.embed(ids[40:41]))], chunks, padding=1))
        found.append(driver.step([], [(rows[3], model.embed(ids), prefix)]))
        return found

    compiled = run()
    monkeypatch.setattr(Operations, "can_attend", lambda *_: False)
    by_torch = run()
    for got, want in zip(compiled, by_torch, strict=True):
        assert relative_error(got, want.float()) < 5 * TOLERANCE[dtype]


@pytest.mark.parametrize("count", [1, 7, 16, 40, 100])
def test_the_largest_of_rows(native: Operations, count: int) -> None:
    torch.manual_seed(4)
    x = torch.randn(6, 2 * count)[:, :count]  # rows apart
    x[1] = -torch.inf
    x[2, count // 2 :] = x[2].max()  # equals: the first counts
    x[3, -1] = torch.inf
    x[4, count // 2] = torch.nan
    values, places = native.largest(x)
    want = x.max(dim=-1)
    assert torch.equal(values[:4], want.values[:4]) and values[4].isnan() and values[5] == want.values[5]
    assert all(x[row, place] == values[row] for row, place in enumerate(places.tolist()) if row != 4)
    assert places[2] == x[2].tolist().index(float(x[2].max()))
    assert places[1] == 0


def test_what_cannot_be_native_is_not(native: Operations) -> None:
    assert not native.can_attend(torch.float16, torch.float16, 64, 64)
    assert not native.can_attend(torch.float32, torch.float32, 24, 16)
    assert not native.can_attend(torch.float32, torch.float32, 64, 24)
    assert operations(torch.device("meta")) is None and products(torch.device("meta")) is None


def test_no_compiler_or_a_failing_one_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("this is no C++")
    kept = tmp_path / "kept"
    assert build.compiled(source, kept) is None
    assert not kept.exists() or not list(kept.iterdir())
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    assert build.compiled(source, kept) is None


def test_arm_is_tried_by_its_processor_then_by_what_linux_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = "processor\t: 0\nFeatures\t: fp asimd evtstrm atomics fphp asimdhp asimdrdm asimddp crc32\nCPU part\t: 0xd0c\n"
    monkeypatch.setattr(build, "_processor", lambda: listed)
    monkeypatch.setattr(build, "KINDS", build.ARM_KINDS)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    (dotted, _), (plain, _) = build.ARM_KINDS["armv82"], build.ARM_KINDS["armv8"]
    assert build.flags_here() == [("-mcpu=native",), dotted, ()]
    listed = "Features : fp asimd crc32"
    assert build.flags_here() == [("-mcpu=native",), plain, ()]
    listed = "arm64 arm Apple M2"
    assert build.flags_here() == [("-mcpu=native",), ()]
    tried = []

    def refuses(compiler: str, source: Path, library: Path, flags: tuple[str, ...]) -> None:
        tried.append(flags)
        if flags:
            raise RuntimeError("unknown target CPU 'native'")

    monkeypatch.setattr(build, "_compile", refuses)
    build._compile_here("c++", build.SOURCE, tmp_path / "library.so")
    assert tried == [("-mcpu=native",), ()]


def test_a_folder_others_may_write_to_is_refused(tmp_path: Path) -> None:
    if operations(CPU) is None:
        pytest.skip("no C++ compiler")
    tmp_path.chmod(0o777)
    source = tmp_path / "fine.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    assert build.compiled(source, tmp_path) is None
    tmp_path.chmod(0o700)
    library = build.compiled(source, tmp_path)
    assert library is not None and library.one() == 1


TILES = """extern "C" int has_tiles() {
#ifdef __AMX_TILE__
  return 1;
#else
  return 0;
#endif
}
"""


def test_an_image_brings_libraries_for_other_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if build.find_compiler() is None or platform.machine() != "x86_64":
        pytest.skip("no C++ compiler, or another kind of machine")
    mine = [kind for kind, (_, needed) in build.KINDS.items() if needed <= build.processor_flags()]
    if not mine:
        pytest.skip("a processor without AVX2")
    source, image = tmp_path / "source" / "exports.cpp", tmp_path / "image"
    source.parent.mkdir()
    image.mkdir()
    source.write_text(TILES)
    monkeypatch.setattr(build, "SOURCE", source)
    assert build.prebuilt(source, image) is None
    with pytest.raises(RuntimeError, match="avx3: not among this machine's kinds, amx"):
        build.build_kinds(image, ("avx3",))
    wanted = tuple(dict.fromkeys(("amx", mine[0])))
    made = build.build_kinds(image, wanted)
    assert len(made) == len(set(made)) == len(wanted)
    monkeypatch.setattr(build, "COMPILERS", ())
    found = build.prebuilt(source, image)
    assert found is not None
    assert found.has_tiles() == (mine[0] == "amx"), "the best that this processor runs"
    monkeypatch.setattr(build, "processor_flags", frozenset)
    assert build.prebuilt(source, image) is None
    made[-1].rename(image / "exports-of-another-source.so")
    monkeypatch.undo()
    assert build.prebuilt(source, image) is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_only_other_processors_run_compiles() -> None:
    """Matrix registers, which few machines that run these tests have."""
    if build.find_compiler() is None or platform.machine() != "x86_64":
        pytest.skip("no C++ compiler, or another kind of machine")
    assert compiles("amx")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_machines_with_less_compute_the_same(native: Operations) -> None:
    """The same source for narrower vectors than this processor's: AVX2, and none but x86-64's own, where torch multiplies."""
    if platform.machine() != "x86_64":
        pytest.skip("another kind of machine")
    kinds = ["sse", *(["avx2"] if build.KINDS["avx2"][1] <= build.processor_flags() else [])]
    for kind in kinds:
        found = library_of(kind)
        assert found is not None
        torch.manual_seed(6)
        x, weight = torch.randn(9, 64), torch.randn(64)
        for narrow, wide in (
            (Operations(found).rms_norm(x, weight, 1e-5), native.rms_norm(x, weight, 1e-5)),
            (Operations(found).silu_gate(x), native.silu_gate(x)),
        ):
            assert relative_error(narrow, wide) < TOLERANCE[torch.float32]
        assert torch.equal(Operations(found).largest(x)[1], native.largest(x)[1])
        narrow_products = Products(found)
        assert narrow_products.multiplies(torch.float32) == (kind == "avx2")
        if kind == "avx2":
            w = torch.randn(100, 64).bfloat16().float()
            got = narrow_products.multiply(x, narrow_products.pack(w), None, PLAIN)
            assert relative_error(got, F.linear(x, w)) < TOLERANCE[torch.float32]
