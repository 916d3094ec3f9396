// Attention on CPU for small heads. Compiled by fused.py on first use, which checks every tensor; nothing is allocated
// here and nothing throws.
//
// Sums, softmax and everything that is carried from tile to tile are fp32. So are the products of fp32 tensors. Those of
// bfloat16 tensors multiply pairs of bfloat16 where the processor can (AVX-512-BF16, twice as many at a time), else the
// same numbers in fp32. Softmax is taken online, in base 2 (arXiv 2205.14135, 2307.08691).
//
// Vectors are GCC's and Clang's extension, so one source serves every processor.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

// a vector is one register: GCC takes wider ones apart lane by lane, 12 times as slow with AVX2
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef uint16_t Bfloat16;
typedef uint32_t Pair;  // two bfloat16, the first in the low half
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef Pair PairVec __attribute__((vector_size(4 * LANES)));
typedef Bfloat16 Halves __attribute__((vector_size(2 * LANES)));
constexpr int KEYS = 4 * LANES, ROWS = 8;
constexpr int MANY = 256;  // tasks: four for each of 64 threads
constexpr float NOTHING = -std::numeric_limits<float>::infinity(), LOG2E = 1.44269504f;
constexpr int32_t NUMBERS[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The unit that products of tensors of T multiply, and how many numbers are in one.
template <class T> struct UnitOf { typedef float Type; };
#if defined(__AVX512BF16__)
template <> struct UnitOf<Bfloat16> { typedef Pair Type; };
#endif
template <class T> using Unit = typename UnitOf<T>::Type;
template <class U> constexpr int PER = 1;
template <> constexpr int PER<Pair> = 2;

inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline Vec load(const Bfloat16* p) {
    Halves h; std::memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, IntVec) << 16);
}
inline PairVec load(const Pair* p) { PairVec v; std::memcpy(&v, p, sizeof v); return v; }
inline Halves rounded(Vec v) {  // to bfloat16, to nearest even
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    const PairVec bits = (PairVec)v;
    return __builtin_convertvector(v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : bits >> 16 | 1, Halves);
#endif
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void store(Pair* p, PairVec v) { std::memcpy(p, &v, sizeof v); }
inline void store(Bfloat16* p, Vec v) { const Halves h = rounded(v); std::memcpy(p, &h, sizeof h); }
inline Vec all(float x) { return x - Vec{}; }
inline IntVec count_from(int x) { IntVec v; std::memcpy(&v, NUMBERS, sizeof v); return v + x; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline Vec multiply_add(Vec sum, float a, Vec b) { return sum + a * b; }
#if defined(__AVX512BF16__)
inline Vec multiply_add(Vec sum, Pair a, PairVec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(a - PairVec{}), (__m512bh)b);
}
#endif

// 2^x for x <= 0 to 2 units in the last place, or to 1e-4 where PAIRS are made of it, which round to 4e-3; below 2^-126
// it stays there. NaN stays NaN, by the order of the operands
template <bool PAIRS = false> inline Vec exp2_of(Vec x) {
    x = larger(all(-126.f), x);
    const Vec shift = all(12582912.f);  // adding 1.5 * 2^23 leaves the nearest whole number in the low bits
    Vec t = x + shift, f = x - (t - shift);
    if (PAIRS) {
        Vec p = all(5.5008690e-2f);
        p = p * f + 2.4221063e-1f; p = p * f + 6.9328292e-1f; p = p * f + 1.f;
        return (Vec)((IntVec)p + ((IntVec)t << 23));
    }
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

// units that hold a number of each of PER rows: of the tensor's first and last of these rows, or of vectors
template <class U, class T> inline auto across(const T* first, const T* last) {
    if constexpr (PER<U> == 1) return load(first);
    else return (PairVec)load(first) >> 16 | (PairVec)load(last);
}
template <class U> inline auto across(const Vec* rows) {
    if constexpr (PER<U> == 1) return rows[0];
#if defined(__AVX512BF16__)
    else {
        static const int16_t ORDER[] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);
        return (PairVec)_mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER), both);
    }
#endif
}
// LANES numbers of a row, side by side, as units; and a row of D numbers times `factor`, which pairs do not take
inline void store_along(float* row, int column, Vec v) { store(row + column, v); }
inline void store_along(Pair* row, int column, Vec v) { store((Bfloat16*)row + column, v); }
template <int D, class U, class T> inline void copy_along(U* to, const T* from, float factor) {
    if constexpr (PER<U> == 2) std::memcpy(to, from, D * sizeof *from);
    else for (int d = 0; d < D; d += LANES) store(to + d, load(from + d) * factor);
}

