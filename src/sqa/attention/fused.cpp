// Attention forward on CPU for small heads, in fp32 whatever the input type. Compiled by fused.py on first use.
//
// One task is a block of queries of one KV head: all query heads that share it are handled together, so each tile of
// keys and values is converted and transposed once for all of them. Scores never leave the first-level cache, and a
// tile that no query of eight sees is skipped. Softmax is taken online, in base 2 (arXiv 2205.14135, 2307.08691).
//
// GCC's and Clang's vector extension spells 16 floats; the compiler splits them for narrower machines.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
constexpr int LANES = 16, KEYS = 64, ROWS = 8;
constexpr float LOWEST = -1e30f;

inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec all(float x) { return x - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) { uint32_t bits = uint32_t(x) << 16; float f; std::memcpy(&f, &bits, 4); return f; }
inline void from_float(float x, float* p) { *p = x; }
inline void from_float(float x, uint16_t* p) {  // bfloat16, to nearest even
    uint32_t bits; std::memcpy(&bits, &x, 4);
    *p = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 2^x for x <= 0 to 2 units in the last place; below 2^-126 it stays there
inline Vec exp2_of(Vec x) {
    x = larger(x, all(-126.f));
    const Vec shift = all(12582912.f);  // adding 1.5 * 2^23 leaves the nearest whole number in the low bits
    Vec t = x + shift, f = x - (t - shift);
    Vec p = all(1.5403530e-4f);
    p = p * f + 1.3333558e-3f; p = p * f + 9.6181291e-3f; p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f; p = p * f + 6.9314718e-1f; p = p * f + 1.f;
    return (Vec)((IntVec)p + ((IntVec)t << 23));
}

// lanes folded in halves, which the compiler turns into shuffles
template <class F> inline float fold(Vec v, F join) {
    float a[LANES]; store(a, v);
    for (int w = LANES / 2; w; w /= 2) for (int i = 0; i < w; i++) a[i] = join(a[i], a[i + w]);
    return a[0];
}
inline float sum_of(Vec v) { return fold(v, [](float a, float b) { return a + b; }); }
inline float max_of(Vec v) { return fold(v, [](float a, float b) { return a > b ? a : b; }); }

// strides in elements of (batch, token, head)
struct Strides { int64_t b, t, h; };

template <int D, class T>
void attend(const T* __restrict q, const T* __restrict k, const T* __restrict v, T* __restrict out, float* __restrict lse, const int32_t* low, const int32_t* high,
            Strides sq, Strides sk, Strides sv, int64_t length, int heads, int shared, int64_t q0, int64_t q1, float scale) {
    const int count = int(q1 - q0), padded = (count + ROWS - 1) / ROWS * ROWS;
    static thread_local std::vector<float> memory;
    memory.resize(size_t(shared) * padded * (2 * D + 2));
    float* __restrict queries = memory.data();
    float* __restrict acc = queries + size_t(shared) * padded * D;
    float* __restrict highest = acc + size_t(shared) * padded * D;
    float* __restrict total = highest + size_t(shared) * padded;
    for (int g = 0; g < shared; g++)
        for (int i = 0; i < padded; i++) {
            int64_t row = int64_t(g) * padded + i;
            highest[row] = LOWEST; total[row] = 0;
            for (int d = 0; d < D; d++) {
                acc[row * D + d] = 0;
                queries[row * D + d] = i < count ? to_float(q[(q0 + i) * sq.t + g * sq.h + d]) * scale : 0;
            }
        }
    int32_t from = low[q0], to = high[q0];
    for (int64_t i = q0; i < q1; i++) { from = low[i] < from ? low[i] : from; to = high[i] > to ? high[i] : to; }
    alignas(64) float kt[D][KEYS], vt[KEYS][D], s[ROWS][KEYS];
    for (int32_t k0 = from / KEYS * KEYS; k0 < to; k0 += KEYS) {
        const int here = int(length - k0 < KEYS ? length - k0 : KEYS);
        for (int j = 0; j < KEYS; j++)
            for (int d = 0; d < D; d++) {
                kt[d][j] = j < here ? to_float(k[(k0 + j) * sk.t + d]) : 0;
                vt[j][d] = j < here ? to_float(v[(k0 + j) * sv.t + d]) : 0;
            }
        for (int i = 0; i < padded; i += ROWS) {
            int32_t lows[ROWS], highs[ROWS];
            bool any = false, whole = true;
            for (int r = 0; r < ROWS; r++) {  // rows past the end repeat the last one
                int64_t at = q0 + (i + r < count ? i + r : count - 1);
                lows[r] = low[at] - k0; highs[r] = high[at] - k0;
                any |= lows[r] < KEYS && highs[r] > 0;
                whole &= lows[r] <= 0 && highs[r] >= KEYS;
            }
            if (!any) continue;
            for (int g = 0; g < shared; g++) {
                const int64_t row = int64_t(g) * padded + i;
                for (int half = 0; half < ROWS; half += 4) {
                    Vec sums[4][KEYS / LANES] = {};
                    const float* qs = queries + (row + half) * D;
#pragma GCC unroll 2
                    for (int d = 0; d < D; d++)
                        for (int c = 0; c < KEYS / LANES; c++) {
                            Vec key = load(&kt[d][c * LANES]);
                            for (int r = 0; r < 4; r++) sums[r][c] += qs[r * D + d] * key;
                        }
                    for (int r = 0; r < 4; r++)
                        for (int c = 0; c < KEYS / LANES; c++) store(&s[half + r][c * LANES], sums[r][c]);
                }
                for (int r = 0; r < ROWS; r++) {
                    if (!whole)
                        for (int j = 0; j < KEYS; j++) s[r][j] = j >= lows[r] && j < highs[r] ? s[r][j] : LOWEST;
                    Vec x[KEYS / LANES];
                    for (int c = 0; c < KEYS / LANES; c++) x[c] = load(&s[r][c * LANES]);
                    float before = highest[row + r];
                    float top = max_of(larger(larger(x[0], x[1]), larger(x[2], x[3])));
                    if (top > before) {
                        float shrink = before == LOWEST ? 0.f : std::exp2(before - top);
                        highest[row + r] = top; total[row + r] *= shrink;
                        for (int d = 0; d < D; d++) acc[(row + r) * D + d] *= shrink;
                    }
                    top = highest[row + r];
                    Vec sum = {};
                    for (int c = 0; c < KEYS / LANES; c++) {
                        Vec p = exp2_of(x[c] - top);
                        if (!whole) p = x[c] > LOWEST ? p : Vec{};
                        store(&s[r][c * LANES], p);
                        sum += p;
                    }
                    total[row + r] += sum_of(sum);
                }
                constexpr int WIDE = D < 32 ? 1 : 2;  // columns of 16 at a time: ROWS * WIDE sums stay in registers
                for (int column = 0; column < D; column += WIDE * LANES) {
                    Vec sums[ROWS][WIDE];
                    float* to_row = acc + row * D + column;
                    for (int r = 0; r < ROWS; r++)
                        for (int w = 0; w < WIDE; w++) sums[r][w] = load(to_row + r * D + w * LANES);
#pragma GCC unroll 2
                    for (int j = 0; j < KEYS; j++)
                        for (int w = 0; w < WIDE; w++) {
                            Vec value = load(&vt[j][column + w * LANES]);
                            for (int r = 0; r < ROWS; r++) sums[r][w] += s[r][j] * value;
                        }
                    for (int r = 0; r < ROWS; r++)
                        for (int w = 0; w < WIDE; w++) store(to_row + r * D + w * LANES, sums[r][w]);
                }
            }
        }
    }
    for (int g = 0; g < shared; g++)
        for (int i = 0; i < count; i++) {
            int64_t row = int64_t(g) * padded + i;
            float share = total[row] > 0 ? 1 / total[row] : 0;
            T* to_out = out + ((q0 + i) * heads + g) * D;
            for (int d = 0; d < D; d++) from_float(acc[row * D + d] * share, to_out + d);
            lse[(q0 + i) * heads + g] = (highest[row] + std::log2(total[row])) * 0.69314718f;
        }
}

template <int D, class T>
void run(const T* q, const T* k, const T* v, T* out, float* lse, const int32_t* low, const int32_t* high,
         const int64_t* strides, int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, float scale, int threads) {
    const Strides sq{strides[0], strides[1], strides[2]}, sk{strides[3], strides[4], strides[5]},
        sv{strides[6], strides[7], strides[8]};
    const int shared = int(heads / kv_heads);
    const int64_t block = shared > 8 ? 64 : 128, blocks = (length + block - 1) / block, tasks = batch * kv_heads * blocks;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t n = blocks - 1 - task / (batch * kv_heads), rest = task % (batch * kv_heads);  // longest first
        const int64_t b = rest / kv_heads, h = rest % kv_heads, q0 = n * block, q1 = q0 + block < length ? q0 + block : length;
        attend<D, T>(q + b * sq.b + h * shared * sq.h, k + b * sk.b + h * sk.h, v + b * sv.b + h * sv.h,
                     out + (b * length * heads + h * shared) * D, lse + b * length * heads + h * shared,
                     low + b * length, high + b * length, sq, sk, sv, length, int(heads), shared, q0, q1,
                     scale * 1.44269504f);
    }
}

