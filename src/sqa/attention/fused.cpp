// Attention on CPU for small heads, in fp32 whatever the input type. Compiled by fused.py on first use.
//
// Forward. One task is a block of queries of one KV head: all query heads that share it are handled together, so each
// tile of keys and values is converted and transposed once for all of them. Scores never leave the first-level cache,
// and of a tile only the columns, a vector wide, are computed that one query of eight sees. Softmax is taken online, in
// base 2 (arXiv 2205.14135, 2307.08691).
//
// Vectors are GCC's and Clang's extension, so one source serves every processor.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// a vector is one register: GCC takes wider ones apart lane by lane, 12 times as slow with AVX2
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
constexpr int KEYS = 4 * LANES, ROWS = 8;
constexpr float LOWEST = -1e30f, LOG2E = 1.44269504f;
constexpr int32_t NUMBERS[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline Vec load(const uint16_t* p) {  // bfloat16
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    Halves h; std::memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, IntVec) << 16);
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec all(float x) { return x - Vec{}; }
inline IntVec count_from(int x) { IntVec v; std::memcpy(&v, NUMBERS, sizeof v); return v + x; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) { uint32_t bits = uint32_t(x) << 16; float f; std::memcpy(&f, &bits, 4); return f; }
inline void from_float(float x, float* p) { *p = x; }
inline void from_float(float x, uint16_t* p) {  // bfloat16, to nearest even
    uint32_t bits; std::memcpy(&bits, &x, 4);
    *p = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 2^x for x <= 0 to 2 units in the last place; below 2^-126 it stays there. NaN stays NaN, by the order of the operands
inline Vec exp2_of(Vec x) {
    x = larger(all(-126.f), x);
    const Vec shift = all(12582912.f);  // adding 1.5 * 2^23 leaves the nearest whole number in the low bits
    Vec t = x + shift, f = x - (t - shift);
    Vec p = all(1.5403530e-4f);
    p = p * f + 1.3333558e-3f; p = p * f + 9.6181291e-3f; p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f; p = p * f + 6.9314718e-1f; p = p * f + 1.f;
    return (Vec)((IntVec)p + ((IntVec)t << 23));
}

// all lanes joined; in vectors of four, since a loop over lanes is not always turned into shuffles
template <class F> inline float fold(Vec v, F join) {
    Four f[LANES / 4]; std::memcpy(f, &v, sizeof f);
    for (int i = 1; i < LANES / 4; i++) f[0] = join(f[0], f[i]);
    return join(join(f[0][0], f[0][1]), join(f[0][2], f[0][3]));
}
inline float sum_of(Vec v) { return fold(v, [](auto a, auto b) { return a + b; }); }
inline float max_of(Vec v) { return fold(v, [](auto a, auto b) { return a > b ? a : b; }); }

// strides in elements of (batch, token, head)
struct Strides { int64_t b, t, h; };
struct Sizes { int64_t batch, length, heads, kv_heads, head_dim, keys; };

// keys that some of the queries from .. to - 1 see, and those that all of them see
struct Seen { int32_t some_low, some_high, all_low, all_high; };
inline Seen seen_by(const int32_t* low, const int32_t* high, int64_t from, int64_t to) {
    const auto lows = std::minmax_element(low + from, low + to), highs = std::minmax_element(high + from, high + to);
    return {*lows.first, *highs.second, *lows.second, *highs.first};
}

// of the tile of keys from k0: the first key and the number of the columns that some of the queries see, and whether
// all of them see all of these
struct Columns {
    int first, count;
    bool whole;
    Columns(const Seen& seen, int32_t k0) {
        const int past = (std::min(seen.some_high - k0, KEYS) + LANES - 1) / LANES * LANES;
        first = std::max(seen.some_low - k0, 0) / LANES * LANES;
        count = (past - first) / LANES;
        whole = seen.all_low <= k0 + first && seen.all_high >= k0 + past;
    }
};
typedef float (*Rows)[KEYS];

// c[i][j] (+)= sum over x of a[i * step_i + x * step_x] * b[x][j], for COLUMNS * LANES j
template <int SIZE, int TERMS, int COLUMNS, bool ADD>
inline void product(float (*c)[KEYS], const float* a, int step_i, int step_x, const float (*b)[KEYS]) {
    constexpr int HIGH = COLUMNS > 2 ? 4 : 8;  // rows at a time: at most 16 sums, which stay in registers
    for (int i = 0; i < SIZE; i += HIGH) {
        Vec sums[HIGH][COLUMNS] = {};
        if (ADD)
            for (int r = 0; r < HIGH; r++)
                for (int w = 0; w < COLUMNS; w++) sums[r][w] = load(&c[i + r][w * LANES]);
#pragma GCC unroll 2
        for (int x = 0; x < TERMS; x++)
            for (int w = 0; w < COLUMNS; w++) {
                Vec right = load(&b[x][w * LANES]);
                for (int r = 0; r < HIGH; r++) sums[r][w] += a[(i + r) * step_i + x * step_x] * right;
            }
        for (int r = 0; r < HIGH; r++)
            for (int w = 0; w < COLUMNS; w++) store(&c[i + r][w * LANES], sums[r][w]);
    }
}

// ROWS queries against COLUMNS * LANES keys, of which query r sees lows[r] .. highs[r] - 1
template <int D, int COLUMNS>
void attend_tile(const float (*__restrict kt)[KEYS], const float (*__restrict vt)[D],
                 const float* __restrict queries, float* __restrict acc, float* __restrict highest,
                 Vec* __restrict total, const int32_t* lows, const int32_t* highs, bool whole) {
    constexpr int SPACE = ROWS > LANES ? ROWS : LANES;
    alignas(64) float s[ROWS][KEYS], before[SPACE] = {}, tops[SPACE] = {}, shrink[SPACE];
    product<ROWS, D, COLUMNS, false>(s, queries, D, 1, kt);
    for (int r = 0; r < ROWS; r++) {
        Vec top = all(highest[r]);
        for (int c = 0; c < COLUMNS * LANES; c += LANES) {
            Vec x = load(&s[r][c]);
            if (!whole) {
                const IntVec j = count_from(c);
                x = (j >= lows[r]) & (j < highs[r]) ? x : all(LOWEST);
                store(&s[r][c], x);
            }
            top = larger(top, x);
        }
        before[r] = highest[r];
        highest[r] = tops[r] = max_of(top);
    }
    for (int r = 0; r < ROWS; r += LANES) store(shrink + r, exp2_of(load(before + r) - load(tops + r)));
    for (int r = 0; r < ROWS; r++) {
        Vec sum = total[r] * shrink[r];
        for (int c = 0; c < COLUMNS * LANES; c += LANES) {
            Vec x = load(&s[r][c]), p = exp2_of(x - tops[r]);
            if (!whole) p = x == LOWEST ? Vec{} : p;
            store(&s[r][c], p);
            sum += p;
        }
        total[r] = sum;
    }
    constexpr int WIDE = D < 32 ? 1 : 2;  // vectors at a time: ROWS * WIDE sums stay in registers
    for (int column = 0; column < D; column += WIDE * LANES) {
        Vec sums[ROWS][WIDE];
        for (int r = 0; r < ROWS; r++)
            for (int w = 0; w < WIDE; w++) sums[r][w] = load(acc + r * D + column + w * LANES) * shrink[r];
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS * LANES; j++)
            for (int w = 0; w < WIDE; w++) {
                Vec value = load(&vt[j][column + w * LANES]);
                for (int r = 0; r < ROWS; r++) sums[r][w] += s[r][j] * value;
            }
        for (int r = 0; r < ROWS; r++)
            for (int w = 0; w < WIDE; w++) store(acc + r * D + column + w * LANES, sums[r][w]);
    }
}