// asks for a row of D numbers that will be read soon: rows of one head lie apart, which the processor does not foresee
template <int D, class T> inline void fetch(const T* row) {
    for (int d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
}

// strides in elements of (batch, token, head)
struct Strides { int64_t b, t, h; };
struct Sizes { int64_t batch, length, heads, kv_heads, head_dim, keys; };
// What a call does, told without doing it when it gets no tensors: how many tasks, and the bytes of scratch it takes.
struct Need { int64_t tasks, bytes; };

// Hands out pieces of the scratch, which is one piece from Python: there running out of memory is an exception.
struct Scratch {
    uintptr_t at;
    template <class X> X* take(int64_t count) {
        X* piece = (X*)at;
        at += (count * sizeof(X) + 63) / 64 * 64;
        return piece;
    }
};

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

// c[i][j] = sum over x of a[i * step_i + x * step_x] * b[x][j], for SIZE i, UNITS x and VECTORS * LANES j; ADD: added to
// what c has, times keep[i]. Rows of c and b are `row_c` and `row_b` apart.
template <int SIZE, int UNITS, int VECTORS, bool ADD, class U>
inline void product(float* c, int row_c, const U* a, int step_i, int step_x, const U* b, int row_b,
                    const float* keep = nullptr) {
    constexpr int WIDE = VECTORS > 4 ? 4 : VECTORS;  // at most 16 sums at a time, which stay in registers
    constexpr int HIGH = WIDE > 2 ? 4 : WIDE == 2 || SIZE % 16 ? 8 : 16;
    for (int i = 0; i < SIZE; i += HIGH)
        for (int j = 0; j < VECTORS * LANES; j += WIDE * LANES) {
            Vec sums[HIGH][WIDE] = {};
            if (ADD)
                for (int r = 0; r < HIGH; r++)
                    for (int w = 0; w < WIDE; w++) {
                        sums[r][w] = load(c + (i + r) * row_c + j + w * LANES);
                        if (keep) sums[r][w] *= keep[i + r];
                    }
#pragma GCC unroll 2
            for (int x = 0; x < UNITS; x++)
                for (int w = 0; w < WIDE; w++) {
                    const auto right = load(b + x * row_b + j + w * LANES);
                    for (int r = 0; r < HIGH; r++)
                        sums[r][w] = multiply_add(sums[r][w], a[(i + r) * step_i + x * step_x], right);
                }
            for (int r = 0; r < HIGH; r++)
                for (int w = 0; w < WIDE; w++) store(c + (i + r) * row_c + j + w * LANES, sums[r][w]);
        }
}

// A tile of KEYS keys or values, of which row(j) gives the j-th: units of numbers of one key, turned so that keys are
// side by side; and units of numbers of PER keys.
template <int D, class U, class Row> inline void turned(U (*to)[KEYS], Row row) {
    alignas(64) U four[4][D / PER<U>];
    for (int j = 0; j < KEYS; j += 4) {
        for (int i = 0; i < 4; i++) copy_along<D>(four[i], row(j + i), 1);
        for (int d = 0; d < D / PER<U>; d++) {  // as a vector: stored one by one they would be a scatter
            const U column[4] = {four[0][d], four[1][d], four[2][d], four[3][d]};
            std::memcpy(&to[d][j], column, sizeof column);
        }
    }
}
template <int D, class U, class Row> inline void joined(U (*to)[D], int count, Row row) {
    for (int j = 0; j < count; j += PER<U>)
        for (int d = 0; d < D; d += LANES)
            store(&to[j / PER<U>][d], across<U>(row(j) + d, row(j + PER<U> - 1) + d));
}

// Forward. One task is a block of queries of one KV head: all query heads that share it are handled together, so each
// tile of keys and values is read and turned once for all of them. Scores never leave the first-level cache, and of a
// tile only the columns, a vector wide, are computed that one query of eight sees. Where there are few queries, at the
// end of a cache, tasks are also ranges of keys, and what they found is joined at the end. The ranges follow from the
// sizes alone, and blocks do not change what is summed, so results are the same bits for any number of threads.
template <class T> struct Forward {
    const T *q, *k, *v;
    T* out;
    float* lse;
    const int32_t *low, *high;
    Strides sq, sk, sv;
    Sizes n;
    float scale;
    int64_t ranges;  // of keys
    float* parts;    // ranges, batch, length, heads, head_dim + 2: a sum of values, the highest score, the sum of weights
};

// The rows of a task: row r is query q0 + r / shared of head r % shared. So the rows that go together see nearly the
// same keys, and one query at the end of a cache fills no more rows than it has heads.
template <int D, class U> struct Block {
    U* queries;
    float *sums, *highest;
    Vec* total;  // a sum for each lane
    Seen* seen;  // by ROWS rows
    Block(Scratch& scratch, int64_t rows)
        : queries(scratch.take<U>(rows * D / PER<U>)), sums(scratch.take<float>(rows * D)),
          highest(scratch.take<float>(rows + LANES)), total(scratch.take<Vec>(rows)),
          seen(scratch.take<Seen>(rows / ROWS)) {}
};

// ROWS queries against COLUMNS * LANES keys, of which query r sees lows[r] .. highs[r] - 1
template <int D, int COLUMNS, class U>
void attend_tile(const U* __restrict kt, const U* __restrict vt, const Block<D, U>& block, int row, const int32_t* lows,
                 const int32_t* highs, bool whole, float scale) {
    constexpr int SPACE = ROWS > LANES ? ROWS : LANES;
    alignas(64) float s[ROWS][KEYS], before[SPACE] = {}, tops[SPACE] = {}, shrink[SPACE];
    alignas(64) U weights[ROWS][KEYS / PER<U>];
    float* highest = block.highest + row;
    product<ROWS, D / PER<U>, COLUMNS, false>(s[0], KEYS, block.queries + row * (D / PER<U>), D / PER<U>, 1, kt, KEYS);
    for (int r = 0; r < ROWS; r++) {
        Vec top = all(NOTHING);
        for (int c = 0; c < COLUMNS * LANES; c += LANES) {
            Vec x = load(&s[r][c]);
            if (!whole) {
                const IntVec j = count_from(c);
                x = (j >= lows[r]) & (j < highs[r]) ? x : all(NOTHING);
                store(&s[r][c], x);
            }
            top = larger(top, x);
        }
        before[r] = highest[r];
        const float found = PER<U> == 2 ? max_of(top) * scale : max_of(top);
        highest[r] = tops[r] = found > before[r] ? found : before[r];
    }
    for (int r = 0; r < ROWS; r += LANES) {  // a row that has seen nothing is compared with 0: its weights are 0 too
        const Vec top = load(tops + r), base = top == NOTHING ? Vec{} : top;
        store(tops + r, base);
        store(shrink + r, exp2_of(load(before + r) - base));
    }
    for (int r = 0; r < ROWS; r++) {
        Vec sum = block.total[row + r] * shrink[r];
        for (int c = 0; c < COLUMNS * LANES; c += LANES) {
            Vec x = load(&s[r][c]), p = exp2_of<PER<U> == 2>((PER<U> == 2 ? x * scale : x) - tops[r]);
            if (!whole) p = x == NOTHING ? Vec{} : p;
            store_along(weights[r], c, p);
            sum += p;
        }
        block.total[row + r] = sum;
    }
    product<ROWS, COLUMNS * LANES / PER<U>, D / LANES, true>(block.sums + row * D, D, weights[0], KEYS / PER<U>, 1, vt, D,
                                                             shrink);
}

// queries q0 .. q1 - 1 of row b that read KV head h, against the keys from .. to - 1, which begin a tile
template <int D, class T>
void attend(const Forward<T>& a, int64_t b, int64_t h, int64_t q0, int64_t q1, int64_t range, int64_t from, int64_t to,
            Scratch scratch) {
    typedef Unit<T> U;
    const Sizes& n = a.n;
    const int shared = int(n.heads / n.kv_heads), count = int(q1 - q0) * shared, rows = (count + ROWS - 1) / ROWS * ROWS;
    const Block<D, U> block(scratch, rows);
    std::fill_n(block.sums, rows * D, 0.f);
    std::fill_n(block.highest, rows, NOTHING);
    std::fill_n(block.total, rows, Vec{});
    const int32_t *low = a.low + b * n.length, *high = a.high + b * n.length;
    const auto query_of = [=](int row) { return q0 + std::min(row, count - 1) / shared; };  // past the end: the last
    for (int row = 0; row < rows; row++) {
        const int64_t head = h * shared + std::min(row, count - 1) % shared;
        copy_along<D>(block.queries + row * (D / PER<U>), a.q + b * a.sq.b + query_of(row) * a.sq.t + head * a.sq.h,
                      a.scale * LOG2E);
    }
    for (int row = 0; row < rows; row += ROWS)
        block.seen[row / ROWS] = seen_by(low, high, query_of(row), query_of(row + ROWS - 1) + 1);
    from = std::max<int64_t>(from, *std::min_element(low + q0, low + q1) / KEYS * KEYS);
    to = std::min<int64_t>(to, *std::max_element(high + q0, high + q1));
    const T *k = a.k + b * a.sk.b + h * a.sk.h, *v = a.v + b * a.sv.b + h * a.sv.h;
    alignas(64) U kt[D / PER<U>][KEYS], vt[KEYS / PER<U>][D];
    for (int32_t k0 = int32_t(from); k0 < to; k0 += KEYS) {
        // keys past the end repeat the last one: nothing sees them
        const auto at = [&](int j) { return std::min<int64_t>(k0 + j, n.keys - 1); };
        turned<D>(kt, [&](int j) { return k + at(j) * a.sk.t; });
        joined<D>(vt, KEYS, [&](int j) { return v + at(j) * a.sv.t; });
        for (int j = KEYS; j < 2 * KEYS && k0 + j < to; j++) {  // the next tile
            fetch<D>(k + at(j) * a.sk.t);
            fetch<D>(v + at(j) * a.sv.t);
        }
        for (int row = 0; row < rows; row += ROWS) {
            const Columns c(block.seen[row / ROWS], k0);
            if (c.count <= 0) continue;
            int32_t lows[ROWS], highs[ROWS];
            for (int r = 0; r < ROWS && !c.whole; r++) {
                lows[r] = low[query_of(row + r)] - k0 - c.first; highs[r] = high[query_of(row + r)] - k0 - c.first;
            }
            constexpr decltype(&attend_tile<D, 1, U>) OF_COLUMNS[] = {
                attend_tile<D, 1, U>, attend_tile<D, 2, U>, attend_tile<D, 3, U>, attend_tile<D, 4, U>};
            OF_COLUMNS[c.count - 1](&kt[0][c.first], vt[c.first / PER<U>], block, row, lows, highs, c.whole,
                                    a.scale * LOG2E);
        }
    }
    for (int row = 0; row < count; row++) {
        const float sum = sum_of(block.total[row]), share = sum > 0 ? 1 / sum : 0;
        const int64_t to_row = (b * n.length + query_of(row)) * n.heads + h * shared + row % shared;
        if (a.ranges > 1) {
            float* part = a.parts + (range * n.batch * n.length * n.heads + to_row) * (D + 2);
            std::memcpy(part, block.sums + row * D, D * sizeof *part);
            part[D] = block.highest[row]; part[D + 1] = sum;
            continue;
        }
        for (int d = 0; d < D; d += LANES) store(a.out + to_row * D + d, load(block.sums + row * D + d) * share);
        a.lse[to_row] = block.highest[row] + std::log2(sum);
    }
}

// what the ranges of keys found for one query, joined
template <int D, class T> void join(const Forward<T>& a, int64_t row) {
    const int64_t step = a.n.batch * a.n.length * a.n.heads * (D + 2);
    const float* part = a.parts + row * (D + 2);
    float top = NOTHING, total = 0;
    for (int64_t i = 0; i < a.ranges; i++) top = std::max(top, part[i * step + D]);
    Vec sums[D / LANES] = {};
    for (int64_t i = 0; i < a.ranges; i++, part += step) {
        const float weight = part[D] == NOTHING ? 0 : std::exp2(part[D] - top);
        total += part[D + 1] * weight;
        for (int d = 0; d < D / LANES; d++) sums[d] += load(part + d * LANES) * weight;
    }
    for (int d = 0; d < D / LANES; d++) store(a.out + row * D + d * LANES, sums[d] * (total > 0 ? 1 / total : 0));
    a.lse[row] = top + std::log2(total);
}

// tensors: q, k, v, out, lse, low, high
template <int D, class T>
Need forward(void* const* t, const int64_t* s, const Sizes& n, float scale, int threads, Scratch scratch) {
    Forward<T> a{};
    const uintptr_t begin = scratch.at;
    const int64_t shared = n.heads / n.kv_heads, pairs = n.batch * n.kv_heads, tiles = (n.keys + KEYS - 1) / KEYS;
    // as many rows a task, whatever the variant, down to 64 queries where threads would be idle; ROWS divides all
    int64_t block = std::clamp<int64_t>(512 / shared / ROWS * ROWS, ROWS, 512);
    while (block >= 2 * 64 && pairs * ((n.length + block - 1) / block) < 4 * threads) block = block / 2 / ROWS * ROWS;
    const int64_t blocks = (n.length + block - 1) / block;
    a.ranges = n.length > 64 ? 1 : std::clamp<int64_t>(MANY / std::max<int64_t>(pairs, 1), 1, std::max<int64_t>(tiles, 1));
    const int64_t keys = (tiles + a.ranges - 1) / a.ranges * KEYS, tasks = pairs * blocks * a.ranges;
    if (a.ranges > 1) a.parts = scratch.take<float>(a.ranges * n.batch * n.length * n.heads * (D + 2));
    const uintptr_t own = scratch.at;
    Block<D, Unit<T>>(scratch, (std::min(block, n.length) * shared + ROWS - 1) / ROWS * ROWS);
    const uintptr_t size = scratch.at - own;  // for each thread
    if (!t) return {tasks, int64_t(own - begin + size * threads)};

    a.q = (T*)t[0]; a.k = (T*)t[1]; a.v = (T*)t[2]; a.out = (T*)t[3]; a.lse = (float*)t[4];
    a.low = (int32_t*)t[5]; a.high = (int32_t*)t[6];
    a.sq = {s[0], s[1], s[2]}; a.sk = {s[3], s[4], s[5]}; a.sv = {s[6], s[7], s[8]};
    a.n = n; a.scale = scale;
#pragma omp parallel num_threads(threads)
    {
        const Scratch mine{own + size * omp_get_thread_num()};
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t pair = task % pairs, range = task / pairs % a.ranges, at = task / pairs / a.ranges;
            const int64_t q0 = (blocks - 1 - at) * block, q1 = std::min(q0 + block, n.length);  // longest first
            attend<D>(a, pair / n.kv_heads, pair % n.kv_heads, q0, q1, range, range * keys, range * keys + keys, mine);
        }
        if (a.ranges > 1) {
#pragma omp for
            for (int64_t row = 0; row < n.batch * n.length * n.heads; row++) join<D>(a, row);
        }
    }
    return {};
}

