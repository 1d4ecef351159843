// What the launches share that may overlap with the end of the one before them (common.cuh: await_previous).
#pragma once

#include <cuda_runtime.h>

#include "common.cuh"

namespace decdec::cuda {

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// Whether launches of `kernel` may overlap: not of code compiled for an older target, in which await_previous is
// empty.
template <typename Kernel>
cudaError_t can_overlap(Kernel kernel, int device, bool* result) {
  int major;
  cudaFuncAttributes compiled;
  cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  *result = error == cudaSuccess && major >= 9 && compiled.ptxVersion >= 90;
  return error;
}

// Launches blocks of kThreads threads.
template <typename Kernel, typename... Arguments>
cudaError_t launch(Kernel kernel, dim3 blocks, size_t shared_bytes, bool overlap, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t shape{};
  shape.gridDim = blocks;
  shape.blockDim = kThreads;
  shape.dynamicSmemBytes = shared_bytes;
  shape.stream = stream;
  shape.attrs = &attribute;
  shape.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&shape, kernel, arguments...);
}

}  // namespace decdec::cuda
