// Launches of the product (product.cuh), for every type, format and width.
#include <algorithm>

#include "launch.h"
#include "product.cuh"

namespace decdec::cuda {
namespace {

// Calls work(kernel, bytes of shared memory) for the kernel that serves.
template <typename T, Format kFormat, typename Work>
cudaError_t with_bits(int bits, int tokens, const Work& work) {
  switch (bits) {
    case 2: return work(linear_kernel<T, kFormat, 2>, shared_bytes<kFormat, 2>(tokens));
    case 3: return work(linear_kernel<T, kFormat, 3>, shared_bytes<kFormat, 3>(tokens));
    case 4: return work(linear_kernel<T, kFormat, 4>, shared_bytes<kFormat, 4>(tokens));
  }
  return cudaErrorInvalidValue;
}

template <typename Work>
cudaError_t with_kernel(const Weight& weight, const Activations& x, const Work& work) {
  const bool uniform = weight.format == Format::uniform, half = x.scalar == Scalar::float16;
  if (x.scalar == Scalar::float32) return cudaErrorInvalidValue;
  if (uniform && half) return with_bits<__half, Format::uniform>(weight.bits, x.tokens, work);
  if (uniform) return with_bits<__nv_bfloat16, Format::uniform>(weight.bits, x.tokens, work);
  if (half) return with_bits<__half, Format::codebook>(weight.bits, x.tokens, work);
  return with_bits<__nv_bfloat16, Format::codebook>(weight.bits, x.tokens, work);
}

// Lets the kernel have all the shared memory that a block can: always the same, so that launches from several threads
// do not undo each other's word. Said anew at each launch: it costs under a microsecond, and there may be many devices.
template <typename Kernel>
cudaError_t prepare(Kernel kernel, int device) {
  int most;
  const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// Blocks that compensate: one for a chunk, and more columns where there are blocks left; but so few pieces that a block
// has its column at a time.
void divide_compensation(int slabs, int in_features, int n_tb, Plan* plan) {
  plan->columns = plan->pieces = 0;
  if (n_tb == 0) return;
  plan->pieces = std::clamp(n_tb / divide_up(slabs, kMaxUnits<4>), 1, divide_up(in_features, kChunk));
  plan->columns = std::clamp(n_tb / plan->pieces, 1, slabs);
}

// Tiles of a block where there is room for so many blocks: equally many for all warps, where that is nearly as few or
// where they are few, since a tile cannot be split.
int divide_tiles(int tiles, int room) {
  constexpr int kFew = 4;  // of a warp
  const int of_block = divide_up(tiles, room), of_warps = divide_up(of_block, kWarps) * kWarps;
  return of_warps <= kFew * kWarps || of_warps - of_block <= of_block / 32 ? of_warps : of_block;
}

}  // namespace

cudaError_t tokens_at_once(const Weight& weight, const Activations& x, int* tokens) {
  int device, most;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  Activations some = x;
  size_t needed = 0;
  for (some.tokens = kMaxTokens; some.tokens > 0; --some.tokens) {
    error = with_kernel(weight, some, [&](auto, size_t bytes) {
      needed = bytes;
      return cudaSuccess;
    });
    if (error != cudaSuccess) return error;
    if (needed <= static_cast<size_t>(most)) break;
  }
  *tokens = some.tokens;
  return some.tokens > 0 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

cudaError_t plan(const Weight& weight, const Activations& x, int n_tb, Plan* result) {
  return with_kernel(weight, x, [&](auto kernel, size_t bytes) {
    int device, processors, per_processor;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = prepare(kernel, device);
    if (error == cudaSuccess) error = can_overlap(kernel, device, &result->overlap);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, bytes);
    }
    if (error != cudaSuccess) return error;
    const int slabs = divide_up(weight.out_features, kSlab), tiles = slabs * divide_up(x.in_features, kDepth);
    divide_compensation(slabs, x.in_features, n_tb, result);
    // as many blocks as there is room for
    const int resident = per_processor * processors, half = (resident + 1) / 2;
    result->tiles_each = divide_tiles(tiles, std::max(resident - result->columns * result->pieces, half));
    result->base_blocks = divide_up(tiles, result->tiles_each);
    result->slots = int64_t{x.tokens} * kSlab * (result->base_blocks + result->pieces * slabs);
    return cudaSuccess;
  });
}

cudaError_t linear(const Weight& weight, const Activations& x, const Selection* selection,
                   const Residual* residual, const Plan& plan, void* y, float* workspace, cudaStream_t stream) {
  Work work{};
  work.x = x;
  work.weight = weight;
  if (selection != nullptr) work.selection = *selection;
  if (residual != nullptr) work.residual = *residual;
  work.slabs = divide_up(weight.out_features, kSlab);
  work.depth = divide_up(x.in_features, kDepth);
  work.base_blocks = plan.base_blocks;
  work.tiles_each = plan.tiles_each;
  work.columns = plan.columns;
  work.pieces = plan.pieces;
  work.y = y;
  work.shares = workspace;
  work.compensation = workspace + int64_t{plan.base_blocks} * x.tokens * kSlab;
  return with_kernel(weight, x, [&](auto kernel, size_t bytes) {
    return launch(kernel, plan.columns * plan.pieces + plan.base_blocks, bytes, plan.overlap, stream, work);
  });
}

}  // namespace decdec::cuda