// Backward. One task is a tile of keys of one KV head, or of some of the query heads that share it where tasks would be
// few. It walks the queries that see the tile, so every score is computed once; gradients of its keys and values stay
// with it. Those of the queries are summed in memory, by one tile after the other: from the last to the first, each
// waiting for its turn. Tasks begin in that order, so the one whose turn it is runs or has run, and the one behind it is
// a group of queries behind it. Each number has one order of summing: the same bits for any number of threads.
template <class T> struct Backward {
    const T *q, *k, *v, *grad, *out;
    const float* lse;
    const int32_t *low, *high;
    T *dq, *dk, *dv;
    Strides sq, sk, sv, sg;
    Sizes n;
    float scale;
    int64_t groups, parts;       // parts: of the query heads that share a KV head
    float *delta, *base;         // batch, heads, groups * GROUP: output times gradient, log-sum-exp; zeros past the end
    float *sums;                 // batch, heads, groups * GROUP, head_dim: of the queries' gradients
    float *partial;              // 2 (dk, dv), parts, batch, length, kv_heads, head_dim; none for one part
    Seen* seen;                  // batch, groups, blocks of a group
    std::atomic<int32_t>* turn;  // batch, heads, groups: the tile whose turn it is
};

constexpr int BLOCK = 16, BLOCKS = 4, GROUP = BLOCK * BLOCKS;  // queries at a time; blocks of a group