// b[d][j .. j + 3] = a[0 .. 3][d]
template <int D> inline void turn(const float (*a)[D], float (*b)[KEYS], int j) {
    for (int d = 0; d < D; d++) {
        const Four column = {a[0][d], a[1][d], a[2][d], a[3][d]};
        std::memcpy(&b[d][j], &column, sizeof column);
    }
}

// Row r is query q0 + r / shared of head r % shared: so the rows that go together see nearly the same keys, and one query
// at the end of a cache fills no more rows than it has heads.
template <int D, class T>
void attend(const T* __restrict q, const T* __restrict k, const T* __restrict v, T* __restrict out,
            float* __restrict lse, const int32_t* low, const int32_t* high, Strides sq, Strides sk, Strides sv,
            int64_t keys, int heads, int shared, int64_t q0, int64_t q1, float scale) {
    const int count = int(q1 - q0) * shared, rows = (count + ROWS - 1) / ROWS * ROWS;
    static thread_local std::vector<Vec> sums;
    static thread_local std::vector<float> memory;
    sums.assign(rows, Vec{});
    memory.assign(size_t(rows) * (2 * D + 1), 0);
    Vec* total = sums.data();  // a sum for each lane
    float *queries = memory.data(), *acc = queries + rows * D, *highest = acc + rows * D;
    std::fill_n(highest, rows, LOWEST);
    const auto query_of = [=](int row) { return q0 + std::min(row, count - 1) / shared; };  // past the end: the last
    for (int row = 0; row < count; row++)
        for (int d = 0; d < D; d++)
            queries[row * D + d] = to_float(q[query_of(row) * sq.t + row % shared * sq.h + d]) * scale;
    const int32_t from = *std::min_element(low + q0, low + q1), to = *std::max_element(high + q0, high + q1);
    std::vector<Seen> seen;
    for (int row = 0; row < rows; row += ROWS)
        seen.push_back(seen_by(low, high, query_of(row), query_of(row + ROWS - 1) + 1));
    alignas(64) float kt[D][KEYS], vt[KEYS][D], four[4][D];
    for (int32_t k0 = from / KEYS * KEYS; k0 < to; k0 += KEYS) {
        for (int j = 0; j < KEYS; j++) {  // keys past the end repeat the last one: nothing sees them
            const int64_t at = std::min(k0 + j, int32_t(keys) - 1);
            for (int d = 0; d < D; d += LANES) {
                store(&four[j % 4][d], load(k + at * sk.t + d));
                store(&vt[j][d], load(v + at * sv.t + d));
            }
            if (j % 4 == 3) turn<D>(four, kt, j - 3);
        }
        for (int row = 0; row < rows; row += ROWS) {
            const Columns c(seen[row / ROWS], k0);
            if (c.count <= 0) continue;
            int32_t lows[ROWS], highs[ROWS];
            for (int r = 0; r < ROWS && !c.whole; r++) {
                lows[r] = low[query_of(row + r)] - k0 - c.first; highs[r] = high[query_of(row + r)] - k0 - c.first;
            }
            constexpr decltype(&attend_tile<D, 1>) OF_COLUMNS[] = {
                attend_tile<D, 1>, attend_tile<D, 2>, attend_tile<D, 3>, attend_tile<D, 4>};
            OF_COLUMNS[c.count - 1](Rows(&kt[0][c.first]), vt + c.first, queries + row * D, acc + row * D,
                                    highest + row, total + row, lows, highs, c.whole);
        }
    }
    for (int row = 0; row < count; row++) {
        const float sum = sum_of(total[row]), share = sum > 0 ? 1 / sum : 0;
        const int64_t to_row = query_of(row) * heads + row % shared;
        for (int d = 0; d < D; d++) from_float(acc[row * D + d] * share, out + to_row * D + d);
        lse[to_row] = (highest[row] + std::log2(sum)) * 0.69314718f;
    }
}

