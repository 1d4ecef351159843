// The ops' CUDA implementations: check, launch on the current stream, check the launch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "checks_cuda.h"
#include "cuda/workspace.h"
#include "layout.h"

namespace decdec {
namespace {

cuda::Activations activations(const at::Tensor& x) {
  return {x.const_data_ptr(), scalar_of(x), static_cast<int>(x.size(0)), static_cast<int>(x.size(1))};
}

// Device memory, or host memory that the device can read.
void check_readable(const char* which, const at::Tensor& got, const at::Tensor& x) {
  if (got.device() == x.device()) return;
  cudaPointerAttributes attributes{};
  const bool known = cudaPointerGetAttributes(&attributes, got.const_data_ptr()) == cudaSuccess;
  const bool pinned = known && attributes.type == cudaMemoryTypeHost;
  DECDEC_CHECK(pinned || got.numel() == 0, which, "on " + x.device().str() + " or in pinned host memory",
               got.device().str());
}

cuda::Selection by_rule(cuda::Selection::Kind kind, int64_t k_chunk, int64_t seed) {
  cuda::Selection selection{};
  selection.kind = kind;
  selection.k_chunk = static_cast<int>(k_chunk);
  selection.seed = static_cast<uint64_t>(seed);
  return selection;
}

cuda::Selection by_buckets(const at::Tensor& floors, int64_t k_chunk) {
  DECDEC_CHECK(floors.is_cpu(), "floors", "on the CPU", floors.device().str());
  check_floors(floors);
  cuda::Selection selection = by_rule(cuda::Selection::Kind::buckets, k_chunk, 0);
  std::memcpy(selection.floors, floors.const_data_ptr<float>(), sizeof selection.floors);
  return selection;
}

cuda::Selection by_list(const at::Tensor& indices, const at::Tensor& x) {
  check_on_device("indices", indices, x);
  cuda::Selection selection = by_rule(cuda::Selection::Kind::listed, 0, 0);
  selection.indices = indices.const_data_ptr<int32_t>();
  selection.count = static_cast<int>(indices.size(1));
  selection.stride = indices.size(0) == x.size(0) ? indices.size(1) : 0;
  return selection;
}

void select(const at::Tensor& x, const cuda::Selection& selection, at::Tensor& indices) {
  check_on_device("indices", indices, x);
  if (indices.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  C10_CUDA_CHECK(cuda::select(activations(x), selection, indices.mutable_data_ptr<int32_t>(),
                              c10::cuda::getCurrentCUDAStream()));
}

void select_topk(const at::Tensor& x, int64_t k_chunk, at::Tensor indices) {
  check_selection(x, k_chunk, indices);
  select(x, by_rule(cuda::Selection::Kind::topk, k_chunk, 0), indices);
}

void select_buckets(const at::Tensor& x, const at::Tensor& floors, int64_t k_chunk, at::Tensor indices) {
  check_selection(x, k_chunk, indices);
  select(x, by_buckets(floors, k_chunk), indices);
}

void select_random(const at::Tensor& x, int64_t seed, int64_t k_chunk, at::Tensor indices) {
  check_selection(x, k_chunk, indices);
  check_int("seed", seed, 0, INT64_MAX);
  select(x, by_rule(cuda::Selection::Kind::random, k_chunk, seed), indices);
}

// A residual that the kernels can fetch in units of 16 bytes.
cuda::Residual residual_of(const at::Tensor& codes, const at::Tensor& scale, int64_t bits, const at::Tensor& x) {
  check_readable("codes", codes, x);
  check_readable("scale", scale, x);
  check_16_bytes("codes", codes);
  check_16_bytes("scale", scale);
  DECDEC_CHECK(scale.size(0) * bits % 128 == 0, "out", "a multiple of " + text(128 / bits) + " on a GPU",
               scale.size(0));
  return {codes.const_data_ptr(), scale.const_data_ptr<float>(), static_cast<int>(bits)};
}

// What is checked and launched alike for listed channels and for those chosen on the way.
void launch_compensation(const at::Tensor& x, const cuda::Selection& how, const at::Tensor& codes,
                         const at::Tensor& scale, int64_t bits, at::Tensor& y) {
  check_on_device("y", y, x);
  check_int("tokens", x.size(0), 0, 65535);
  const cuda::Residual residual = residual_of(codes, scale, bits, x);
  const int out_features = static_cast<int>(scale.size(0));
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t slots = cuda::compensation_slots(activations(x), how, residual.bits, out_features);
  float* workspace = nullptr;
  if (slots > 0) C10_CUDA_CHECK(cuda::workspace_of(stream, slots, &workspace));
  C10_CUDA_CHECK(cuda::compensate(activations(x), how, residual, out_features, y.mutable_data_ptr<float>(), workspace,
                                  stream));
}

// Indices are not looked at, which would mean to wait for them: they come from a selection.
void compensate(const at::Tensor& x, const at::Tensor& indices, const at::Tensor& codes, const at::Tensor& scale,
                int64_t bits, at::Tensor y) {
  check_residual(x, codes, scale, bits, y);
  check_indices(x, indices);
  if (indices.numel() == 0 || y.numel() == 0) return;
  launch_compensation(x, by_list(indices, x), codes, scale, bits, y);
}

cuda::Selection selection_of(const std::string& kind, const OptionalTensor& indices, const OptionalTensor& floors,
                             int64_t k_chunk, int64_t seed, const at::Tensor& x) {
  check_int("k_chunk", k_chunk, 0, kChunk);
  check_int("seed", seed, 0, INT64_MAX);
  if (kind == "static") {
    DECDEC_CHECK(indices.has_value(), "indices", "a tensor for static selection", "none");
    check_indices(x, *indices);
    return by_list(*indices, x);
  }
  if (kind == "dynamic") {
    DECDEC_CHECK(floors.has_value(), "floors", "a tensor for dynamic selection", "none");
    return by_buckets(*floors, k_chunk);
  }
  if (kind == "exact") return by_rule(cuda::Selection::Kind::topk, k_chunk, 0);
  DECDEC_CHECK(kind == "random", "selection", "static, dynamic, exact or random", kind);
  return by_rule(cuda::Selection::Kind::random, k_chunk, seed);
}

// A random selection is a baseline for comparisons: its draw is a launch of its own, which keeps it out of the kernels
// in use. Returns what `how` then lists.
at::Tensor drawn_if_random(const at::Tensor& x, cuda::Selection& how) {
  if (how.kind != cuda::Selection::Kind::random) return {};
  at::Tensor drawn = at::empty({x.size(0), row_budget(x.size(1), how.k_chunk)}, x.options().dtype(at::kInt));
  select(x, how, drawn);
  how = by_list(drawn, x);
  return drawn;
}

bool chooses_any(const cuda::Selection& how, const at::Tensor& x) {
  return (how.kind == cuda::Selection::Kind::listed ? how.count : row_budget(x.size(1), how.k_chunk)) > 0;
}

void select_and_compensate(const at::Tensor& x, const std::string& selection, const OptionalTensor& indices,
                           const OptionalTensor& floors, int64_t seed, int64_t k_chunk, const at::Tensor& codes,
                           const at::Tensor& scale, int64_t bits, at::Tensor y) {
  check_residual(x, codes, scale, bits, y);
  cuda::Selection how = selection_of(selection, indices, floors, k_chunk, seed, x);
  if (y.numel() == 0 || !chooses_any(how, x)) return;
  const at::Tensor drawn = drawn_if_random(x, how);
  launch_compensation(x, how, codes, scale, bits, y);
}

// tiles: (slabs, depth, words). table, for the codebook format: (slabs, 32, 2**bits / 2) words.
cuda::Weight weight_of(const at::Tensor& tiles, const OptionalTensor& table, const OptionalTensor& bias, int64_t bits,
                       int64_t out_features, int64_t in_features) {
  DECDEC_CHECK(2 <= bits && bits <= 4, "bits", "2, 3 or 4", bits);
  const int64_t slabs = (out_features + 31) / 32, depth = (in_features + 127) / 128;
  const int64_t words = 128 * bits + (table ? 0 : 32);
  check_dtype("tiles", tiles, at::kInt);
  DECDEC_CHECK(tiles.dim() == 3 && tiles.size(0) == slabs && tiles.size(1) == depth && tiles.size(2) == words,
               "tiles", text(at::IntArrayRef({slabs, depth, words})), tiles.sizes());
  DECDEC_CHECK(tiles.is_contiguous(), "tiles", "contiguous", tiles.strides());
  check_16_bytes("tiles", tiles);
  check_int("tiles' number", slabs * depth, 0, INT32_MAX / 2);
  if (table) {
    const int64_t size = int64_t{1} << (bits - 1);
    check_dtype("table", *table, at::kInt);
    DECDEC_CHECK(table->dim() == 3 && table->size(0) == slabs && table->size(1) == 32 && table->size(2) == size,
                 "table", text(at::IntArrayRef({slabs, 32, size})), table->sizes());
    DECDEC_CHECK(table->is_contiguous(), "table", "contiguous", table->strides());
    check_on_device("table", *table, tiles);
    check_16_bytes("table", *table);
  }
  if (bias) {
    check_dtype("bias", *bias, at::kFloat);
    DECDEC_CHECK(bias->dim() == 1 && bias->size(0) == out_features && bias->is_contiguous(), "bias",
                 "(out,) contiguous", bias->sizes());
    check_on_device("bias", *bias, tiles);
  }
  return {tiles.const_data_ptr(), table ? table->const_data_ptr() : nullptr,
          bias ? bias->const_data_ptr<float>() : nullptr,
          table ? cuda::Format::codebook : cuda::Format::uniform, static_cast<int>(bits),
          static_cast<int>(out_features)};
}

void dequantize(const at::Tensor& tiles, const OptionalTensor& table, int64_t bits, at::Tensor dense) {
  DECDEC_CHECK(dense.dim() == 2 && dense.is_contiguous(), "dense", "(out, in) contiguous", dense.sizes());
  DECDEC_CHECK(dense.size(1) % 32 == 0, "in", "a multiple of 32 on a GPU", dense.size(1));
  const at::ScalarType type = dense.scalar_type();
  DECDEC_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, "dense",
               "float32, float16 or bfloat16", type);
  check_on_device("dense", dense, tiles);
  const cuda::Weight weight = weight_of(tiles, table, {}, bits, dense.size(0), dense.size(1));
  if (dense.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(tiles.device());
  C10_CUDA_CHECK(cuda::dequantize(weight, static_cast<int>(dense.size(1)), scalar_of(dense),
                                  dense.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

void linear(const at::Tensor& x, const at::Tensor& tiles, const OptionalTensor& table, const OptionalTensor& bias,
            int64_t bits, const OptionalTensor& codes, const OptionalTensor& scale, const std::string& selection,
            const OptionalTensor& indices, const OptionalTensor& floors, int64_t seed, int64_t k_chunk,
            int64_t n_tb, at::Tensor y) {
  check_activations(x);
  DECDEC_CHECK(x.scalar_type() != at::kFloat, "x", "float16 or bfloat16 on a GPU", x.scalar_type());
  check_int("tokens", x.size(0), 1, cuda::kMaxTokens);
  DECDEC_CHECK(x.size(1) > 0 && x.size(1) % 32 == 0, "in", "a multiple of 32 on a GPU", x.size(1));
  check_16_bytes("x", x);
  check_dtype("y", y, x.scalar_type());
  DECDEC_CHECK(y.dim() == 2, "y", "(tokens, out)", y.sizes());
  check_matrix("y", y, x.size(0), y.size(1));
  check_on_device("y", y, x);
  check_on_device("tiles", tiles, x);
  const cuda::Weight weight = weight_of(tiles, table, bias, bits, y.size(1), x.size(1));
  if (y.numel() == 0) return;

  cuda::Selection how{};
  cuda::Residual residual{};
  bool compensated = codes.has_value();
  if (compensated) {
    DECDEC_CHECK(scale.has_value(), "scale", "a tensor where there are codes", "none");
    check_int("n_tb", n_tb, 1, 1024);
    how = selection_of(selection, indices, floors, k_chunk, seed, x);
    check_dtype("scale", *scale, at::kFloat);
    check_dtype("codes", *codes, at::kByte);
    DECDEC_CHECK(scale->dim() == 1 && scale->size(0) == y.size(1) && scale->is_contiguous(), "scale",
                 "(out,) contiguous", scale->sizes());
    check_matrix("codes", *codes, x.size(1), channel_bytes(y.size(1), 4));
    residual = residual_of(*codes, *scale, 4, x);
    compensated = chooses_any(how, x);
  }
  const at::Tensor drawn = compensated ? drawn_if_random(x, how) : at::Tensor();
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  cuda::Activations tokens = activations(x);
  int at_once;
  C10_CUDA_CHECK(cuda::tokens_at_once(weight, tokens, &at_once));
  const int64_t item = x.element_size(), all = x.size(0);
  for (int64_t first = 0; first < all; first += at_once) {
    tokens.data = static_cast<const char*>(x.const_data_ptr()) + first * x.size(1) * item;
    tokens.tokens = static_cast<int>(std::min<int64_t>(at_once, all - first));
    cuda::Selection some = how;
    if (some.indices != nullptr) some.indices += first * some.stride;
    cuda::Plan plan;
    float* workspace;
    C10_CUDA_CHECK(cuda::plan(weight, tokens, compensated ? static_cast<int>(n_tb) : 0, &plan));
    C10_CUDA_CHECK(cuda::workspace_of(stream, plan.slots, &workspace));
    C10_CUDA_CHECK(cuda::linear(weight, tokens, compensated ? &some : nullptr, compensated ? &residual : nullptr, plan,
                                static_cast<char*>(y.mutable_data_ptr()) + first * y.size(1) * item, workspace,
                                stream));
  }
}

// Codes may be a run of columns of a wider residual. Channels are not looked at, which would mean to wait for them.
void dequantize_residual(const at::Tensor& codes, const at::Tensor& scale, int64_t bits, const OptionalTensor& channels,
                         at::Tensor dense) {
  DECDEC_CHECK(bits == 2 || bits == 4 || bits == 8, "bits", "2, 4 or 8", bits);
  DECDEC_CHECK(dense.is_cuda(), "dense", "on a CUDA device", dense.device().str());
  DECDEC_CHECK(dense.dim() == 2 && dense.is_contiguous(), "dense", "(rows, out) contiguous", dense.sizes());
  const at::ScalarType type = dense.scalar_type();
  DECDEC_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, "dense",
               "float32, float16 or bfloat16", type);
  const int64_t rows = dense.size(0), out = dense.size(1);
  check_int("rows", rows, 0, INT32_MAX - kChunk);
  check_int("out", out, 0, INT32_MAX / 8);
  DECDEC_CHECK(out * bits % 128 == 0, "out", "a multiple of " + text(128 / bits) + " on a GPU", out);
  check_dtype("scale", scale, at::kFloat);
  DECDEC_CHECK(scale.dim() == 1 && scale.size(0) == out && scale.is_contiguous(), "scale", "(out,) contiguous",
               scale.sizes());
  check_on_device("scale", scale, dense);
  check_dtype("codes", codes, at::kByte);
  const int64_t bytes = channel_bytes(out, static_cast<int>(bits));
  DECDEC_CHECK(codes.dim() == 2 && codes.size(1) >= bytes, "codes", "(in, " + text(bytes) + ") or wider",
               codes.sizes());
  DECDEC_CHECK(codes.stride(1) == 1 && codes.stride(0) % 16 == 0, "codes", "in rows a multiple of 16 bytes apart",
               codes.strides());
  if (channels) {
    check_dtype("channels", *channels, at::kInt);
    DECDEC_CHECK(channels->dim() == 1 && channels->size(0) == rows && channels->is_contiguous(), "channels",
                 "(rows,) contiguous", channels->sizes());
    check_on_device("channels", *channels, dense);
  } else {
    DECDEC_CHECK(codes.size(0) == rows, "rows", text(codes.size(0)) + ", the channels of codes", rows);
  }
  if (dense.numel() == 0) return;
  check_readable("codes", codes, dense);
  check_16_bytes("codes", codes);
  check_16_bytes("scale", scale);
  check_16_bytes("dense", dense);
  const c10::cuda::CUDAGuard guard(dense.device());
  const cuda::Residual residual{codes.const_data_ptr(), scale.const_data_ptr<float>(), static_cast<int>(bits)};
  C10_CUDA_CHECK(cuda::dequantize_residual(residual, codes.stride(0),
                                           channels ? channels->const_data_ptr<int32_t>() : nullptr,
                                           static_cast<int>(rows), static_cast<int>(out), scalar_of(dense),
                                           dense.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(decdec, CUDA, m) {
  m.impl("select_topk", &select_topk);
  m.impl("select_buckets", &select_buckets);
  m.impl("select_random", &select_random);
  m.impl("compensate", &compensate);
  m.impl("select_and_compensate", &select_and_compensate);
  m.impl("dequantize", &dequantize);
  m.impl("linear", &linear);
  m.impl("dequantize_residual", &dequantize_residual);
}

}  // namespace decdec