// the tiles first .. last that a group of queries sees some of
struct Tiles {
    int32_t first = 0, last = -1;
    explicit Tiles(const Seen* seen) {
        int32_t low = seen[0].some_low, high = seen[0].some_high;
        for (int i = 1; i < BLOCKS; i++) low = std::min(low, seen[i].some_low), high = std::max(high, seen[i].some_high);
        if (low < high) first = low / KEYS, last = (high - 1) / KEYS;
    }
};

// What a thread works on: a tile, and BLOCK queries against it.
template <int D, class U> struct alignas(64) Work {
    static constexpr int P = PER<U>;
    U keys[KEYS / P][D], kt[D / P][KEYS], vt[D / P][KEYS];
    float dkt[D][KEYS], dvt[D][KEYS];
    U queries[BLOCK][D / P], grads[BLOCK][D / P], queries_across[BLOCK / P][D], grads_across[BLOCK / P][D];  // or nothing
    int32_t lows[BLOCK], highs[BLOCK];
};

// BLOCK queries against COLUMNS * LANES keys of a tile, from `first`, of which query r sees lows[r] .. highs[r] - 1
template <int D, int COLUMNS, class U>
void backward_of_tile(Work<D, U>& w, int first, const float* base, const float* delta, float* __restrict dq, bool whole,
                      float scale) {
    constexpr int P = PER<U>;
    alignas(64) float scores[BLOCK][KEYS], slopes[BLOCK][KEYS];
    alignas(64) U weights[BLOCK / P][KEYS], ds[BLOCK / P][KEYS], ds_along[BLOCK][KEYS / P];
    product<BLOCK, D / P, COLUMNS, false>(scores[0], KEYS, w.queries[0], D / P, 1, &w.kt[0][first], KEYS);
    product<BLOCK, D / P, COLUMNS, false>(slopes[0], KEYS, w.grads[0], D / P, 1, &w.vt[0][first], KEYS);
    for (int r = 0; r < BLOCK; r += P)
        for (int c = 0; c < COLUMNS * LANES; c += LANES) {
            Vec weight[P], slope[P];
            for (int i = 0; i < P; i++) {
                Vec x = load(&scores[r + i][c]);
                if (P == 2) x *= scale;
                x -= base[r + i];
                x = x > 0 ? Vec{} : x;  // rounding of very large scores
                if (!whole) {
                    const IntVec j = count_from(c);
                    x = (j >= w.lows[r + i]) & (j < w.highs[r + i]) ? x : all(NOTHING);
                }
                weight[i] = x < -126.f ? Vec{} : exp2_of<P == 2>(x);
                slope[i] = weight[i] * (load(&slopes[r + i][c]) - delta[r + i]);
            }
            store(&weights[r / P][c], across<U>(weight));
            store(&ds[r / P][c], across<U>(slope));
            if (P == 2) for (int i = 0; i < P; i++) store_along(ds_along[r + i], c, slope[i]);
        }
    // floats lie the same way along and across
    const U *grads = P == 2 ? w.grads_across[0] : w.grads[0], *queries = P == 2 ? w.queries_across[0] : w.queries[0],
            *by_query = P == 2 ? ds_along[0] : ds[0];
    product<D, BLOCK / P, COLUMNS, true>(&w.dvt[0][first], KEYS, grads, 1, D, weights[0], KEYS);
    product<D, BLOCK / P, COLUMNS, true>(&w.dkt[0][first], KEYS, queries, 1, D, ds[0], KEYS);
    product<BLOCK, COLUMNS * LANES / P, D / LANES, true>(dq, D, by_query, KEYS / P, 1, w.keys[first / P], D);
}