// tensors: q, k, v, out, lse, low, high
template <int D, class T>
void forward(void* const* tensors, const int64_t* s, const Sizes& n, float scale, int threads) {
    const T *q = (const T*)tensors[0], *k = (const T*)tensors[1], *v = (const T*)tensors[2];
    T* out = (T*)tensors[3];
    float* lse = (float*)tensors[4];
    const int32_t *low = (const int32_t*)tensors[5], *high = (const int32_t*)tensors[6];
    const Strides sq{s[0], s[1], s[2]}, sk{s[3], s[4], s[5]}, sv{s[6], s[7], s[8]};
    const int64_t heads = n.heads, shared = heads / n.kv_heads, rows = n.batch * n.kv_heads;
    const int64_t block = std::clamp<int64_t>(512 / shared, 64, 512);  // as many rows a task, whatever the variant
    const int64_t blocks = (n.length + block - 1) / block;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < rows * blocks; task++) {
        const int64_t q0 = (blocks - 1 - task / rows) * block, q1 = std::min(q0 + block, n.length);  // longest first
        const int64_t b = task % rows / n.kv_heads, h = task % n.kv_heads;
        attend<D, T>(q + b * sq.b + h * shared * sq.h, k + b * sk.b + h * sk.h, v + b * sv.b + h * sv.h,
                     out + (b * n.length * heads + h * shared) * D, lse + b * n.length * heads + h * shared,
                     low + b * n.length, high + b * n.length, sq, sk, sv, n.keys, int(heads), int(shared), q0, q1,
                     scale * LOG2E);
    }
}

