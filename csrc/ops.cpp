// The op schemas of every device, and their CPU implementations: check, then share the work out.
// The only file that includes torch. Threads are torch's own, so torch.set_num_threads governs them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "cpu/kernels.h"
#include "layout.h"

namespace decdec {
namespace {

// Channels looked at, or products added, that are worth one more thread: some ten microseconds of work.
constexpr int64_t kChannelsPerThread = 1 << 14;
constexpr int64_t kProductsPerThread = 1 << 17;

cpu::Activations activations(const at::Tensor& x) {
  const at::ScalarType type = x.scalar_type();
  const cpu::Scalar scalar = type == at::kFloat  ? cpu::Scalar::float32
                             : type == at::kHalf ? cpu::Scalar::float16
                                                 : cpu::Scalar::bfloat16;
  return {x.const_data_ptr(), scalar, x.size(1)};
}

int64_t grain(int64_t per_thread, int64_t per_item) {
  return std::max<int64_t>(1, per_thread / std::max<int64_t>(1, per_item));
}

// Calls work(token_begin, token_end) on as many threads as the selection is worth.
template <typename Work>
void for_tokens(const at::Tensor& x, const at::Tensor& indices, const Work& work) {
  if (indices.numel() == 0) return;
  at::parallel_for(0, x.size(0), grain(kChannelsPerThread, x.size(1)), work);
}

void select_topk(const at::Tensor& x, int64_t k_chunk, at::Tensor indices) {
  check_selection(x, k_chunk, indices);
  int32_t* out = indices.mutable_data_ptr<int32_t>();
  for_tokens(x, indices, [&](int64_t begin, int64_t end) {
    cpu::select_topk(activations(x), static_cast<int>(k_chunk), out, begin, end);
  });
}

void select_buckets(const at::Tensor& x, const at::Tensor& floors, int64_t k_chunk, at::Tensor indices) {
  check_selection(x, k_chunk, indices);
  check_floors(floors);
  const float* first_floor = floors.const_data_ptr<float>();
  int32_t* out = indices.mutable_data_ptr<int32_t>();
  for_tokens(x, indices, [&](int64_t begin, int64_t end) {
    cpu::select_buckets(activations(x), first_floor, static_cast<int>(k_chunk), out, begin, end);
  });
}

void select_random(const at::Tensor& x, int64_t seed, int64_t k_chunk, at::Tensor indices) {
  check_selection(x, k_chunk, indices);
  check_int("seed", seed, 0, INT64_MAX);
  int32_t* out = indices.mutable_data_ptr<int32_t>();
  for_tokens(x, indices, [&](int64_t begin, int64_t end) {
    cpu::select_random(activations(x), static_cast<uint64_t>(seed), static_cast<int>(k_chunk), out, begin, end);
  });
}

void compensate(const at::Tensor& x, const at::Tensor& indices, const at::Tensor& codes,
                const at::Tensor& scale, int64_t bits, at::Tensor y) {
  check_residual(x, codes, scale, bits, y);
  check_indices(x, indices);
  if (indices.numel() == 0 || y.numel() == 0) return;
  const int32_t* first = indices.const_data_ptr<int32_t>();
  const int64_t outside = cpu::first_outside(first, indices.numel(), x.size(1));
  DECDEC_CHECK(outside == indices.numel(), "indices", "0.." + text(x.size(1) - 1), int64_t{first[outside]});

  const int64_t tokens = x.size(0), count = indices.size(1), out_features = scale.size(0);
  const cpu::Channels channels{first, count, indices.size(0) == tokens ? count : 0};
  const cpu::Residual residual{codes.const_data_ptr(), scale.const_data_ptr<float>(), static_cast<int>(bits),
                               out_features};
  float* sums = y.mutable_data_ptr<float>();
  const int64_t threads = at::get_num_threads();
  const int64_t slabs = (threads + tokens - 1) / tokens;
  at::parallel_for(0, tokens * slabs, grain(kProductsPerThread, count * out_features / slabs),
                   [&](int64_t begin, int64_t end) {
                     cpu::compensate(activations(x), channels, residual, sums, slabs, begin, end);
                   });
}

}  // namespace

TORCH_LIBRARY(decdec, m) {
  m.def("select_topk(Tensor x, int k_chunk, Tensor(a!) indices) -> ()");
  m.def("select_buckets(Tensor x, Tensor floors, int k_chunk, Tensor(a!) indices) -> ()");
  m.def("select_random(Tensor x, int seed, int k_chunk, Tensor(a!) indices) -> ()");
  m.def(
      "compensate(Tensor x, Tensor indices, Tensor codes, Tensor scale, int bits, Tensor(a!) y) -> ()");
  // on a GPU only
  m.def(
      "select_and_compensate(Tensor x, str selection, Tensor? indices, Tensor? floors, int seed, int k_chunk, "
      "Tensor codes, Tensor scale, int bits, Tensor(a!) y) -> ()");
  m.def("dequantize(Tensor tiles, Tensor? table, int bits, Tensor(a!) dense) -> ()");
  m.def(
      "linear(Tensor x, Tensor tiles, Tensor? table, Tensor? bias, int bits, Tensor? codes, Tensor? scale, "
      "str selection, Tensor? indices, Tensor? floors, int seed, int k_chunk, int n_tb, Tensor(a!) y) -> ()");
  m.def(
      "dequantize_residual(Tensor codes, Tensor scale, int bits, Tensor? channels, Tensor(a!) dense) -> ()");
  m.def("add_norm(Tensor? added, Tensor(a!) hidden, Tensor weight, float eps, Tensor(b!) out) -> ()");
  m.def("silu_mul(Tensor gate_up, Tensor(a!) out) -> ()");
  m.def(
      "decode_attention(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor position, Tensor cosines, "
      "Tensor sines, Tensor? query_norm, Tensor? key_norm, float eps, float scaling, Tensor(c!) out) -> ()");
}

TORCH_LIBRARY_IMPL(decdec, CPU, m) {
  m.impl("select_topk", &select_topk);
  m.impl("select_buckets", &select_buckets);
  m.impl("select_random", &select_random);
  m.impl("compensate", &compensate);
}

}  // namespace decdec
