#include "workspace.h"

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace decdec::cuda {
namespace {

constexpr int64_t kLeastWords = 1 << 17;  // enough for one token of large layers

struct Block {
  int device;
  float* words;
  int64_t count;
};

using Key = std::tuple<int, cudaStream_t, unsigned long long>;  // device, stream, capture (0: none)

struct State {
  std::mutex mutex;
  std::map<Key, Block> in_use;
  std::vector<Block> idle;  // of graphs that are gone
};

State& state() {
  static State* const forever = new State;  // graphs may outlive static objects
  return *forever;
}

struct Lease {
  Key key;
  Block block;
};

// A graph's last word; must not call CUDA.
void end_lease(void* data) {
  Lease* const lease = static_cast<Lease*>(data);
  {
    const std::lock_guard<std::mutex> lock(state().mutex);
    const auto held = state().in_use.find(lease->key);
    if (held != state().in_use.end() && held->second.words == lease->block.words) state().in_use.erase(held);
    state().idle.push_back(lease->block);
  }
  delete lease;
}

cudaError_t allocate(int64_t count, float** words) {
  cudaError_t error = cudaMalloc(words, count * sizeof(float));
  if (error != cudaSuccess) return error;
  cudaStream_t own = nullptr;  // which waits for nobody, whatever is being captured
  error = cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking);
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(*words, 0xff, count * sizeof(float), own);
    if (error == cudaSuccess) error = cudaStreamSynchronize(own);
    cudaStreamDestroy(own);
  }
  if (error != cudaSuccess) cudaFree(*words);
  return error;
}

bool take_idle(int device, int64_t least, Block* block) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  auto& idle = state().idle;
  for (auto candidate = idle.begin(); candidate != idle.end(); ++candidate) {
    if (candidate->device == device && candidate->count >= least) {
      *block = *candidate;
      idle.erase(candidate);
      return true;
    }
  }
  return false;
}

// Without the mutex, which a graph's destructor takes too: an allocation may wait for what that one runs on.
cudaError_t idle_or_new(int device, int64_t least, Block* block) {
  if (take_idle(device, least, block)) return cudaSuccess;
  int64_t count = kLeastWords;
  while (count < least) count *= 2;
  *block = {device, nullptr, count};
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t error = allocate(count, &block->words);
  cudaThreadExchangeStreamCaptureMode(&mode);
  return error;
}

}  // namespace

cudaError_t workspace_of(cudaStream_t stream, int64_t words, float** workspace) {
  int device;
  cudaStreamCaptureStatus status;
  unsigned long long capture = 0;
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaStreamGetCaptureInfo(stream, &status, &capture, &graph);
  if (error != cudaSuccess) return error;
  const bool capturing = status == cudaStreamCaptureStatusActive;
  const Key key{device, stream, capturing ? capture : 0};

  {
    const std::lock_guard<std::mutex> lock(state().mutex);
    const auto held = state().in_use.find(key);
    if (held != state().in_use.end() && held->second.count >= words) {
      *workspace = held->second.words;
      return cudaSuccess;
    }
  }
  Block block;
  error = idle_or_new(device, words, &block);
  if (error != cudaSuccess) return error;
  if (capturing) {
    Lease* const lease = new Lease{key, block};
    cudaUserObject_t object;
    error = cudaUserObjectCreate(&object, lease, end_lease, 1, cudaUserObjectNoDestructorSync);
    if (error != cudaSuccess) {
      end_lease(lease);
      return error;
    }
    error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
    if (error != cudaSuccess) {
      cudaUserObjectRelease(object, 1);  // which ends the lease
      return error;
    }
  }
  // a smaller one that the stream had stays allocated, as launches may still use it: sizes double, so all that is
  // left behind is no more than what is in use
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().in_use[key] = block;
  *workspace = block.words;
  return cudaSuccess;
}

}  // namespace decdec::cuda
