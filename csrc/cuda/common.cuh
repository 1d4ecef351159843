// What the kernels share: scalars, asynchronous copies, the tensor-core product, words that announce themselves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../layout.h"
#include "kernels.h"

namespace decdec::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr unsigned kAll = 0xffffffffu;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) { return v; }
template <>
__device__ inline __half from_float<__half>(float v) { return __float2half(v); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16(v); }

template <typename T>
__device__ inline float rounded(float v) {
  return to_float(from_float<T>(v));
}

constexpr int kVector = 8;

// 16 bytes of half precision.
template <typename T>
struct alignas(16) Vector {
  T v[kVector];
};

// Calls work(T{}) with the type that `scalar` names.
template <typename Work>
cudaError_t with_scalar(Scalar scalar, const Work& work) {
  switch (scalar) {
    case Scalar::float32: return work(float{});
    case Scalar::float16: return work(__half{});
    case Scalar::bfloat16: return work(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

// The same for half precision.
template <typename Work>
cudaError_t with_half(Scalar scalar, const Work& work) {
  switch (scalar) {
    case Scalar::float16: return work(__half{});
    case Scalar::bfloat16: return work(__nv_bfloat16{});
    default: return cudaErrorInvalidValue;
  }
}

// ---- asynchronous copies of 16 bytes from global (or mapped host) memory to an address in shared memory

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ inline void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// Or zeros where there is nothing to copy. Through the L1 cache: for what all blocks read, lest they all ask the few
// slices of the L2 cache that have it.
__device__ inline void copy_async_or_zero(uint32_t shared, const void* global, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(there ? 16 : 0)
               : "memory");
}

__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of the calling thread's newest groups are still on their way.
template <int kPending>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 16 bytes that are read once: they need no place in the L1 cache.
__device__ inline uint4 load_once(const void* global) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
}

// ---- launches that overlap (compute capability 9.0 and newer; before, the stream's order is all there is): a kernel
// may start while the one before it in the stream ends, and reads what that one wrote only after this

__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next one start once all blocks have come here. Before its own await_previous a kernel reads only what none
// of those that may still be running writes: in a chain that lets go early, what was there before the chain.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// For launches whose weights may have been written by the one before the last: the next starts only when no more than
// this one can still be running.
__device__ inline void wait_for_previous() {
  await_previous();
  let_next_start();
}

// ---- words of the workspace: kEmpty until their value comes, so that a word is its own flag and needs no fence

__device__ inline uint32_t as_word(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits == kEmpty ? 0x7fffffffu : bits;  // another NaN
}

__device__ inline void send(float* slot, float value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(slot), "r"(as_word(value)) : "memory");
}

// Four words, each its own flag: they need not arrive together.
__device__ inline void send(float* slots, float4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(slots), "r"(as_word(v.x)),
               "r"(as_word(v.y)), "r"(as_word(v.z)), "r"(as_word(v.w))
               : "memory");
}

__device__ inline uint32_t peek(const float* slot) {
  uint32_t bits;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(bits) : "l"(slot) : "memory");
  return bits;
}

__device__ inline void clear(float* slot) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(slot), "r"(kEmpty) : "memory");
}

// Waits for the value and leaves the word empty for the next launch. A word has one receiver.
__device__ inline float receive(float* slot) {
  uint32_t bits;
  do {
    bits = peek(slot);
  } while (bits == kEmpty);
  clear(slot);
  return __uint_as_float(bits);
}

// The sum of `count` words, `stride` apart, in their order; as receive. Their values are awaited together.
__device__ inline float receive_sum(float* slot, int64_t stride, int count) {
  constexpr int kTogether = 4;
  float sum = 0.f;
  for (int first = 0; first < count; first += kTogether, slot += kTogether * stride) {
    uint32_t bits[kTogether];
    bool waiting;
    do {
      waiting = false;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        bits[i] = first + i < count ? peek(slot + i * stride) : 0;
        waiting |= bits[i] == kEmpty;
      }
    } while (waiting);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= count) break;
      clear(slot + i * stride);
      sum += __uint_as_float(bits[i]);
    }
  }
  return sum;
}

__device__ inline void clear4(float* slots) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %1, %1, %1};" ::"l"(slots), "r"(kEmpty) : "memory");
}

__device__ inline uint4 peek4(const float* slots) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(slots)
               : "memory");
  return v;
}

// Receives up to `kCount` times four words, `stride` apart, that are awaited together; zeros beyond `count`.
template <int kCount>
__device__ inline void receive4(float* slots, int64_t stride, int count, float4 (&values)[kCount]) {
  uint4 words[kCount];
  bool waiting;
  do {
    waiting = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      words[i] = i < count ? peek4(slots + i * stride) : uint4{};
      waiting |= words[i].x == kEmpty || words[i].y == kEmpty || words[i].z == kEmpty || words[i].w == kEmpty;
    }
  } while (waiting);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) clear4(slots + i * stride);
    values[i] = {__uint_as_float(words[i].x), __uint_as_float(words[i].y), __uint_as_float(words[i].z),
                 __uint_as_float(words[i].w)};
  }
}

// ---- the tensor cores: d (16 x 8) += a (16 x 16) b (16 x 8), sums in float32

template <typename T>
__device__ inline void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1);

template <>
__device__ inline void mma<__half>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                   uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<__nv_bfloat16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace decdec::cuda