// Backward. One task is one query head of one row: it walks the tiles of keys, and for each the blocks of queries that
// see it, so every score is computed once. Gradients of the queries gather in fp32 in the task's own memory; those of
// keys and values go, per query head, to `partial` and are summed over the heads that share them at the end. Each
// number has one writer and one order of summing, so results are the same bits for any number of threads.
template <class T> struct Backward {
    const T *q, *k, *v, *grad, *out;
    const float* lse;
    const int32_t *low, *high;
    T *dq, *dk, *dv;
    float* partial;  // 2 (dk, dv), batch, heads, length, head_dim
    Strides sq, sk, sv, sg;
    Sizes n;
    float scale;
};

constexpr int BLOCK = 16;  // queries at a time

template <int D> struct alignas(64) Tile { float keys[KEYS][D], kt[D][KEYS], vt[D][KEYS], dkt[D][KEYS], dvt[D][KEYS]; };

// BLOCK queries against COLUMNS * LANES keys of a tile, from `first`, of which query r sees lows[r] .. highs[r] - 1
template <int D, int COLUMNS>
void backward_of_tile(Tile<D>& tile, int first, const float* __restrict queries, const float* __restrict grads,
                      float* __restrict dq, const float* lse, const float* delta, const int32_t* lows,
                      const int32_t* highs, bool whole) {
    alignas(64) float p[BLOCK][KEYS], ds[BLOCK][KEYS];
    product<BLOCK, D, COLUMNS, false>(p, queries, D, 1, Rows(&tile.kt[0][first]));
    product<BLOCK, D, COLUMNS, false>(ds, grads, D, 1, Rows(&tile.vt[0][first]));
    for (int r = 0; r < BLOCK; r++)
        for (int w = 0; w < COLUMNS * LANES; w += LANES) {
            Vec x = load(&p[r][w]) - lse[r];
            if (!whole) {
                const IntVec j = count_from(w);
                x = (j >= lows[r]) & (j < highs[r]) ? x : all(LOWEST);
            }
            Vec weight = x < -126.f ? Vec{} : exp2_of(x);
            store(&p[r][w], weight);
            store(&ds[r][w], weight * (load(&ds[r][w]) - delta[r]));
        }
    product<D, BLOCK, COLUMNS, true>(Rows(&tile.dvt[0][first]), grads, 1, D, p);
    product<D, BLOCK, COLUMNS, true>(Rows(&tile.dkt[0][first]), queries, 1, D, ds);
    constexpr int WIDE = D < 32 ? 1 : 2, HIGH = BLOCK / WIDE;  // 16 sums stay in registers
    for (int r0 = 0; r0 < BLOCK; r0 += HIGH)
        for (int column = 0; column < D; column += WIDE * LANES) {
            Vec sums[HIGH][WIDE];
            float* to_row = dq + r0 * D + column;
            for (int r = 0; r < HIGH; r++)
                for (int w = 0; w < WIDE; w++) sums[r][w] = load(to_row + r * D + w * LANES);
#pragma GCC unroll 2
            for (int j = 0; j < COLUMNS * LANES; j++)
                for (int w = 0; w < WIDE; w++) {
                    Vec key = load(&tile.keys[first + j][column + w * LANES]);
                    for (int r = 0; r < HIGH; r++) sums[r][w] += ds[r0 + r][j] * key;
                }
            for (int r = 0; r < HIGH; r++)
                for (int w = 0; w < WIDE; w++) store(to_row + r * D + w * LANES, sums[r][w]);
        }
}

inline int64_t padded_to_blocks(int64_t length) { return (length + BLOCK - 1) / BLOCK * BLOCK; }