// of one group of queries: what it sees, whose turn it is, and for each head the output times its gradient
template <int D, class T> void prepare(const Backward<T>& a, int64_t b, int64_t group) {
    const Sizes& n = a.n;
    Seen* seen = a.seen + (b * a.groups + group) * BLOCKS;
    for (int64_t i = 0; i < BLOCKS; i++) {
        const int64_t from = group * GROUP + i * BLOCK, to = std::min(from + BLOCK, n.length);
        const int32_t *low = a.low + b * n.length, *high = a.high + b * n.length;
        seen[i] = from < to ? seen_by(low, high, from, to) : seen[0];
    }
    const int32_t last = Tiles(seen).last;
    const int64_t q0 = group * GROUP, q1 = std::min(q0 + GROUP, n.length);
    for (int64_t h = 0; h < n.heads; h++) {
        float *delta = a.delta + ((b * n.heads + h) * a.groups + group) * GROUP, *base = a.base + (delta - a.delta);
        std::fill_n(delta, GROUP, 0.f);
        std::fill_n(base, GROUP, 0.f);
        new (&a.turn[(b * n.heads + h) * a.groups + group]) std::atomic<int32_t>(last);
        for (int64_t i = q0; i < q1; i++) {
            const int64_t row = (b * n.length + i) * n.heads + h;
            Vec sum = {};
            for (int d = 0; d < D; d += LANES) {
                sum += load(a.grad + b * a.sg.b + i * a.sg.t + h * a.sg.h + d) * load(a.out + row * D + d);
                if (last < 0) store(a.dq + row * D + d, Vec{});
            }
            delta[i - q0] = sum_of(sum);
            base[i - q0] = a.lse[row];
        }
    }
}

