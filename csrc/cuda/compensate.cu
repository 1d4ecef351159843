// Compensation by itself, of listed channels: a block of threads for a token's slab of outputs (compensate.cuh).
#include "compensate.cuh"

namespace decdec::cuda {
namespace {

template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads) compensate_kernel(const Activations x, const Selection listed,
                                                              const Residual residual, int out_features,
                                                              int units_each, float* y) {
  extern __shared__ __align__(16) char memory[];
  const int64_t token = blockIdx.y;
  const int units = out_features / kUnitOutputs<kBits>, first = blockIdx.x * units_each;
  float* const out = y + token * out_features;
  compensate_slab<kBits>(static_cast<const T*>(x.data) + token * x.in_features, x.in_features, listed,
                         listed.indices + token * listed.stride, residual, out_features, first,
                         min(units_each, units - first), *reinterpret_cast<Shared<kBits>*>(memory),
                         [&](int output, float value) { out[output] += value; });
}

template <typename T, int kBits>
cudaError_t launch(const Activations& x, const Selection& listed, const Residual& residual, int out_features,
                   float* y, cudaStream_t stream) {
  const int units = out_features / kUnitOutputs<kBits>;
  // few tokens: slabs so small that the whole device fetches; many: slabs as large as a block takes
  const int most = kMaxUnits<kBits>, least = 16;
  const int wanted = (units * x.tokens + 255) / 256;
  const int each = wanted < least ? least : wanted > most ? most : wanted;
  const dim3 grid((units + each - 1) / each, x.tokens);
  constexpr int kBytes = sizeof(Shared<kBits>);
  const auto kernel = compensate_kernel<T, kBits>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, kThreads, kBytes, stream>>>(x, listed, residual, out_features, each, y);
  return cudaGetLastError();
}

}  // namespace

cudaError_t compensate(const Activations& x, const Selection& listed, const Residual& residual, int out_features,
                       float* y, cudaStream_t stream) {
  return with_scalar(x.scalar, [&](auto scalar) {
    using T = decltype(scalar);
    switch (residual.bits) {
      case 2: return launch<T, 2>(x, listed, residual, out_features, y, stream);
      case 4: return launch<T, 4>(x, listed, residual, out_features, y, stream);
      case 8: return launch<T, 8>(x, listed, residual, out_features, y, stream);
      case 16: return launch<T, 16>(x, listed, residual, out_features, y, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace decdec::cuda
