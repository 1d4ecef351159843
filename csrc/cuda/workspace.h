// Device memory in which the blocks of a launch meet: of `linear`, `compensate` and `decode_attention`.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace decdec::cuda {

// Points *workspace to at least `words` words of kEmpty, for launches on `stream`, one after the other.
//
// Launches that may run at the same time must not share one: each stream has its own for good, and each graph
// being captured has its own, which goes with the graph and is used again once that is destroyed. No waiting, but
// the first time; safe from any thread and during capture.
cudaError_t workspace_of(cudaStream_t stream, int64_t words, float** workspace);

}  // namespace decdec::cuda