template <int D, class T>
void backward_of_head(const Backward<T>& a, int64_t b, int64_t h, float* memory) {
    const int64_t length = a.n.length, heads = a.n.heads, padded = padded_to_blocks(length), blocks = padded / BLOCK;
    float *queries = memory, *grads = queries + padded * D, *dq = grads + padded * D, *lse = dq + padded * D,
          *delta = lse + padded;
    const int32_t *low = a.low + b * length, *high = a.high + b * length;
    std::vector<Seen> seen;
    for (int64_t i = 0; i < length; i += BLOCK) seen.push_back(seen_by(low, high, i, std::min(i + BLOCK, length)));
    std::fill_n(dq, padded * D, 0.f);
    for (int64_t i = 0; i < length; i++) {  // rows past the end stay zeros and add nothing
        const int64_t row = (b * length + i) * heads + h;
        const T* q = a.q + b * a.sq.b + i * a.sq.t + h * a.sq.h;
        const T* grad = a.grad + b * a.sg.b + i * a.sg.t + h * a.sg.h;
        Vec sum = {};
        for (int d = 0; d < D; d += LANES) {
            const Vec g = load(grad + d);
            store(queries + i * D + d, load(q + d) * (a.scale * LOG2E));
            store(grads + i * D + d, g);
            sum += g * load(a.out + row * D + d);
        }
        delta[i] = sum_of(sum);
        lse[i] = a.lse[row] * LOG2E;
    }
    Tile<D> tile;
    const int64_t kv = h / (heads / a.n.kv_heads);
    const T *k = a.k + b * a.sk.b + kv * a.sk.h, *v = a.v + b * a.sv.b + kv * a.sv.h;
    float* dk = a.partial + (b * heads + h) * length * D;
    float* dv = dk + a.n.batch * heads * length * D;
    for (int32_t k0 = 0; k0 < length; k0 += KEYS) {
        const int here = int(std::min<int64_t>(length - k0, KEYS));
        for (int j = 0; j < KEYS; j++) {  // keys past the end repeat the last one: nothing sees them
            const int64_t at = std::min<int64_t>(k0 + j, length - 1);
            for (int d = 0; d < D; d++) {
                tile.keys[j][d] = tile.kt[d][j] = to_float(k[at * a.sk.t + d]);
                tile.vt[d][j] = to_float(v[at * a.sv.t + d]);
            }
        }
        std::memset(tile.dkt, 0, sizeof tile.dkt); std::memset(tile.dvt, 0, sizeof tile.dvt);
        for (int64_t n = 0; n < blocks; n++) {
            const Columns c(seen[n], k0);
            if (c.count <= 0) continue;
            const int64_t row = n * BLOCK;
            int32_t lows[BLOCK], highs[BLOCK];
            for (int r = 0; r < BLOCK && !c.whole; r++) {  // rows past the end repeat the last one
                const int64_t at = std::min(row + r, length - 1);
                lows[r] = low[at] - k0 - c.first; highs[r] = high[at] - k0 - c.first;
            }
            constexpr decltype(&backward_of_tile<D, 1>) OF_COLUMNS[] = {
                backward_of_tile<D, 1>, backward_of_tile<D, 2>, backward_of_tile<D, 3>, backward_of_tile<D, 4>};
            OF_COLUMNS[c.count - 1](tile, c.first, queries + row * D, grads + row * D, dq + row * D, lse + row,
                                    delta + row, lows, highs, c.whole);
        }
        for (int j = 0; j < here; j++)
            for (int d = 0; d < D; d++) {
                dk[(k0 + j) * D + d] = tile.dkt[d][j] * (1 / LOG2E);  // the queries carry scale * log2(e)
                dv[(k0 + j) * D + d] = tile.dvt[d][j];
            }
    }
    for (int64_t i = 0; i < length; i++)
        for (int d = 0; d < D; d++)
            from_float(dq[i * D + d] * a.scale, a.dq + ((b * length + i) * heads + h) * D + d);
}

