// Argument checks of the ops: one line that says which, wanted and got. They raise ValueError in Python.
//
// Messages are joined as strings, never through a stream: a stream that formats a number crashed in an
// extension built by GCC 13.3 against the torch 2.11 wheel, whose libraries bring their own copies of parts of
// the C++ library (std::to_string and string concatenation need none of them).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <string>

#include "layout.h"

namespace decdec {

inline std::string text(const char* words) { return words; }
inline std::string text(const std::string& words) { return words; }
inline std::string text(int64_t number) { return std::to_string(number); }
inline std::string text(at::ScalarType type) { return c10::toString(type); }
inline std::string text(at::IntArrayRef sizes) {
  std::string joined;
  for (const int64_t size : sizes) joined += (joined.empty() ? "" : ", ") + std::to_string(size);
  return "(" + joined + ")";
}

// Arguments are evaluated for the message alone, so only where the check fails.
#define DECDEC_CHECK(ok, which, wanted, got) \
  TORCH_CHECK_VALUE(ok, text(which) + " must be " + text(wanted) + ", got " + text(got))

inline void check_int(const char* which, int64_t got, int64_t low, int64_t high) {
  DECDEC_CHECK(low <= got && got <= high, which, text(low) + ".." + text(high), got);
}

inline void check_dtype(const char* which, const at::Tensor& got, at::ScalarType wanted) {
  DECDEC_CHECK(got.scalar_type() == wanted, which, wanted, got.scalar_type());
}

// Shape (rows, columns), contiguous.
inline void check_matrix(const char* which, const at::Tensor& got, int64_t rows, int64_t columns) {
  DECDEC_CHECK(got.dim() == 2 && got.size(0) == rows && got.size(1) == columns, which,
               text(at::IntArrayRef({rows, columns})), got.sizes());
  DECDEC_CHECK(got.is_contiguous(), which, "contiguous", got.strides());
}

inline void check_activations(const at::Tensor& x) {
  DECDEC_CHECK(x.dim() == 2, "x", "(tokens, in)", x.sizes());
  const at::ScalarType got = x.scalar_type();
  DECDEC_CHECK(got == at::kFloat || got == at::kHalf || got == at::kBFloat16, "x",
               "float32, float16 or bfloat16", got);
  DECDEC_CHECK(x.is_contiguous(), "x", "contiguous", x.strides());
  // channels are int32, and so are the products of a chunk's budget
  check_int("in", x.size(1), 0, INT32_MAX - kChunk);
}

inline void check_selection(const at::Tensor& x, int64_t k_chunk, const at::Tensor& indices) {
  check_activations(x);
  check_int("k_chunk", k_chunk, 0, kChunk);
  check_dtype("indices", indices, at::kInt);
  check_matrix("indices", indices, x.size(0), row_budget(x.size(1), static_cast<int>(k_chunk)));
}

// (32,) float32, descending, the last one 0: compared as bit patterns, as the kernels do.
inline void check_floors(const at::Tensor& floors) {
  check_dtype("floors", floors, at::kFloat);
  DECDEC_CHECK(floors.dim() == 1 && floors.size(0) == kBuckets && floors.is_contiguous(), "floors",
               "(32,) contiguous", floors.sizes());
  int32_t keys[kBuckets];
  std::memcpy(keys, floors.const_data_ptr<float>(), sizeof keys);
  bool descending = keys[kBuckets - 1] == 0;
  for (int i = 1; i < kBuckets; ++i) descending &= keys[i - 1] >= keys[i];
  DECDEC_CHECK(descending, "floors", "descending to 0", "another order");
}

// A residual, and the y that its channels are added to.
inline void check_residual(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scale, int64_t bits,
                           const at::Tensor& y) {
  check_activations(x);
  DECDEC_CHECK(bits == 2 || bits == 4 || bits == 8 || bits == 16, "bits", "2, 4, 8 or 16", bits);
  check_dtype("scale", scale, at::kFloat);
  DECDEC_CHECK(scale.dim() == 1 && scale.is_contiguous(), "scale", "(out,) contiguous", scale.sizes());
  const int64_t out = scale.size(0);
  check_dtype("codes", codes, bits == 16 ? at::kHalf : at::kByte);
  check_matrix("codes", codes, x.size(1), bits == 16 ? out : channel_bytes(out, static_cast<int>(bits)));
  check_dtype("y", y, at::kFloat);
  check_matrix("y", y, x.size(0), out);
}

inline void check_indices(const at::Tensor& x, const at::Tensor& indices) {
  check_dtype("indices", indices, at::kInt);
  DECDEC_CHECK(indices.dim() == 2 && (indices.size(0) == x.size(0) || indices.size(0) == 1), "indices",
               "(tokens, K) or (1, K)", indices.sizes());
  DECDEC_CHECK(indices.is_contiguous(), "indices", "contiguous", indices.strides());
}

}  // namespace decdec
