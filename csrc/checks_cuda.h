// Argument checks that the ops of a GPU share.
#pragma once

#include <optional>

#include "checks.h"
#include "cuda/kernels.h"

namespace decdec {

using OptionalTensor = std::optional<at::Tensor>;

inline cuda::Scalar scalar_of(const at::Tensor& t) {
  const at::ScalarType type = t.scalar_type();
  return type == at::kFloat  ? cuda::Scalar::float32
         : type == at::kHalf ? cuda::Scalar::float16
                             : cuda::Scalar::bfloat16;
}

inline void check_on_device(const char* which, const at::Tensor& got, const at::Tensor& x) {
  DECDEC_CHECK(got.device() == x.device(), which, "on " + x.device().str(), got.device().str());
}

inline void check_16_bytes(const char* which, const at::Tensor& got) {
  DECDEC_CHECK(reinterpret_cast<uintptr_t>(got.const_data_ptr()) % 16 == 0, which, "aligned to 16 bytes",
               std::string("another address"));
}

}  // namespace decdec