template <int D, class T> void backward_of_group(const Backward<T>& a, Work<D, Unit<T>>& w, int64_t b, int64_t h,
                                                 int64_t group, int32_t k0) {
    typedef Unit<T> U;
    const Sizes& n = a.n;
    static const T zeros[D] = {};
    for (int64_t i = 0; i < BLOCKS; i++) {
        const Columns c(a.seen[(b * a.groups + group) * BLOCKS + i], k0);
        const int64_t from = group * GROUP + i * BLOCK, row = (b * n.heads + h) * a.groups * GROUP + from;
        if (c.count <= 0 || from >= n.length) continue;
        const T *q = a.q + b * a.sq.b + from * a.sq.t + h * a.sq.h, *grad = a.grad + b * a.sg.b + from * a.sg.t + h * a.sg.h;
        const int64_t count = n.length - from;  // rows past the end are zeros and add nothing
        const auto query_row = [&](int r) { return r < count ? q + r * a.sq.t : zeros; };
        const auto grad_row = [&](int r) { return r < count ? grad + r * a.sg.t : zeros; };
        for (int r = 0; r < BLOCK; r++) {
            copy_along<D>(w.queries[r], query_row(r), a.scale * LOG2E);
            copy_along<D>(w.grads[r], grad_row(r), 1);
        }
        for (int r = BLOCK; r < 2 * BLOCK && r < count; r++) {  // the next block
            fetch<D>(q + r * a.sq.t);
            fetch<D>(grad + r * a.sg.t);
            fetch<D>(a.sums + (row + r) * D);
        }
        if (PER<U> == 2) {
            joined<D>(w.queries_across, BLOCK, query_row);
            joined<D>(w.grads_across, BLOCK, grad_row);
        }
        for (int r = 0; r < BLOCK && !c.whole; r++) {
            const int64_t at = b * n.length + std::min(from + r, n.length - 1);
            w.lows[r] = a.low[at] - k0 - c.first; w.highs[r] = a.high[at] - k0 - c.first;
        }
        constexpr decltype(&backward_of_tile<D, 1, U>) OF_COLUMNS[] = {
            backward_of_tile<D, 1, U>, backward_of_tile<D, 2, U>, backward_of_tile<D, 3, U>, backward_of_tile<D, 4, U>};
        OF_COLUMNS[c.count - 1](w, c.first, a.base + row, a.delta + row, a.sums + row * D, c.whole, a.scale * LOG2E);
    }
}