template <class T>
int dispatch(int64_t head_dim, const void* q, const void* k, const void* v, void* out, float* lse, const int32_t* low,
             const int32_t* high, const int64_t* strides, int64_t batch, int64_t length, int64_t heads,
             int64_t kv_heads, float scale, int threads) {
#define CASE(D) case D: run<D, T>((const T*)q, (const T*)k, (const T*)v, (T*)out, lse, low, high, strides, batch, \
                                  length, heads, kv_heads, scale, threads); return 0;
    switch (head_dim) { CASE(16) CASE(32) CASE(64) CASE(128) }
#undef CASE
    return 1;
}

}  // namespace

// q (B, T, Hq, D), k and v (B, T, Hkv, D) with the given strides and contiguous last axis -> out (B, T, Hq, D) and
// log-sum-exp (B, T, Hq), both contiguous. Query i of row b sees keys low[b][i] .. high[b][i] - 1.
extern "C" int sqa_attention_forward(int is_bfloat16, int64_t head_dim, const void* q, const void* k, const void* v,
                                     void* out, float* lse, const int32_t* low, const int32_t* high,
                                     const int64_t* strides, int64_t batch, int64_t length, int64_t heads,
                                     int64_t kv_heads, float scale, int threads) {
    auto dispatched = is_bfloat16 ? dispatch<uint16_t> : dispatch<float>;
    return dispatched(head_dim, q, k, v, out, lse, low, high, strides, batch, length, heads, kv_heads, scale, threads);
}