// tensors: q, k, v, grad, out, lse, low, high, dq, dk, dv, partial
template <int D, class T>
void backward(void* const* t, const int64_t* s, const Sizes& n, float scale, int threads) {
    const Backward<T> a{(T*)t[0], (T*)t[1], (T*)t[2], (T*)t[3], (T*)t[4], (float*)t[5], (int32_t*)t[6], (int32_t*)t[7],
                        (T*)t[8], (T*)t[9], (T*)t[10], (float*)t[11], {s[0], s[1], s[2]}, {s[3], s[4], s[5]},
                        {s[6], s[7], s[8]}, {s[9], s[10], s[11]}, n, scale};
    const int64_t shared = n.heads / n.kv_heads, dk_to_dv = n.batch * n.heads * n.length * D;
#pragma omp parallel num_threads(threads)
    {
        std::vector<Vec> memory(padded_to_blocks(n.length) * (3 * D + 2) / LANES);  // of vectors: aligned
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < n.batch * n.heads; task++)
            backward_of_head<D>(a, task / n.heads, task % n.heads, (float*)memory.data());
#pragma omp for
        for (int64_t token = 0; token < n.batch * n.length; token++)
            for (int64_t kv = 0; kv < n.kv_heads; kv++)
                for (int d = 0; d < D; d += LANES) {
                    const int64_t b = token / n.length, first = b * n.heads + kv * shared;
                    const float* from = a.partial + (first * n.length + token % n.length) * D + d;
                    Vec dk = {}, dv = {};
                    for (int64_t g = 0; g < shared; g++, from += n.length * D) {
                        dk += load(from);
                        dv += load(from + dk_to_dv);
                    }
                    const int64_t to = (token * n.kv_heads + kv) * D + d;
                    for (int i = 0; i < LANES; i++) {
                        from_float(dk[i], a.dk + to + i);
                        from_float(dv[i], a.dv + to + i);
                    }
                }
    }
}

typedef void Function(void* const*, const int64_t*, const Sizes&, float, int);
#define FOR_HEAD_DIMS(F, T) {F<16, T>, F<32, T>, F<64, T>, F<128, T>}
constexpr Function *FORWARD[2][4] = {FOR_HEAD_DIMS(forward, float), FOR_HEAD_DIMS(forward, uint16_t)},
                   *BACKWARD[2][4] = {FOR_HEAD_DIMS(backward, float), FOR_HEAD_DIMS(backward, uint16_t)};

int call(Function* const (&functions)[2][4], int is_bfloat16, void* const* tensors, const int32_t* low,
         const int32_t* high, const int64_t* strides, const int64_t* sizes, float scale, int threads) {
    const Sizes n{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
    for (int64_t i = 0; i < n.batch * n.length; i++)
        if (low[i] < 0 || high[i] > n.keys) return 1;
    for (int i = 0; i < 4; i++)
        if (n.head_dim == 16 << i) {
            functions[is_bfloat16][i](tensors, strides, n, scale, threads);
            return 0;
        }
    return 2;
}

}  // namespace

// Both return 0, or 1 for a range of keys outside 0 .. Tk, or 2 for a D they do not have. All else fused.py checks.

// tensors: q (B, T, Hq, D), k, v (B, Tk, Hkv, D), then results, contiguous: out (B, T, Hq, D), log-sum-exp fp32 (B, T,
// Hq); then low, high int32 (B, T): query i of row b sees keys low[b][i] .. high[b][i] - 1. strides: of q, k and v,
// whose last axis is contiguous. sizes: B, T, Hq, Hkv, D, Tk.
extern "C" int sqa_attention_forward(int is_bfloat16, void* const* tensors, const int64_t* strides,
                                     const int64_t* sizes, float scale, int threads) {
    return call(FORWARD, is_bfloat16, tensors, (int32_t*)tensors[5], (int32_t*)tensors[6], strides, sizes, scale,
                threads);
}

// tensors: q, k, v, grad (B, T, Hq, D), then as the forward wrote or took them out, log-sum-exp, low, high, then
// results, contiguous: dq, dk, dv; then scratch fp32 (2, B, Hq, T, D). strides: of q, k, v and grad. Tk must be T.
extern "C" int sqa_attention_backward(int is_bfloat16, void* const* tensors, const int64_t* strides,
                                      const int64_t* sizes, float scale, int threads) {
    return call(BACKWARD, is_bfloat16, tensors, (int32_t*)tensors[6], (int32_t*)tensors[7], strides, sizes, scale,
                threads);
}