template <int D, class T>
void backward_of_keys(const Backward<T>& a, int64_t b, int64_t kv, int64_t part, int32_t tile, Work<D, Unit<T>>& w) {
    const Sizes& n = a.n;
    const int32_t k0 = tile * KEYS;
    const int64_t heads = n.heads / n.kv_heads / a.parts, first_head = (kv * a.parts + part) * heads;
    // keys past the end repeat the last one: nothing sees them
    const auto at = [&](int j) { return std::min<int64_t>(k0 + j, n.keys - 1); };
    const auto key = [&](int j) { return a.k + b * a.sk.b + at(j) * a.sk.t + kv * a.sk.h; };
    turned<D>(w.kt, key);
    joined<D>(w.keys, KEYS, key);
    turned<D>(w.vt, [&](int j) { return a.v + b * a.sv.b + at(j) * a.sv.t + kv * a.sv.h; });
    std::memset(w.dkt, 0, sizeof w.dkt); std::memset(w.dvt, 0, sizeof w.dvt);
    for (int64_t h = first_head; h < first_head + heads; h++)
        for (int64_t group = 0; group < a.groups; group++) {
            const Tiles tiles(a.seen + (b * a.groups + group) * BLOCKS);
            if (tile < tiles.first || tile > tiles.last) continue;
            const int64_t at_group = (b * n.heads + h) * a.groups + group, q0 = group * GROUP;
            float* sums = a.sums + at_group * GROUP * D;
            while (a.turn[at_group].load(std::memory_order_acquire) != tile) std::this_thread::yield();
            if (tile == tiles.last) std::fill_n(sums, GROUP * D, 0.f);
            backward_of_group<D>(a, w, b, h, group, k0);
            if (tile == tiles.first)
                for (int64_t i = q0; i < std::min(q0 + GROUP, n.length); i++, sums += D)
                    for (int d = 0; d < D; d += LANES)
                        store(a.dq + ((b * n.length + i) * n.heads + h) * D + d, load(sums + d) * a.scale);
            a.turn[at_group].store(tile - 1, std::memory_order_release);
        }
    const float factor = PER<Unit<T>> == 2 ? a.scale : 1 / LOG2E;  // floats of queries carry scale * log2(e)
    const auto write = [&](auto* dk, auto* dv) {
        for (int64_t j = 0; j < std::min<int64_t>(KEYS, n.keys - k0); j++)
            for (int d = 0; d < D; d += LANES) {
                const int64_t to = ((b * n.keys + k0 + j) * n.kv_heads + kv) * D + d;
                Vec x, y;
                for (int i = 0; i < LANES; i++) x[i] = w.dkt[d + i][j], y[i] = w.dvt[d + i][j];
                store(dk + to, x * factor);
                store(dv + to, y);
            }
    };
    const int64_t size = n.batch * n.keys * n.kv_heads * D;
    if (a.parts == 1) write(a.dk, a.dv);
    else write(a.partial + part * size, a.partial + (a.parts + part) * size);
}

