// What stands between the matrices of a decoding step, on a GPU: check, launch on the current stream, check the launch.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks_cuda.h"
#include "cuda/workspace.h"

namespace decdec {
namespace {

// One row of half precision, `size` values that threads take eight at a time.
void check_row(const char* which, const at::Tensor& got, int64_t size, const at::Tensor& like) {
  check_on_device(which, got, like);
  check_dtype(which, got, like.scalar_type());
  DECDEC_CHECK(got.numel() == size, which, "of " + text(size) + " values", got.sizes());
  DECDEC_CHECK(got.is_contiguous(), which, "contiguous", got.strides());
  check_16_bytes(which, got);
}

void check_half(const char* which, const at::Tensor& got) {
  const at::ScalarType type = got.scalar_type();
  DECDEC_CHECK(type == at::kHalf || type == at::kBFloat16, which, "float16 or bfloat16 on a GPU", type);
}

void check_vectors(const char* which, int64_t size) {
  DECDEC_CHECK(0 < size && size <= INT32_MAX / 2 && size % 8 == 0, which, "a positive multiple of 8 on a GPU", size);
}

void add_norm(const OptionalTensor& added, at::Tensor hidden, const at::Tensor& weight, double eps, at::Tensor out) {
  check_half("hidden", hidden);
  const int64_t size = hidden.numel();
  check_vectors("size", size);
  check_row("hidden", hidden, size, hidden);
  if (added) check_row("added", *added, size, hidden);
  check_row("weight", weight, size, hidden);
  check_row("out", out, size, hidden);
  const c10::cuda::CUDAGuard guard(hidden.device());
  const cuda::Norm norm{added ? added->const_data_ptr() : nullptr,
                        hidden.mutable_data_ptr(),
                        weight.const_data_ptr(),
                        out.mutable_data_ptr(),
                        scalar_of(hidden),
                        static_cast<int>(size),
                        static_cast<float>(eps)};
  C10_CUDA_CHECK(cuda::add_norm(norm, c10::cuda::getCurrentCUDAStream()));
}

void silu_mul(const at::Tensor& gate_up, at::Tensor out) {
  check_half("gate_up", gate_up);
  const int64_t size = out.numel();
  check_vectors("size", size);
  check_row("gate_up", gate_up, 2 * size, gate_up);
  check_row("out", out, size, gate_up);
  const c10::cuda::CUDAGuard guard(gate_up.device());
  C10_CUDA_CHECK(cuda::silu_mul(gate_up.const_data_ptr(), out.mutable_data_ptr(), scalar_of(gate_up),
                                static_cast<int>(size), c10::cuda::getCurrentCUDAStream()));
}

// The position is not looked at, which would mean to wait for it.
void decode_attention(const at::Tensor& qkv, at::Tensor keys, at::Tensor values, const at::Tensor& position,
                      const at::Tensor& cosines, const at::Tensor& sines, const OptionalTensor& query_norm,
                      const OptionalTensor& key_norm, double eps, double scaling, at::Tensor out) {
  check_half("qkv", qkv);
  DECDEC_CHECK(keys.dim() == 3 && keys.numel() > 0, "keys", "(key heads, capacity, d)", keys.sizes());
  const int64_t key_heads = keys.size(0), capacity = keys.size(1), d = keys.size(2);
  DECDEC_CHECK(d % 8 == 0 && d <= 256, "d", "a multiple of 8, at most 256, on a GPU", d);
  check_int("capacity", capacity, 1, INT32_MAX / 2);
  const int64_t heads = qkv.numel() / d - 2 * key_heads;
  DECDEC_CHECK(0 < heads && heads <= 65535 && heads % key_heads == 0, "query heads",
               "a multiple of " + text(key_heads) + ", up to 65535", heads);
  DECDEC_CHECK(cosines.dim() == 2 && cosines.size(0) >= capacity, "cosines", "(" + text(capacity) + ", rotary)",
               cosines.sizes());
  const int64_t rotary = cosines.size(1);
  DECDEC_CHECK(0 < rotary && rotary <= d && rotary % 16 == 0, "rotary", "a multiple of 16, at most " + text(d),
               rotary);
  check_row("qkv", qkv, (heads + 2 * key_heads) * d, qkv);
  check_row("keys", keys, keys.numel(), qkv);
  check_row("values", values, keys.numel(), qkv);
  check_row("cosines", cosines, cosines.numel(), qkv);
  check_row("sines", sines, cosines.numel(), qkv);
  check_row("out", out, heads * d, qkv);
  if (query_norm) check_row("query_norm", *query_norm, d, qkv);
  if (key_norm) check_row("key_norm", *key_norm, d, qkv);
  check_dtype("position", position, at::kLong);
  DECDEC_CHECK(position.numel() == 1, "position", "of one number", position.sizes());
  check_on_device("position", position, qkv);
  const cuda::DecodeAttention attention{qkv.const_data_ptr(),
                                        keys.mutable_data_ptr(),
                                        values.mutable_data_ptr(),
                                        position.const_data_ptr<int64_t>(),
                                        cosines.const_data_ptr(),
                                        sines.const_data_ptr(),
                                        query_norm ? query_norm->const_data_ptr() : nullptr,
                                        key_norm ? key_norm->const_data_ptr() : nullptr,
                                        scalar_of(qkv),
                                        static_cast<int>(heads),
                                        static_cast<int>(key_heads),
                                        static_cast<int>(capacity),
                                        static_cast<int>(d),
                                        static_cast<int>(rotary),
                                        static_cast<float>(eps),
                                        static_cast<float>(scaling)};
  const c10::cuda::CUDAGuard guard(qkv.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  cuda::AttentionPlan plan;
  float* workspace;
  C10_CUDA_CHECK(cuda::plan(attention, &plan));
  C10_CUDA_CHECK(cuda::workspace_of(stream, plan.slots, &workspace));
  C10_CUDA_CHECK(cuda::decode_attention(attention, plan, out.mutable_data_ptr(), workspace, stream));
}

}  // namespace

TORCH_LIBRARY_IMPL(decdec, CUDA, m) {
  m.impl("add_norm", &add_norm);
  m.impl("silu_mul", &silu_mul);
  m.impl("decode_attention", &decode_attention);
}

}  // namespace decdec
