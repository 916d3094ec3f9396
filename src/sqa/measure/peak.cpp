// What the processor's own arithmetic reaches: chains of multiply-adds that wait for nothing but themselves.
//
// Each returns the FLOPs that one call does on each thread; the caller takes the time. A chain is one vector register;
// there are enough of them to hide the latency of an instruction on every processor in use, and few enough to stay in
// registers.

#include <cstdint>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kFloats = kBytes / 4;
constexpr int kChains = kBytes == 64 ? 24 : 12;  // of 32 registers, or 16

typedef float Vector __attribute__((vector_size(kBytes)));

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

static int64_t fp32(int64_t turns, float* sink) {
  Vector chain[kChains];
  Vector factor = Vector{} + 0.999f, term = Vector{} + 0.001f;
  for (auto& x : chain) x = Vector{};
  for (int64_t i = 0; i < turns; ++i)
    _Pragma("GCC unroll 32") for (auto& x : chain) x = x * factor + term;  // one instruction under -ffp-contract=fast
  for (auto& x : chain)
    for (int i = 0; i < kFloats; ++i) *sink += x[i];  // each is wanted, or it would not be computed
  return turns * kChains * kFloats * 2;
}

static int64_t bf16(int64_t turns, float* sink) {
#ifdef __AVX512BF16__
  __m512 chain[kChains];
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00), b = (__m512bh)_mm512_set1_epi16(0x3c00);
  for (auto& x : chain) x = _mm512_setzero_ps();
  for (int64_t i = 0; i < turns; ++i)
    _Pragma("GCC unroll 32") for (auto& x : chain) x = _mm512_dpbf16_ps(x, a, b);
  for (auto& x : chain) *sink += _mm512_reduce_add_ps(x);
  return turns * kChains * kFloats * 4;
#else
  return 0;
#endif
}

// FLOPs of all threads together; 0 where the processor has no such instruction.
extern "C" int64_t sqa_peak(int bfloat16, int64_t turns, int threads) {
  int64_t flops = 0;
  float sink = 0;
#pragma omp parallel num_threads(threads) reduction(+ : flops, sink)
  flops += bfloat16 ? bf16(turns, &sink) : fp32(turns, &sink);
  return sink == 1234.5f ? -1 : flops;
}