// tensors: q, k, v, grad, out, lse, low, high, dq, dk, dv
template <int D, class T>
Need backward(void* const* t, const int64_t* s, const Sizes& n, float scale, int threads, Scratch scratch) {
    Backward<T> a{};
    const uintptr_t begin = scratch.at;
    const int64_t shared = n.heads / n.kv_heads, pairs = n.batch * n.kv_heads, tiles = (n.keys + KEYS - 1) / KEYS;
    a.groups = (n.length + GROUP - 1) / GROUP;
    for (a.parts = 1; a.parts < shared && (shared % a.parts || pairs * a.parts * tiles < MANY);) a.parts++;
    const int64_t rows = n.batch * n.heads * a.groups * GROUP, size = n.batch * n.keys * n.kv_heads * D;
    a.delta = scratch.take<float>(rows);
    a.base = scratch.take<float>(rows);
    a.sums = scratch.take<float>(rows * D);
    if (a.parts > 1) a.partial = scratch.take<float>(2 * a.parts * size);
    a.seen = scratch.take<Seen>(n.batch * a.groups * BLOCKS);
    a.turn = scratch.take<std::atomic<int32_t>>(rows / GROUP);
    auto* work = scratch.take<Work<D, Unit<T>>>(threads);
    const int64_t tasks = pairs * a.parts * tiles;
    if (!t) return {tasks, int64_t(scratch.at - begin)};

    a.q = (T*)t[0]; a.k = (T*)t[1]; a.v = (T*)t[2]; a.grad = (T*)t[3]; a.out = (T*)t[4]; a.lse = (float*)t[5];
    a.low = (int32_t*)t[6]; a.high = (int32_t*)t[7]; a.dq = (T*)t[8]; a.dk = (T*)t[9]; a.dv = (T*)t[10];
    a.sq = {s[0], s[1], s[2]}; a.sk = {s[3], s[4], s[5]}; a.sv = {s[6], s[7], s[8]}; a.sg = {s[9], s[10], s[11]};
    a.n = n; a.scale = scale;
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t i = 0; i < n.batch * a.groups; i++) prepare<D>(a, i / a.groups, i % a.groups);
        for (int64_t task; (task = next++) < tasks;) {  // begun one after the other, which `omp for` does not promise
            const int64_t tile = tiles - 1 - task / (pairs * a.parts), pair = task / a.parts % pairs;
            backward_of_keys<D>(a, pair / n.kv_heads, pair % n.kv_heads, task % a.parts, int32_t(tile),
                                work[omp_get_thread_num()]);
        }
        if (a.parts > 1) {
#pragma omp barrier
#pragma omp for
            for (int64_t i = 0; i < size; i += LANES) {
                Vec dk = {}, dv = {};
                for (int64_t part = 0; part < a.parts; part++) {
                    dk += load(a.partial + part * size + i);
                    dv += load(a.partial + (a.parts + part) * size + i);
                }
                store(a.dk + i, dk);
                store(a.dv + i, dv);
            }
        }
    }
    return {};
}

typedef Need Function(void* const*, const int64_t*, const Sizes&, float, int, Scratch);
#define FOR_HEAD_DIMS(F, T) {F<16, T>, F<32, T>, F<64, T>, F<128, T>}
constexpr Function* FUNCTIONS[2][2][4] = {{FOR_HEAD_DIMS(forward, float), FOR_HEAD_DIMS(forward, Bfloat16)},
                                          {FOR_HEAD_DIMS(backward, float), FOR_HEAD_DIMS(backward, Bfloat16)}};

Function* function_for(int is_backward, int is_bfloat16, int64_t head_dim) {
    int i = 0;
    while (16 << i < head_dim) i++;
    return FUNCTIONS[is_backward][is_bfloat16][i];
}

}  // namespace

// sizes: B, T, Hq, Hkv, D (16, 32, 64 or 128), Tk. need: tasks, bytes of scratch for so many threads.
extern "C" void sqa_attention_need(int is_backward, int is_bfloat16, const int64_t* sizes, int threads, int64_t* need) {
    const Sizes n{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
    const Need found = function_for(is_backward, is_bfloat16, n.head_dim)(nullptr, nullptr, n, 0, threads, {0});
    need[0] = found.tasks; need[1] = found.bytes;
}

// Forward. Tensors: q (B, T, Hq, D), k, v (B, Tk, Hkv, D), then results, contiguous: out (B, T, Hq, D), log-sum-exp in
// base 2, fp32 (B, T, Hq); then low, high int32 (B, T): query i of row b sees keys low[b][i] .. high[b][i] - 1.
// Backward. Tensors: q, k, v, grad (B, T, Hq, D), then as the forward wrote or took them out, log-sum-exp, low, high, then
// results, contiguous: dq, dk, dv. Tk must be T.
// strides: of q, k, v and grad, whose last axis is contiguous. scratch begins at a multiple of 64. Returns 1 and does
// nothing for a range of keys outside 0 .. Tk, else 0.
extern "C" int sqa_attention(int is_backward, int is_bfloat16, void* const* tensors, const int64_t* strides,
                             const int64_t* sizes, float scale, int threads, void* scratch) {
    const Sizes n{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
    const int first = is_backward ? 6 : 5;
    const int32_t *low = (const int32_t*)tensors[first], *high = (const int32_t*)tensors[first + 1];
    for (int64_t i = 0; i < n.batch * n.length; i++)
        if (low[i] < 0 || high[i] > n.keys) return 1;
    function_for(is_backward, is_bfloat16, n.head_dim)(tensors, strides, n, scale, threads, {(uintptr_t)scratch});
    return 0;
}
