// What stands between the matrices of a decoding step besides attention: the sum with its norm, and the gate.
//
// All of it is shorter than a launch: what counts is that the matrix after it may start, and fetch its first weights,
// while this runs (let_next_start).
#include "launch.h"

namespace decdec::cuda {
namespace {

// One block. Sums stay in the memory that they are written to: a thread reads back its own.
template <typename T>
__global__ void __launch_bounds__(kThreads) norm_kernel(const Norm work) {
  __shared__ float sums[kWarps];
  const auto* const added = static_cast<const Vector<T>*>(work.added);
  const auto* const weight = static_cast<const Vector<T>*>(work.weight);
  auto* const hidden = static_cast<Vector<T>*>(work.hidden);
  auto* const out = static_cast<Vector<T>*>(work.out);
  const int vectors = work.size / kVector;

  let_next_start();
  await_previous();
  float squares = 0.f;
#pragma unroll 2
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    Vector<T> h = hidden[i];
    if (added != nullptr) {
      const Vector<T> a = added[i];
#pragma unroll
      for (int j = 0; j < kVector; ++j) h.v[j] = from_float<T>(to_float(h.v[j]) + to_float(a.v[j]));
      hidden[i] = h;
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) squares += to_float(h.v[j]) * to_float(h.v[j]);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAll, squares, offset);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = squares;
  __syncthreads();
  squares = 0.f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) squares += sums[i];
  const float scale = rsqrtf(squares / work.size + work.eps);
#pragma unroll 2
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const Vector<T> h = hidden[i], w = weight[i];
    Vector<T> result;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      result.v[j] = from_float<T>(rounded<T>(to_float(h.v[j]) * scale) * to_float(w.v[j]));
    }
    out[i] = result;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(const Vector<T>* gate_up, Vector<T>* out, int vectors) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  let_next_start();
  await_previous();
  if (i >= vectors) return;
  const Vector<T> gate = gate_up[i], up = gate_up[vectors + i];
  Vector<T> result;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const float g = to_float(gate.v[j]);
    result.v[j] = from_float<T>(rounded<T>(g / (1.f + expf(-g))) * to_float(up.v[j]));
  }
  out[i] = result;
}

template <typename Kernel, typename... Arguments>
cudaError_t launch_overlapping(Kernel kernel, int blocks, cudaStream_t stream, const Arguments&... arguments) {
  int device;
  bool overlap = false;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = can_overlap(kernel, device, &overlap);
  return error == cudaSuccess ? launch(kernel, blocks, 0, overlap, stream, arguments...) : error;
}

}  // namespace

cudaError_t add_norm(const Norm& norm, cudaStream_t stream) {
  return with_half(norm.scalar, [&](auto scalar) {
    return launch_overlapping(norm_kernel<decltype(scalar)>, 1, stream, norm);
  });
}

cudaError_t silu_mul(const void* gate_up, void* out, Scalar scalar, int size, cudaStream_t stream) {
  return with_half(scalar, [&](auto type) {
    using T = decltype(type);
    const int vectors = size / kVector;
    return launch_overlapping(silu_mul_kernel<T>, divide_up(vectors, kThreads), stream,
                              static_cast<const Vector<T>*>(gate_up), static_cast<Vector<T>*>(out), vectors);
  });
}

}  // namespace decdec::cuda
